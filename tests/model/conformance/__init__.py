"""The test classes of transformers, run on this model, its configuration and its processor."""
