"""States of a batch: rows join and leave; what was read before is found again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpmv.serving.states import Batch, PrefixMemory, of_cache


def states(length, name):
    """Two layers whose numbers tell row and token."""
    values = 1000.0 * name + torch.arange(1, length + 1.0)
    part = values[None, None, :, None].expand(1, 2, length, 3)
    return [(part.clone(), part.clone() + 0.5), (part.clone() + 0.25, part.clone() + 0.75)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.just("leave"), st.just("write")), max_size=14), st.randoms())
def test_rows_keep_their_states_whoever_joins_leaves_or_is_written(steps, random):
    batch, rows = Batch(), []  # (name, length)
    for name, step in enumerate(steps):
        if step == "leave" and rows:
            place = random.randrange(len(rows))
            number, length = rows.pop(place)
            for (keys, values), (expected, others) in zip(batch.leave(place), states(length, number), strict=True):
                assert torch.equal(keys, expected) and torch.equal(values, others)
        elif step == "write" and rows:
            inputs = batch.inputs([0] * len(rows), "cpu")
            for row, (_, length) in enumerate(rows):
                assert inputs["attention_mask"][row].sum() == length + 1
                assert inputs["position_ids"][row].item() == length
            new = [states(length + 1, number) for number, length in rows]
            for layer in range(2):
                inputs["cache"].update(
                    *(torch.cat([each[layer][kind][:, :, -1:] for each in new]) for kind in (0, 1)), layer
                )
            rows = [(number, length + 1) for number, length in rows]
        elif isinstance(step, int):
            batch.join(states(step, name), step)
            rows.append((name, step))
        assert batch.lengths == [length for _, length in rows]
        if rows:
            assert of_cache(batch.cache)[0][0].shape == (len(rows), 2, batch.width, 3)


def test_the_longest_common_beginning_is_found_but_never_the_whole_prompt():
    memory = PrefixMemory(1)
    memory.keep([1, 2, 3], states(3, 1), [])
    memory.keep([1, 5, 6, 7], states(4, 2), [])
    assert memory.find([9, 9]) == ([], 0)
    for keys, length, name in [([1, 2, 3, 4], 3, 1), ([1, 5, 6], 2, 2), ([1, 2, 3], 2, 1)]:
        found, common = memory.find(keys)
        assert common == length
        assert torch.equal(found[0][0], states(length, name)[0][0])


def test_what_was_asked_for_longest_ago_is_forgotten_first():
    size = sum(part.nbytes for layer in states(10, 0) for part in layer)
    memory = PrefixMemory(2.5 * size / 1e6)
    for name in (1, 2):
        memory.keep([name] * 10, states(10, name), [])
    memory.find([1, 1])
    memory.keep([3] * 10, states(10, 3), [])
    assert [memory.find([name] * 10)[1] for name in (1, 2, 3)] == [9, 0, 9]
    assert memory.bytes == 2 * size


def test_what_goes_on_from_a_conversation_takes_its_place():
    memory = PrefixMemory(1)
    memory.keep([1, 2], states(2, 1), [])
    size = memory.bytes
    memory.keep([1, 2, 3, 4], states(4, 1), [])
    assert memory.bytes == 2 * size
