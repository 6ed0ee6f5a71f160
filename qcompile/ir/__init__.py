"""The intermediate representation: programs, the `qc::` dialect, weights, interpretation."""
