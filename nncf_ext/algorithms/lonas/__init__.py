"""The method: ranks of adapters and widths of their base, elastic together (LoNAS)."""
