"""Values to 8-bit floats: `float8_scale` and `quantize_float8`."""
