"""Activations, plain and gated."""
