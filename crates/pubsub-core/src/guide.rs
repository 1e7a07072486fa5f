//! The contract in numbered clauses.
