"""Smaller checkpoints: what can be cut, what it costs, and the surgery. `minicpmv train distill` wins back what was lost."""
