"""Real pretrained models that packages of the ordinary Python index carry, as ordinary Hugging Face folders."""
