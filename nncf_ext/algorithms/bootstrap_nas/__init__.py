"""The method: a super-network made of any trained model (BootstrapNAS)."""
