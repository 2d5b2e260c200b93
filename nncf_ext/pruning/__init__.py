"""Greedy, training-free structured pruning: which part of a model is missed least?"""
