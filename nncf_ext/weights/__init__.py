"""How a weight is stored: on the INT4 grid in NNCF's own form, and what compression noted about it."""
