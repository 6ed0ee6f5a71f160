"""Rewrites of programs, one pass per file; `infra` runs them."""
