"""Conversations for training: rows of many formats, and batches of them."""
