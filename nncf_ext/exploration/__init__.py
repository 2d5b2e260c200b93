"""Search over points of a space: sees points and callables, never a model."""
