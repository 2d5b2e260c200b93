"""What `05_real_model.py` is made of: ways to compress one model, the engines that run them, and what is measured."""
