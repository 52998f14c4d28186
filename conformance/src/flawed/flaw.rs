//! The planted defects, each with the cases that must catch it.

macro_rules! flaws {
    ($($(#[$doc:meta])* $name:ident => [$($case:literal),+ $(,)?],)+) => {
        /// One way to break the contract.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Flaw {
            $($(#[$doc])* $name,)+
        }

        impl Flaw {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The names of the cases that must fail on it.
            #[must_use]
            pub fn caught_by(self) -> &'static [&'static str] {
                match self {
                    $(Self::$name => &[$($case),+],)+
                }
            }
        }
    };
}

flaws! {
    // What a request is on its way.

    /// Bodies lose their last byte.
    DropsTheLastByte => ["round_trip/raw_bytes", "payload/any_bytes", "nodes/servers_of_one_node_share", "channels/results_come_with_their_metadata", "channels/closing_ends_the_stream", "channels/lost_server_does_not_hang_it", "channels/many_in_order", "channels/many_as_completed", "given_up/who_waits_is_served", "given_up/silent_caller_is_served", "given_up/vanished_caller_is_served"],
    /// Bodies are cut at 64 KiB.
    CutsLongBodies => [
        "payload/one_mebibyte",
        "payload/limit_is_inclusive",
        "payload/over_the_limit_is_not_sent",
        "payload/request_over_the_servers_limit_is_refused",
        "payload/reply_over_the_servers_limit_is_a_fault",
    ],
    /// An empty body becomes `null`.
    PadsEmptyBodies => ["payload/empty_body"],
    /// Bodies are taken for text.
    WantsText => ["payload/any_bytes"],
    /// The method is lost.
    LosesMethods => ["round_trip/methods", "faults/unknown_method_is_refused"],
    /// Headers are lost.
    LosesHeaders => ["round_trip/headers_both_ways", "channels/results_come_with_their_metadata"],
    /// The content type is lost.
    LosesContentTypes => ["round_trip/content_type_both_ways", "channels/results_come_with_their_metadata"],
    /// Ids are folded to lower case, and so take the place of others.
    FoldsIds => ["round_trip/foreign_correlation_id_is_echoed", "correlation/foreign_reply_resolves_nothing"],
    /// Requests go to the service that was subscribed to last.
    MixesServices => ["round_trip/services_do_not_mix"],
    /// The node in a service's name is ignored.
    IgnoresNodes => ["round_trip/node_queues_are_apart", "nodes/one_node_is_reached"],
    /// Each request is sent twice.
    DuplicatesRequests => ["round_trip/notify_is_executed_once", "competing/each_request_goes_to_one_server"],
    /// Every other request is overtaken by the next one.
    Reorders => ["competing/order_is_kept_at_prefetch_one"],
    /// A ticket is never committed.
    NeverCommits => [
        "deadlines/timeout_is_kept",
        "close/pending_calls_end_with_the_client",
        "reconnect/severed_calls_keep_their_deadline",
    ],
    /// A request is sent although it was withdrawn.
    SendsWithdrawn => ["leaks/dropped_call_is_not_sent_later", "reconnect/blocked_requests_are_not_sent_late"],

    /// A request that was taken without a future is sent although it was withdrawn.
    PostsWithdrawn => ["leaks/dropped_call_is_not_sent_later"],

    // Deadlines and responders.

    /// A request lives a hundred times as long as its caller waits.
    StretchesBudgets => [
        "deadlines/expired_request_never_starts",
        "deadlines/deadline_is_never_early",
        "deadlines/nested_call_inherits_what_is_left",
        "deadlines/handler_is_cancelled_at_the_deadline",
        "leaks/timed_out_calls_leave_nothing",
        "leaks/unserved_requests_go_by_themselves",
    ],
    /// A request lives half as long as its caller waits.
    HalvesBudgets => ["deadlines/deadline_is_never_early", "deadlines/clock_starts_at_first_poll"],
    /// The time that a request waits for its connection does not come off its budget.
    ForgetsTheWait => ["deadlines/waiting_to_be_sent_counts"],
    /// What is left of a deadline is judged by this host's wall clock.
    JudgesByWallClock => ["deadlines/clock_ahead_changes_nothing", "deadlines/clock_behind_changes_nothing"],
    /// A budget of less than 2 ms is refused.
    RefusesShortBudgets => ["deadlines/tiny_timeout_is_kept"],
    /// Every request wants a responder.
    AlwaysExpectsResponder =>
        ["no_responder/late_server_serves_the_call", "no_responder/call_waits_until_its_deadline", "cancel/cancelled_while_queued", "cancel/pickup_timeout_is_no"],
    /// No request gets to know that there is no responder.
    NeverSaysNoResponder => ["no_responder/expect_responder_fails_fast", "drain/asked_meanwhile_is_not_heard"],
    /// What became of a request that was taken without a future is told to nobody.
    HidesFailedPosts => ["no_responder/expect_responder_fails_fast", "no_responder/stopped_server_is_none"],
    /// Whoever was served once is thought to be served for ever.
    RemembersResponders => ["no_responder/stopped_server_is_none"],
    /// A request that was refused for want of a responder is left in the queue.
    EnqueuesRefused => ["no_responder/expect_responder_leaves_no_request"],
    /// No responder is ever seen.
    SeesNoResponder => ["no_responder/expect_responder_is_served"],

    // Replies.

    /// Replies never arrive.
    DropsReplies => ["round_trip/typed", "payload/undecodable_reply_fails_its_call_only", "channels/unacknowledged_comes_again", "channels/window_holds_the_sender", "channels/faults_are_results"],
    /// The oldest request gets the first reply, whosever it is.
    AnswersInOrder => ["correlation/out_of_order_replies"],
    /// A reply that does not settle a delivery is lost.
    LosesBareReplies => [
        "correlation/duplicate_reply_is_counted",
        "correlation/late_reply_is_counted",
        "correlation/unknown_reply_is_counted",
    ],
    /// All inboxes have the address of the first.
    SharesAddresses => ["correlation/own_and_other_clients_are_apart", "channels/channels_do_not_mix"],
    /// Faults lose their details and whether to retry.
    LosesDetails => ["faults/handlers_fault_arrives_whole", "faults/oversized_fault_details_are_cut"],
    /// All faults have one code.
    BlursFaults => [
        "faults/panic_is_internal",
        "faults/undecodable_input_is_refused",
        "faults/unknown_method_is_refused",
        "faults/oversized_fault_details_are_cut",
    ],
    /// Every fault says that it may have been executed.
    SaysMaybe => ["faults/handlers_fault_arrives_whole", "faults/undecodable_input_is_refused"],
    /// A request that ends in a fault keeps its place in the server's hands.
    LeaksSlots => ["faults/slots_survive_faults"],
    /// A reply over 64 KiB ends the inbox.
    BadReplyEndsInbox => ["payload/reply_over_the_clients_limit_fails_its_call_only"],

    // Servers.

    /// A subscription never holds more than 100 deliveries.
    CapsPrefetch => ["round_trip/thousand_calls_at_once"],
    /// A subscription holds as much as there is.
    IgnoresPrefetch =>
        ["competing/handlers_never_exceed_prefetch", "competing/deliveries_never_exceed_prefetch", "cancel/pickup_times_out_behind_a_busy_server"],
    /// The first subscriber of a service gets everything.
    FavoursTheFirst => ["competing/two_servers_share_fairly"],
    /// A delivery is settled when it is received.
    SettlesEarly => [
        "redelivery/killed_server_loses_nothing",
        "redelivery/stopped_process_loses_nothing",
        "redelivery/many_in_hand_survive_a_kill",
        "close/unsettled_goes_back",
    ],
    /// A delivery that is dropped is settled.
    SettlesOnDrop => [
        "redelivery/dropped_delivery_is_delivered_again",
        "redelivery/reply_before_settling_is_a_duplicate",
        "close/shutdown_is_bounded",
    ],
    /// A reply is sent, and its request never settled.
    NeverSettles => ["redelivery/settled_is_not_delivered_again"],
    /// Every attempt is the first.
    ForgetsAttempts => [
        "faults/refusal_of_a_repeat_may_have_run",
        "redelivery/killed_server_loses_nothing",
        "redelivery/poison_is_dead_lettered",
        "redelivery/poison_costs_no_neighbour",
        "close/shutdown_is_bounded",
    ],
    /// A release counts as an attempt.
    CountsReleases => ["redelivery/released_is_not_counted", "offers/unheard_offer_goes_back"],
    /// Dead letters are thrown away.
    BuriesNothing => ["redelivery/poison_is_dead_lettered", "faults/refused_notify_is_dead_lettered"],
    /// The reply goes out before the lease is looked at.
    RepliesUnfenced => ["redelivery/lost_lease_cannot_reply"],
    /// Exclusive subscriptions are shared.
    SharesExclusives => [
        "exclusive/second_is_refused",
        "exclusive/mixing_is_detected",
        "exclusive/one_of_many_gets_in",
        "exclusive/former_owner_stays_out",
        "standby/standby_waits_and_takes_over",
        "standby/one_of_many_takes_over",
        "standby/newcomer_takes_over",
        "standby/newcomer_waits_for_what_runs",
        "standby/standby_has_all_or_none",
        "standby/standby_waits_for_a_drain",
    ],
    /// Who owned a service once owns it for ever.
    OwnsForEver => [
        "exclusive/next_gets_in_after_a_stop",
        "exclusive/next_gets_in_after_a_close",
        "exclusive/next_gets_in_after_a_kill", "standby/standby_takes_over_after_a_kill", "standby/standby_stops_while_it_waits",
        "standby/standby_owns_a_second_time",
        "standby/standby_answers_for_nobody",
    ],

    /// An owner that lives keeps its service, whoever would take over.
    FencesOffNobody => [
        "standby/newcomer_fences_off_a_deaf_owner",
        "standby/newcomer_fences_off_nobody_who_hears",
    ],

    // Ends.

    /// An inbox that is dropped stays on the broker.
    LeaksInboxes => [
        "leaks/timed_out_calls_leave_nothing",
        "leaks/dropped_calls_leave_nothing",
        "leaks/answered_calls_leave_nothing",
        "leaks/dropped_inbox_is_removed",
        "leaks/killed_client_leaves_nothing",
        "leaks/vanished_caller_costs_nothing",
        "channels/dropped_results_release_everything",
    ],
    /// The connection is closed with the first inbox.
    ClosesWithItsInbox => ["close/closed_client_refuses_calls"],
    /// A send after close says that all is well.
    SendsAfterClose => ["close/closed_transport_refuses_everything"],
    /// What waits at an inbox or subscription waits for ever after close.
    HangsAfterClose => ["close/pending_calls_end_with_the_transport", "close/close_is_idempotent"],
    /// The second close never ends.
    HangsOnSecondClose => ["close/close_is_idempotent"],
    /// What is taken and not yet received is settled by a stop.
    StopLosesRequests => ["close/stop_gives_back_uncounted", "close/nothing_is_lost_around_a_shutdown"],
    /// A stop closes the connection.
    StopCloses => ["close/drain_finishes_handlers_that_call", "close/run_until_waits_for_what_runs"],

    // Connections.

    /// After a cut, what is sent waits for ever.
    StaysDown => [
        "reconnect/idle_client_heals",
        "reconnect/pending_calls_end_and_new_ones_succeed",
        "reconnect/calls_wait_for_the_connection",
        "reconnect/broker_restart_is_survived",
    ],
    /// After a cut, nothing arrives at the inbox, and nobody is told.
    LosesItsInbox =>
        ["reconnect/pending_calls_end_and_new_ones_succeed", "reconnect/reply_finds_the_restored_inbox"],
    /// A cut ends the subscriptions.
    GivesUp => [
        "exclusive/owner_survives_a_cut",
        "reconnect/server_heals",
        "reconnect/server_heals_with_work_in_hand", "clutch/finished_replies_are_sent_later",
        "clutch/expired_replies_are_not_sent",
    ],
    /// The state says that all is well, always.
    HidesItsState => ["reconnect/state_tells", "clutch/engagement_is_shown", "clutch/it_gives_up_as_told", "clutch/it_stops_as_told"],

    // What is said besides.

    /// A broadcast reaches nobody, and says so.
    BroadcastsToNobody => [
        "nodes/all_answer",
        "nodes/ping_info_and_stats",
        "cancel/dropped_call_cancels_its_handler",
        "cancel/closed_client_cancels_its_handlers",
        "nodes/enough_is_enough",
        "nodes/asked_in_a_burst",
        "cancel/cancelled_while_running",
        "drain/asked_before_is_answered",
        "drain/given_up_meanwhile_is_told",
        "reconnect/gathering_is_whole_or_lost",
    ],
    /// That requests were given up is told to nobody.
    LosesGivingUp => [
        "nodes/dropped_gathering_cancels_its_handlers",
        "nodes/enough_cancels_the_others",
        "cancel/dropped_call_cancels_its_handler",
        "cancel/closed_client_cancels_its_handlers",
        "cancel/cancelled_while_running",
        "channels/dropped_results_release_everything",
        "channels/many_are_no_more_than_wanted",
    ],
    /// A broadcast counts one server more than there are.
    MiscountsBroadcasts => ["nodes/all_answer", "nodes/nobody_is_there_to_ask", "nodes/stopped_node_is_not_asked", "nodes/slow_answer_counts_once"],
    /// After a cut, what is broadcast does not arrive any more.
    ForgetsJoins => ["nodes/asked_after_a_cut"],
    /// Replies lose the name of who sent them.
    LosesReplyNodes => ["nodes/all_answer", "nodes/faults_are_answers", "reconnect/gathering_is_whole_or_lost"],
    /// Signals do not arrive.
    LosesSignals => [
        "nodes/silent_node_is_named",
        "long_calls/running_is_told",
        "long_calls/progress_arrives_in_order",
        "long_calls/lost_server_is_told",
        "cancel/pickup_is_in_time", "long_calls/progress_of_a_quick_handler_arrives", "long_calls/taken_over_is_not_lost"
    , "offers/only_who_waits_accepts"],
    /// Signals are taken for replies.
    TakesSignalsForReplies => ["long_calls/progress_arrives_in_order", "long_calls/slow_handler_is_not_lost"],
    /// The broker says of every request that it runs.
    InventsSignals => ["long_calls/fast_calls_are_told_nothing"],
    /// Every request seems to come from a plain peer.
    ForgetsSignals => ["long_calls/running_is_told", "cancel/vanished_caller_cancels_its_handler"],
    /// A withdrawn request stays in its queue.
    WithdrawsNothing => ["cancel/given_up_is_withdrawn", "cancel/given_up_is_not_started", "cancel/many_are_given_up_at_once", "given_up/dropped_before_a_server_starts", "given_up/cancelled_before_a_server_starts", "given_up/dropped_before_a_node_starts"],
    /// A reply to an inbox that is gone says that all is well.
    HidesGoneInboxes => ["cancel/vanished_caller_cancels_its_handler"],
}
