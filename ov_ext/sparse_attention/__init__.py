"""Sparse attention in an IR: find stateful attention, replace it by our operation, restore the stock IR."""
