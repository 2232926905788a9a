"""Training: the parts of the one loop."""
