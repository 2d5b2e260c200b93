"""Adapters that can be merged without losing a zero or leaving the INT4 grid (SparsePEFT and QA-SparsePEFT of SQFT)."""
