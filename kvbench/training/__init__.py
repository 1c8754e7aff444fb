"""Training of the base model and of adapters."""
