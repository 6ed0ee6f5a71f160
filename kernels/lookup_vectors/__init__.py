"""Codes to vectors of a codebook: `lookup_vectors`."""
