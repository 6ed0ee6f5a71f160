"""Codes to values of a table: `lookup`."""
