"""Low-rank adapters whose ranks can be changed after training (NLS, as in LoNAS, Shears and SQFT)."""
