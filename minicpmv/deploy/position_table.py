"""Which row of the tower's position table each patch of a side reads, for software that cannot ask the model."""

import sys
from typing import Any

import numpy as np


def buckets_of(tower: Any, longest: int) -> np.ndarray:
    """uint8 [longest + 1, longest]: line n holds the n rows that a side of n patches reads.

    Args:
        tower: the model's own.
    """
    # The model's own code is no package to import.
    own_buckets = sys.modules[type(tower).__module__].position_buckets
    table = np.zeros((longest + 1, longest), np.uint8)
    for count in range(1, longest + 1):
        table[count, :count] = own_buckets(count, tower.embeddings.num_patches_per_side)
    return table
