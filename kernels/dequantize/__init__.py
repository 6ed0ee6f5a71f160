"""Integer codes to values: `dequantize`."""
