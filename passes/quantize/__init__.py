"""Weights and activations become codes; what that costs in bits."""
