"""A checkpoint in the format of other software, held against PyTorch before it counts as done."""
