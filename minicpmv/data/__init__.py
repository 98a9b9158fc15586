"""Data: synthetic tasks that the repository draws itself, and batches for training."""
