"""What a model is made of, and how to make it smaller for real."""
