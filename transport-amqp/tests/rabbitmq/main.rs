//! What only RabbitMQ has: plain AMQP peers, queues and who declares them, returned messages, alarms, and connections that
//! only look dead. The promises that all transports share are in the conformance suite.

mod alone;
mod bench;
mod faults;
mod frozen;
mod peers;
mod posted;
mod queues;
mod said;
#[cfg(feature = "rustls")]
mod tls;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions, Certificates};
use futures_util::future::LocalBoxFuture;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tokio::runtime::Runtime;

use bench::Bench;

/// No case takes longer.
const LIMIT: Duration = Duration::from_secs(60);

type Case = fn(Bench) -> LocalBoxFuture<'static, Verdict>;

/// Names a case after its function.
macro_rules! cases {
    ($($(#[$when:meta])* $module:ident::$case:ident),* $(,)?) => {
        [$($(#[$when])* (concat!(stringify!($module), "/", stringify!($case)), (|bench| Box::pin(async { Ended::into($module::$case(bench).await) })) as Case)),*]
    };
}

fn main() -> ExitCode {
    if let Some(code) = frozen::serve() {
        return code;
    }
    let cases = cases![
        peers::tutorial_client_gets_its_answer,
        peers::direct_reply_to_works,
        peers::tutorial_server_answers_us,
        peers::a_fault_for_a_plain_peer_is_json,
        peers::a_request_without_reply_to_is_run,
        peers::what_is_no_request_is_buried,
        peers::large_headers_cost_nobody_the_connection,
        queues::a_service_queue_is_declared_once_and_used_as_it_is,
        queues::an_owner_whose_queue_is_deleted_stays_the_owner,
        queues::transient_queues_are_declared_so,
        queues::an_inbox_is_removed_with_its_owner,
        queues::names_of_other_queues_are_refused,
        queues::a_queue_that_is_full_is_not_said_to_be_safe,
        queues::a_deleted_service_queue_comes_back,
        queues::a_deleted_inbox_is_told_and_comes_back,
        queues::returned_messages_find_their_callers,
        queues::a_reply_for_nobody_is_counted,
        queues::a_call_while_its_queue_is_declared_is_answered,
        queues::what_nobody_received_is_not_counted,
        queues::a_busy_server_gives_back_what_it_cannot_start,
        queues::a_backlog_that_went_elsewhere_is_forgotten,
        said::who_has_joined_hears_it,
        said::an_inbox_that_comes_back_has_joined,
        said::who_may_not_say_it_costs_no_neighbour,
        said::a_reply_to_an_inbox_that_is_gone_is_told,
        said::who_stands_by_leaves_nothing_behind,
        said::a_plain_call_costs_no_further_command,
        faults::wrong_credentials_are_refused_at_once,
        faults::an_address_that_does_not_answer_is_given_up,
        faults::everybody_leaves_a_connection_that_does_not_answer,
        faults::an_owner_takes_its_service_back_from_its_ghost,
        frozen::an_owner_that_was_frozen_starts_nothing_of_its_successors,
        frozen::an_owner_that_was_frozen_does_not_believe_its_buffers,
        frozen::a_server_that_was_frozen_leaves_its_requests_to_others,
        frozen::a_server_that_hung_for_a_while_goes_on,
        frozen::a_newcomer_gets_the_service_of_an_owner_that_hangs,
        posted::a_call_is_answered,
        posted::a_call_is_told_that_the_broker_has_no_room,
        posted::a_call_is_told_that_its_connection_was_lost,
        posted::what_nobody_wants_any_more_is_not_sent,
        posted::a_call_that_was_not_sent_is_told_of_the_close,
        posted::a_call_is_told_that_its_channel_was_closed,
        alone::losing_the_publisher_costs_no_call,
        alone::blocked_requests_wait_and_are_withdrawn,
        alone::a_reply_waits_for_the_alarm_to_end,
        alone::a_reply_that_the_broker_refuses_costs_no_neighbour,
    ];
    #[cfg(feature = "rustls")]
    let tls = cases![
        tls::only_who_is_trusted_is_talked_to,
        tls::the_wrong_port_is_told_at_once,
        tls::a_client_shows_its_certificate,
        tls::files_of_no_use_are_told_before_connecting,
        #[cfg(unix)]
        tls::a_file_that_does_not_end_is_given_up,
        tls::files_that_go_bad_are_told,
    ];
    #[cfg(not(feature = "rustls"))]
    let tls: [(&str, Case); 0] = [];
    let arguments = Arguments::from_args();
    let runtime = Runtime::new().expect("a runtime");
    let broker = match arguments.list {
        true => Err("listing".to_owned()),
        false => runtime.block_on(start()),
    };
    if let Err(reason) = &broker
        && brokers::required()
        && !arguments.list
    {
        eprintln!("a broker is required: {reason}");
        return ExitCode::FAILURE;
    }
    let bench = broker.map(|(broker, certificates)| Bench::new(Arc::new(broker), certificates));
    let runtime = Arc::new(runtime);
    let trials = cases.into_iter().chain(tls).map(|(name, case)| {
        let (bench, runtime) = (bench.clone(), Arc::clone(&runtime));
        Trial::ignorable_test(name, move || match bench {
            Ok(bench) => {
                let case = async {
                    let is_alone = ["alone/", "posted/"]
                        .iter()
                        .any(|group| name.starts_with(group));
                    let _company = match is_alone {
                        true => Err(ALONE.write().await),
                        false => Ok(ALONE.read().await),
                    };
                    tokio::time::timeout(LIMIT, case(bench)).await
                };
                match runtime.block_on(case) {
                    Ok(Ok(())) => Ok(Completion::Completed),
                    Ok(Err(NotRun(reason))) => Ok(Completion::ignored_with(reason)),
                    Err(_) => Err(Failed::from(format!("it takes longer than {LIMIT:?}"))),
                }
            }
            Err(reason) => Ok(Completion::ignored_with(reason)),
        })
    });
    let trials = trials.collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Dropped here, and the broker with it, which process::exit would leave running. A container is removed on a runtime.
    let _entered = runtime.enter();
    drop(bench);
    conclusion.exit_code()
}

async fn start() -> Result<(Broker, Option<Certificates>), String> {
    let mut options = BrokerOptions::new(BrokerKind::RabbitMq);
    let mut certificates = None;
    // One that runs already is as it is.
    if std::env::var_os("ANTIPHON_AMQP_URL").is_none() {
        let created = Certificates::create().map_err(|error| error.to_string())?;
        options = options.tls(&created);
        certificates = Some(created);
    }
    let started = brokers::start(options).await;
    let broker = started.map_err(|missing| format!("not run: {missing}"))?;
    Ok((broker, certificates))
}

/// How a case ended that did not fail.
type Verdict = Result<(), NotRun>;

/// What a case needs and this broker cannot do.
struct NotRun(String);

/// Cases that need nothing special return nothing.
trait Ended {
    fn into(self) -> Verdict;
}

impl Ended for () {
    fn into(self) -> Verdict {
        Ok(())
    }
}

impl Ended for Verdict {
    fn into(self) -> Verdict {
        self
    }
}

/// What disturbs the whole broker is done by one case, while no other one runs.
static ALONE: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());
