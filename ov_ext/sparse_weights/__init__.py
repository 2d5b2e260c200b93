"""Sparse weights in an IR: found, judged by a cost model, packed into one operation, and restored exactly."""
