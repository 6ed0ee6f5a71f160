"""Growing a cache."""
