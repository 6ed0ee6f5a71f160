"""Recurrences that are linear in a matrix: linear attention, delta rules, state spaces."""
