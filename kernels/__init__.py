"""The kernels: for each operator its reference, and its implementations per target."""
