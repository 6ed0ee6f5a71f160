"""Steps of lowering that several targets share."""
