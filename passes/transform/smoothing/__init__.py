"""Scales that move difficulty from activations to weights: which places there are, which values."""
