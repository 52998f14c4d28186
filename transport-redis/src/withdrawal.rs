//! Taking requests back that nobody holds.

use antiphon_core::{CorrelationId, Error, Executed, ServiceName};

use crate::command::Pipeline;
use crate::naming::{self, ServiceKeys};
use crate::transport::Shared;
use crate::value::Value;
use crate::{error, frame, scripts};

/// The most requests that are looked at for one,
const REQUESTS_MAX: u32 = 10_000;

/// and the most bytes of them: Redis does nothing else meanwhile.
const BYTES_MAX: u32 = 8 << 20;

/// Takes a request out of its service's queue, or out of the work that came back. True if it was there.
pub(crate) async fn withdraw(
    shared: &Shared,
    service: &ServiceName,
    id: &CorrelationId,
) -> Result<bool, Error> {
    let keys = ServiceKeys::new(service);
    let mut command = scripts::WITHDRAW.on(&[&keys.queue, &keys.returned]);
    command.arg(REQUESTS_MAX).arg(BYTES_MAX);
    for beginning in frame::beginnings(id) {
        command.arg(beginning);
    }
    let mut pipeline = Pipeline::new();
    pipeline.add_command(command);
    let live = shared
        .link
        .clone()
        .ready(&shared.ending)
        .await
        .ok_or_else(error::closed)?;
    let mut answers = live
        .execute(&pipeline)
        .await
        .map_err(|redis| error::lost(Executed::Maybe, &redis))?;
    match answers.pop().unwrap_or_default() {
        Value::Int(removed) => Ok(removed == 1),
        Value::BulkString(body) => {
            let body = String::from_utf8_lossy(&body);
            if naming::is_random_id(&body) {
                let mut pipeline = Pipeline::new();
                pipeline.cmd("UNLINK").arg(keys.body(&body));
                // If it breaks, the body goes with its time to live.
                let _ = live.execute(&pipeline).await;
            }
            Ok(true)
        }
        other => Err(error::unexpected("a withdrawal", &other)),
    }
}
