//! Request/reply over message brokers.
