"""Files that travel with saved weights. They import torch and transformers only, and each other relatively."""
