"""Fused operators: the public function, the choice of kernel, and the plain-PyTorch truth beside it."""
