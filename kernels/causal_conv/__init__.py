"""Convolution of each channel with its own past."""
