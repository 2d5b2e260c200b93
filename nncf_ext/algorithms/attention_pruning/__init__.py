"""How much of the keys and values of each layer attention can do without, within a loss."""
