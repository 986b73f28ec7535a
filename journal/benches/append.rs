//! Durable append and fold rate; filled in below.
fn main() {}
