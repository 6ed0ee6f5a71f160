"""Values to small floats: `float_scale` and `quantize_float`."""
