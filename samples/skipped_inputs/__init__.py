"""What sample 09 is made of: ways to leave out inputs of MLPs, and what is lost, in decoders and encoders."""
