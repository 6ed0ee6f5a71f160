"""Equivalent transforms as an operator."""
