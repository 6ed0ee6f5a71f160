"""Equivalent transforms: values for sites, and their way into the weights."""
