"""What `03_multipruner.py` and `04_mamba_shedder.py` share: text, scoring, recovery, tables and pictures."""
