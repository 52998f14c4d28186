//! How far a measurement has come, for who watches it on a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::load::{Limit, Load};

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(100);

/// A bar on standard error, if that is a terminal; it is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub(crate) fn towards(limit: Limit) -> Self {
        let (length, template) = match limit {
            Limit::Calls(calls) => (
                calls,
                "{wide_bar} {human_pos}/{human_len} calls, {eta} left",
            ),
            Limit::Duration(duration) => (
                u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
                "{wide_bar} {elapsed}",
            ),
        };
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self { bar }
    }

    /// Follows the load until it has ended. **Cancel safety**: dropping the future stops nothing.
    pub(crate) async fn follow(&self, load: &mut Load) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = load.ended() => return,
                _ = ticks.tick(), if !self.bar.is_hidden() => self.bar.set_position(load.position()),
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
