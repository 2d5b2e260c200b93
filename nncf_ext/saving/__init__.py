"""Compressed models as folders."""
