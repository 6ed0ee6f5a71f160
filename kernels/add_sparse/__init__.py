"""A few numbers per row, added to a matrix."""
