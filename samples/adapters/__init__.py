"""What samples/02_sqft.py is made of: two tasks, training, scoring, and the published pipelines as functions."""
