//! Values by keys that are never used twice.

/// Names one value for ever: once removed, its key finds nothing, though its place is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    index: usize,
    number: u64,
}

#[derive(Debug)]
pub(crate) struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    next: u64,
}

#[derive(Debug)]
struct Slot<T> {
    number: u64,
    value: Option<T>,
}

impl<T> Table<T> {
    pub(crate) const fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            next: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> Key {
        let number = self.next;
        self.next += 1;
        let slot = Slot {
            number,
            value: Some(value),
        };
        let index = match self.free.pop() {
            Some(index) => {
                // `free` holds indexes of `slots` only, which never shrinks.
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        Key { index, number }
    }

    pub(crate) fn find_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index)?;
        if slot.number == key.number {
            slot.value.as_mut()
        } else {
            None
        }
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index)?;
        if slot.number != key.number {
            return None;
        }
        let value = slot.value.take()?;
        self.free.push(key.index);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            Some((
                Key {
                    index,
                    number: slot.number,
                },
                slot.value.as_ref()?,
            ))
        })
    }

    /// The keys of the values that `wanted` accepts, in the order of their making.
    pub(crate) fn keys(&self, wanted: impl Fn(&T) -> bool) -> Vec<Key> {
        let mut keys: Vec<Key> = self
            .iter()
            .filter(|(_, value)| wanted(value))
            .map(|(key, _)| key)
            .collect();
        keys.sort_unstable_by_key(|key| key.number);
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_key_never_finds_its_successor() {
        let mut table = Table::new();
        let first = table.insert("a");
        assert_eq!(table.remove(first), Some("a"));
        let second = table.insert("b");
        assert_eq!(second.index, first.index);
        assert_eq!((table.remove(first), table.find_mut(first)), (None, None));
        assert_eq!(table.find_mut(second), Some(&mut "b"));
        assert_eq!(table.len(), 1);
        let third = table.insert("c");
        assert_eq!(table.keys(|_| true), [second, third]);
    }
}
