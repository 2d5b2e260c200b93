"""What samples/12_eznas.py is made of: data, three spaces of small networks, their training."""
