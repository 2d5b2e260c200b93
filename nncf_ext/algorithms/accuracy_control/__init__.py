"""As small or as fast as possible within a loss: forms of weights as dimensions of a search."""
