"""Kernels: the arithmetic of a training step in few launches, each beside its plain torch form.

Triton runs where a tensor is on a GPU, and in its interpreter in tests; the plain form elsewhere.
"""
