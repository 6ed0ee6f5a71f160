"""Linear layers and embeddings over packed integer weights, as the `cuda` target runs them."""

LAYOUT_VERSION = 1
"""Of the packed codes that `qcompile.kernels.quantized_linear.layout` describes."""
