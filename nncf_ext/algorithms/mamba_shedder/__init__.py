"""Mamba-Shedder: removal of Mamba blocks and state spaces, and of attention and MLPs in hybrids."""
