//! The store by itself.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use antiphon_core::{
    Code, CorrelationId, ErrorKind, Executed, Fault, KeptReply, OutboxChange, OutboxStore, Reply,
    ReplyAddress,
};
use antiphon_outbox::{DiskOutbox, OutboxError};

/// A directory of a test's own, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let name = format!("antiphon-outbox-{}", CorrelationId::random());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("outbox")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn kept(id: &str, body: &str) -> KeptReply {
    KeptReply {
        to: ReplyAddress::new("inbox").unwrap(),
        reply: Reply::value(CorrelationId::parse(id).unwrap(), body.to_owned()).into(),
        unsent: true,
        kept_at: SystemTime::now(),
        lasts: Duration::from_secs(30),
    }
}

fn keep(id: &str, body: &str) -> OutboxChange {
    OutboxChange::Keep(Box::new(kept(id, body)))
}

/// The ids, bodies and whether they are to be sent, in the order of ids.
async fn contents(store: &DiskOutbox) -> Vec<(String, String, bool)> {
    let mut found: Vec<_> = store
        .open()
        .await
        .unwrap()
        .into_iter()
        .map(|kept| {
            let body = String::from_utf8(kept.reply.body.to_vec()).unwrap();
            (kept.reply.id.to_string(), body, kept.unsent)
        })
        .collect();
    found.sort();
    found
}

async fn refusal(path: PathBuf) -> OutboxError {
    let error = DiskOutbox::new(path).open().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Outbox);
    let source = std::error::Error::source(&error).unwrap();
    let source = source.downcast_ref::<OutboxError>().unwrap();
    match source {
        OutboxError::InUse => OutboxError::InUse,
        OutboxError::Foreign => OutboxError::Foreign,
        OutboxError::Damaged(reason) => OutboxError::Damaged(reason.clone()),
        OutboxError::Format(format) => OutboxError::Format(*format),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_is_kept_is_found_again() {
    let directory = Directory::new();
    let store = DiskOutbox::new(directory.file());
    assert_eq!(contents(&store).await, []);
    for change in [
        keep("1", "one"),
        keep("2", "two"),
        keep("3", "three"),
        keep("2", "deux"),
        OutboxChange::Sent(kept("1", "").key()),
        OutboxChange::Forget(kept("3", "").key()),
        OutboxChange::Forget(kept("never kept", "").key()),
    ] {
        store.write(change).await.unwrap();
    }
    let other_inbox = KeptReply {
        to: ReplyAddress::new("other").unwrap(),
        unsent: false,
        ..kept("1", "of another")
    };
    store
        .write(OutboxChange::Keep(Box::new(other_inbox)))
        .await
        .unwrap();
    let fault = KeptReply {
        reply: Reply::fault(
            CorrelationId::parse("4").unwrap(),
            Fault::new(Code::NotFound, "no such"),
            Executed::Yes,
        )
        .into(),
        ..kept("4", "")
    };
    store
        .write(OutboxChange::Keep(Box::new(fault)))
        .await
        .unwrap();
    store.close().await;
    assert!(store.write(keep("5", "late")).await.is_err());

    let store = DiskOutbox::new(directory.file());
    let text = |id: &str, body: &str, unsent| (id.to_owned(), body.to_owned(), unsent);
    assert_eq!(
        contents(&store).await,
        [
            text("1", "of another", false),
            text("1", "one", false),
            text("2", "deux", true),
            text("4", "", true),
        ]
    );
}

/// Often: the store once took itself for damaged after one such end in twelve.
#[tokio::test]
async fn changes_are_made_in_order_though_nobody_waits() {
    for _ in 0..25 {
        let directory = Directory::new();
        let store = DiskOutbox::new(directory.file());
        store.open().await.unwrap();
        for number in 0..2000 {
            drop(store.write(keep("1", &number.to_string())));
            drop(store.write(OutboxChange::Forget(kept("1", "").key())));
        }
        drop(store.write(keep("1", "last")));
        store.close().await;
        let found = contents(&DiskOutbox::new(directory.file())).await;
        assert_eq!(found, [("1".to_owned(), "last".to_owned(), true)]);
    }
}

#[cfg(unix)]
#[tokio::test]
async fn nobody_else_may_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new();
    let mode = || fs::metadata(directory.file()).unwrap().permissions().mode() & 0o777;
    let store = DiskOutbox::new(directory.file());
    store.open().await.unwrap();
    assert_eq!(mode(), 0o600);
    store.close().await;
    fs::set_permissions(directory.file(), fs::Permissions::from_mode(0o644)).unwrap();
    DiskOutbox::new(directory.file()).open().await.unwrap();
    assert_eq!(mode(), 0o600);
    assert_eq!(
        fs::read_dir(&directory.0).unwrap().count(),
        1,
        "nothing is left of its making"
    );
}

#[tokio::test]
async fn one_server_has_it() {
    let directory = Directory::new();
    let store = DiskOutbox::new(directory.file());
    store.open().await.unwrap();
    assert!(matches!(
        refusal(directory.file()).await,
        OutboxError::InUse
    ));
    store.write(keep("1", "kept")).await.unwrap();
    // Without a word: whoever opens it next waits for that.
    drop(store);
    assert_eq!(contents(&DiskOutbox::new(directory.file())).await.len(), 1);
}

#[tokio::test]
async fn many_who_make_it_at_once_leave_one_whole() {
    let directory = Directory::new();
    let stores: Vec<_> = (0..8).map(|_| DiskOutbox::new(directory.file())).collect();
    let opened = stores.iter().map(OutboxStore::open);
    let mut winners = 0;
    for (opened, store) in join_all(opened).await.into_iter().zip(&stores) {
        if opened.is_ok() {
            winners += 1;
            store.write(keep("1", "kept")).await.unwrap();
        }
    }
    assert_eq!(winners, 1);
    drop(stores);
    assert_eq!(contents(&DiskOutbox::new(directory.file())).await.len(), 1);
}

/// All at once.
async fn join_all<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T>>,
) -> Vec<T> {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    let mut ended: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (future, ended) in futures.iter_mut().zip(&mut ended) {
            if ended.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *ended = Some(value);
            }
        }
        match ended.iter().all(Option::is_some) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    ended.into_iter().flatten().collect()
}

#[tokio::test]
async fn what_is_no_outbox_is_left_alone() {
    let directory = Directory::new();
    let path = directory.file();
    for other in [&b"short"[..], &[0; 100_000], b"a text of another program"] {
        fs::write(&path, other).unwrap();
        assert!(matches!(refusal(path.clone()).await, OutboxError::Foreign));
        assert_eq!(fs::read(&path).unwrap(), other);
    }
    fs::remove_file(&path).unwrap();
    let table = redb::TableDefinition::<&str, u64>::new("of another program");
    let other = redb::Database::create(&path).unwrap();
    let transaction = other.begin_write().unwrap();
    transaction
        .open_table(table)
        .unwrap()
        .insert("a", 1)
        .unwrap();
    transaction.commit().unwrap();
    drop(other);
    assert!(matches!(refusal(path.clone()).await, OutboxError::Foreign));

    // An empty file, such as of a tool that makes names, becomes one.
    fs::write(&path, "").unwrap();
    assert_eq!(contents(&DiskOutbox::new(&path)).await, []);
}

#[tokio::test]
async fn a_later_format_is_refused() {
    let directory = Directory::new();
    let path = directory.file();
    let table = redb::TableDefinition::<&str, u64>::new("antiphon-outbox");
    let later = redb::Database::create(&path).unwrap();
    let transaction = later.begin_write().unwrap();
    transaction
        .open_table(table)
        .unwrap()
        .insert("format", 2)
        .unwrap();
    transaction.commit().unwrap();
    drop(later);
    assert!(matches!(refusal(path).await, OutboxError::Format(2)));
}

#[tokio::test]
async fn damage_is_told_and_never_sent() {
    let directory = Directory::new();
    let path = directory.file();
    let store = DiskOutbox::new(&path);
    store.open().await.unwrap();
    for number in 0..20 {
        let body = "body".repeat(1000);
        store.write(keep(&number.to_string(), &body)).await.unwrap();
    }
    store.close().await;
    let sound = fs::read(&path).unwrap();
    let at = |text: &[u8]| sound.windows(text.len()).position(|found| found == text);

    let mut flipped = sound.clone();
    flipped[at(b"bodybody").unwrap()] ^= 1;
    fs::write(&path, &flipped).unwrap();
    // A reply is not one that the store could mend by looking at it.
    for _ in 0..2 {
        assert!(matches!(
            refusal(path.clone()).await,
            OutboxError::Damaged(_)
        ));
    }

    fs::write(&path, &sound[..sound.len() / 2]).unwrap();
    assert!(matches!(
        refusal(path.clone()).await,
        OutboxError::Damaged(_)
    ));

    fs::write(&path, &sound).unwrap();
    assert_eq!(contents(&DiskOutbox::new(&path)).await.len(), 20);
}

/// A disk without room, as a process sees it that may write no more than so much to a file.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_told_and_survived() {
    const CHILD: &str = "ANTIPHON_OUTBOX_ON_A_FULL_DISK";
    let Some(path) = std::env::var_os(CHILD) else {
        let directory = Directory::new();
        // 8 MiB in units of 512 bytes; the signal would kill it.
        let limited = "trap '' XFSZ; ulimit -f 16384; exec \"$0\" \"$@\"";
        let child = Command::new("sh")
            .args(["-c", limited])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "a_full_disk_is_told_and_survived", "--nocapture"])
            .env(CHILD, directory.file())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{child:?}");
        assert!(output.contains("survived it"), "{child:?}");
        let found = contents(&DiskOutbox::new(directory.file())).await;
        assert_eq!(found.len(), 2, "what was kept, and nothing that was not");
        return;
    };
    let store = DiskOutbox::new(&path);
    store.open().await.unwrap();
    store.write(keep("1", "kept before")).await.unwrap();
    let large = "x".repeat(16 << 20);
    for _ in 0..3 {
        let error = store.write(keep("2", &large)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Outbox, "{error}");
    }
    store.write(keep("3", "kept after")).await.unwrap();
    store.close().await;
    println!("survived it");
}
