"""Scores of weights: tensor in, tensor out. No model, no loop over layers."""
