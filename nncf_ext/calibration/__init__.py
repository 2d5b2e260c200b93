"""Activations of a model, layer by layer at bounded memory, and what is accumulated from them."""
