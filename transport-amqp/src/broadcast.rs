//! What is said to every server of a service at once.

use antiphon_core::transport::Done;
use antiphon_core::{Error, ErrorKind, Request, ServiceName, Ticket};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::naming::{self, TO_ALL};
use crate::prober::Prober;
use crate::publisher::{Job, OutgoingRequest, What};

/// Sends a request to the inbox of every server that joined the service, and says how many these are.
///
/// Dropped before it was sent, it is not sent.
///
/// # Errors
/// `DeadlineExceeded`, `ConnectionLost`, `Overloaded`, `Closed`; `Invalid` if its headers are too large; `Broker` if the broker refused
/// it, mostly for a missing right, or something that was sent at the same time.
pub(crate) async fn broadcast(
    prober: &Prober,
    jobs: &mpsc::UnboundedSender<Job>,
    service: &ServiceName,
    request: Request,
) -> Result<Option<usize>, Error> {
    let queue = naming::main_queue(service)?;
    // Who wants no answer need not know how many would come.
    let is_counted = request.reply_to.is_some();
    let deadline = request
        .deadline
        .and_then(|deadline| Instant::now().checked_add(deadline.budget));
    let ticket = WithdrawOnDrop(Ticket::new());
    let (done, published) = Done::of_request(ticket.0.clone());
    let job = Job {
        what: What::Request(Box::new(OutgoingRequest {
            exchange: TO_ALL.into(),
            queue: naming::all_of(service),
            request: request.into(),
            deadline,
            // What no inbox takes is not to wait for one.
            expect_responder: true,
            came_back: false,
            refusals: 0,
            // No inbox outlives the broker.
            persistent: false,
        })),
        done,
    };
    // If it fails, the job is dropped, and says that the transport is closed.
    let _ = jobs.send(job);
    // Each server has one consumer on the service's queue. Asked at the same time, on the other connection.
    let counted = async {
        match is_counted {
            true => Ok(prober.consumers(&queue).await.ok()),
            false => Ok(None),
        }
    };
    let told = async { tokio::try_join!(published, counted) };
    let told = match deadline {
        None => told.await,
        Some(deadline) => match timeout_at(deadline, told).await {
            Ok(told) => told,
            Err(_) => Err(ticket.expired()),
        },
    };
    match told {
        // Somebody has it, so nobody can be counted wrongly: those who count are coming back just now.
        Ok(((), counted)) => Ok(counted
            .filter(|servers| *servers > 0)
            .and_then(|servers| usize::try_from(servers).ok())),
        Err(error) if error.kind() == ErrorKind::NoResponder => Ok(Some(0)),
        Err(error) => Err(error),
    }
}

struct WithdrawOnDrop(Ticket);

impl WithdrawOnDrop {
    fn expired(&self) -> Error {
        let message = "the broker did not accept it in time";
        match self.0.withdraw() {
            true => Error::not_executed(ErrorKind::DeadlineExceeded, message),
            false => Error::maybe_executed(ErrorKind::DeadlineExceeded, message),
        }
    }
}

impl Drop for WithdrawOnDrop {
    fn drop(&mut self) {
        let _ = self.0.withdraw();
    }
}
