"""From models to programs: one module per kind of source."""
