//! The contract in numbered clauses, how an event travels, and how to write a backend.

/// The numbers of all clauses of the [`contract`], in its order: whatever checks that each clause is tested pairs with these.
pub const CLAUSES: &[&str] = &[
    "P1", "P2", "P3", "P4", "P5", "P6", "P7", // publish
    "B1", "B2", "B3", "B4", "B5", "B6", "B7", // subscribe
    "S1", "S2", "S3", "S4", "S5", "S6", "S7", // settle
    "T1", "T2", // batch
    "R1", "R2", "R3", "R4", "R5", "R6", // replay
    "C1", "C2", "C3", "C4", // close
    "N1", // connect
    "L1", "L2", "L3", "L4", // leases
    "K1", // capabilities
    "I1", // inline
];

/// What every bus promises: the numbered clauses.
pub mod contract {
    #![doc = include_str!("guide/contract.md")]
}

/// How an event travels: publish, queue, delivery, settlement, retry, dead letter.
pub mod delivery {
    #![doc = include_str!("guide/delivery.md")]
}

/// How to write a backend: obligations, machinery, the suite, and a complete small one.
pub mod backends {
    #![doc = include_str!("guide/backends.md")]
}

#[cfg(test)]
mod tests {
    use super::CLAUSES;

    #[test]
    fn the_list_of_clauses_is_that_of_the_text() {
        let text = include_str!("guide/contract.md");
        let numbers = text.lines().filter_map(|line| line.strip_prefix("**")?.split_once("** ")).map(|(number, _)| number);
        assert_eq!(numbers.collect::<Vec<_>>(), CLAUSES);
    }
}
