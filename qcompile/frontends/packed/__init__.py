"""Layouts of packed weights, as other tools write them: found, checked, decoded."""
