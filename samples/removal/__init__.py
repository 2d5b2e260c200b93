"""What `03_multipruner.py` and `04_mamba_shedder.py` share: their text, models that are kept, and recovery."""
