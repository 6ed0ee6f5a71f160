"""Values to integer codes: `dynamic_scale` and `quantize`."""
