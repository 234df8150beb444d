"""Fused operators: the public functions, the choice of kernel, and the plain-PyTorch references."""
