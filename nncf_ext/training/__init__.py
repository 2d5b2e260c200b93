"""Training of compressed models by somebody else's trainer: losses and callbacks."""
