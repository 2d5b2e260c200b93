"""Sparse weights in an IR: find them, decide by a cost model which ones to pack, pack them, restore the stock IR."""
