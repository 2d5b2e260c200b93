"""Training-free removal of blocks, MLP channels and heads."""
