"""What samples/07_bootstrap_nas.py is made of: digits, a small residual network, ways to make it smaller."""
