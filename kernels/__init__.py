"""Kernels: one operation a file (reference, Triton, wrapper)."""
