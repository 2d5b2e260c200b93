"""Activation sparsity: inputs of linear layers that are near a centre count as the centre."""
