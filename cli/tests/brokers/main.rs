//! The command on real brokers: each case on each, as a user's shell would have it.
//!
//! Where there is no broker its cases print that they were not run, or fail if `ANTIPHON_REQUIRE_BROKERS=1`.

#![cfg(all(feature = "redis", feature = "amqp"))]

mod broker;
mod cases;
mod failures;
mod nodes;
#[cfg(feature = "disk-outbox")]
mod outbox;
#[path = "../support/mod.rs"]
mod support;

use broker::Provided;

macro_rules! on_each_broker {
    ($($(#[$condition:meta])? $file:ident::$case:ident),* $(,)?) => {
        mod redis {
            $($(#[$condition])?
            #[test]
            fn $case() {
                super::Provided::redis(super::$file::$case);
            })*
        }

        mod amqp {
            $($(#[$condition])?
            #[test]
            fn $case() {
                super::Provided::amqp(super::$file::$case);
            })*
        }
    };
}

on_each_broker!(
    cases::a_body_goes_and_comes_back_byte_for_byte,
    cases::no_body_is_an_empty_one,
    cases::content_type_and_headers_are_passed_on,
    cases::fibonacci_numbers_and_faults,
    cases::a_reply_may_take_its_time,
    cases::a_command_answers_or_fails,
    cases::a_measurement_counts_every_call,
    cases::a_measurement_tells_how_long_calls_take,
    failures::nobody_serves,
    failures::a_failed_call_fails_the_bench,
    failures::the_process_group_dies_at_the_deadline,
    failures::a_server_drains,
    failures::a_second_signal_ends_it_at_once,
    failures::the_second_exclusive_server_is_refused,
    failures::no_call_is_lost_with_a_killed_server,
    nodes::nodes_are_called_and_asked,
    nodes::a_standby_and_a_newcomer_take_over,
    #[cfg(feature = "disk-outbox")]
    outbox::kept_replies_survive_a_kill,
);
