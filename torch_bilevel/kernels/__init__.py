"""Triton kernels, and nothing but kernels: what each computes stands in `reference`, in PyTorch."""
