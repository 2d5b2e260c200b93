"""Weights with zeros: magnitude, Wanda, SparseGPT; and mask-preserving GPTQ to put the rest on an INT4 grid."""
