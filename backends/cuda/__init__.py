"""NVIDIA GPUs: the fx program with Triton kernels."""
