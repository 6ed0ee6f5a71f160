"""Hadamard matrices: which orders there are, and fast products with them."""
