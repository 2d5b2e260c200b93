"""Parts of ``samples/train_tiny_lm.py``: the text it learns from and the n-gram model it has to beat."""
