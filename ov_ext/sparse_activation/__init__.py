"""Layers that leave out small inputs: SparseActivationMatMul in place of their pattern, and back."""
