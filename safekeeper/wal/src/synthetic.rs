//! WAL made to order, for tests.
