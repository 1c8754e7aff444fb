"""What other programs call: compression around a model's own ``generate``."""
