"""What is kept of a conversation for language models in other software."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.runtimes.language_model import GrowingLayer


KINDS = st.sampled_from(["add", "add", "add", "fork", "crop", "reorder"])
STEPS = st.lists(st.tuples(st.integers(0, 1), KINDS, st.integers(1, 120)), min_size=10, max_size=30)


@given(STEPS)
def test_conversations_that_fork_are_cropped_and_go_on_hold_each_their_own(steps):
    """As lists of numbers would, wherever the memory lies."""
    layers, expected, fresh = [GrowingLayer()], [[[], []]], 0.0
    for which, what, count in steps:
        place = which % len(layers)
        layer, rows = layers[place], expected[place]
        if what == "add":
            new = torch.arange(fresh, fresh + 2 * count).view(2, 1, count, 1)
            fresh += 2 * count
            layer.update(new.long(), new.expand(-1, -1, -1, 3).clone())
            expected[place] = [row + part for row, part in zip(rows, new[:, 0, :, 0].tolist(), strict=True)]
        elif what == "fork":
            layers.append(copy.copy(layer))
            expected.append(rows)
        elif rows[0] and what == "crop":
            layer.crop(-min(count, len(rows[0])))
            expected[place] = [row[: -min(count, len(row))] for row in rows]
        elif rows[0]:
            layer.reorder_cache(torch.tensor([1, 0]))
            expected[place] = rows[::-1]
    for layer, rows in zip(layers, expected, strict=True):
        if rows[0]:
            assert layer.keys[:, 0, :, 0].tolist() == rows
            assert (layer.values == layer.keys).all()


def test_a_token_copies_no_row_before_it():
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 100, 1), torch.zeros(1, 1, 100, 8))
    layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 8))
    places = set()
    for _ in range(20):
        _, rows = layer.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 8))
        places.add(rows.data_ptr())
    assert len(places) == 1 and rows.shape == (1, 1, 121, 8) and rows.sum() == 160
