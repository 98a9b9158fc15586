"""The synthetic tasks: seeded, disjoint between splits, and labelled as they are drawn."""

import random

import numpy as np
import pytest
from PIL import Image

from minicpmv.data.drawing import COLOR_CLASSES, COLORS, KIND_CLASSES, Drawing, add_shape, add_text, patch_labels
from minicpmv.data.synthetic import (
    PHRASES,
    SPLITS,
    WORDS,
    Mixture,
    UnknownSplitError,
    make_sample,
    sample_rng,
    split_of_text,
    stream,
)


EVERYTHING = Mixture(text=0.35, video=0.3, sliced=0.3)


def fingerprint(sample):
    pixels = [np.asarray(image).tobytes() for image in sample.images]
    return pixels, [(turn.question, turn.answer) for turn in sample.turns], sample.temporal_ids, sample.max_slice_nums


def test_a_sample_depends_on_split_seed_and_index_alone():
    for index in range(20):
        assert fingerprint(make_sample("train", 3, index, EVERYTHING)) == fingerprint(
            make_sample("train", 3, index, EVERYTHING)
        )
    resumed = stream("train", 3, EVERYTHING, start=7)
    assert fingerprint(next(resumed)) == fingerprint(make_sample("train", 3, 7, EVERYTHING))


def test_other_splits_seeds_and_indices_give_other_random_states():
    states = {
        sample_rng(split, seed, index).getrandbits(64) for split in SPLITS for seed in range(4) for index in range(50)
    }
    assert len(states) == len(SPLITS) * 4 * 50


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(UnknownSplitError, match="'holdout' is none of train, validation, test"):
        sample_rng("holdout", 0, 0)


def test_a_long_text_is_drawn_in_one_split_only():
    only_text = Mixture(text=1.0, video=0.0, sliced=0.0)
    for split in SPLITS:
        for index in range(80):
            sample = make_sample(split, 0, index, only_text)
            text = "".join(thing.kind for thing in sample.drawings[0].things)
            assert len(text) < 3 or split_of_text(text) == split
    assert {split_of_text(word) for word in WORDS} == set(SPLITS)


def test_questions_have_short_answers_that_the_scene_bears_out():
    seen = set()
    for index in range(300):
        sample = make_sample("train", 0, index, EVERYTHING)
        things = sample.drawings[0].things
        for turn in sample.turns:
            seen.add(turn.task)
            assert turn.question and turn.answer == turn.answer.strip() and len(turn.answer) <= 100
            if turn.task in ("number", "word", "text"):
                assert turn.answer == "".join(thing.kind for thing in things)
            if turn.task == "count" and turn.question in [phrase.format("shape") for phrase in PHRASES["count"]]:
                assert turn.answer == str(len(things))
    assert seen == set(PHRASES)


def test_clips_are_packed_in_order_of_time():
    clips = [make_sample("train", 0, i, Mixture(text=0, video=1)) for i in range(40)]
    for clip in clips:
        times = [time for group in clip.temporal_ids for time in group]
        assert len(times) == len(clip.images) and times == sorted(times) and min(times) >= 0
        assert len({image.size for image in clip.images}) == 1
    assert {len(clip.temporal_ids[0]) for clip in clips} >= {1, 2, 3}


def blank(width, height):
    return Drawing(Image.new("RGB", (width, height), (230, 230, 230)), Image.new("L", (width, height), 0))


def test_patch_labels_name_what_lies_under_each_patch():
    drawing = blank(112, 56)
    add_shape(drawing, "square", "red", (28, 28), 20, COLORS["red"])
    add_shape(drawing, "circle", "blue", (84, 28), 20, COLORS["blue"])
    kinds, colors = patch_labels(drawing, (0, 0, 112, 56), (4, 8))
    kinds, colors = kinds.reshape(4, 8), colors.reshape(4, 8)
    assert KIND_CLASSES[kinds[1, 1]] == "square" and COLOR_CLASSES[colors[1, 1]] == "red"
    assert KIND_CLASSES[kinds[2, 5]] == "circle" and COLOR_CLASSES[colors[2, 6]] == "blue"
    assert kinds[0, 4] == 0 and colors[3, 4] == 0  # between the two
    assert set(kinds[:, :4].ravel()) <= {0, -100, KIND_CLASSES.index("square")}


def test_patch_labels_of_a_slice_are_those_of_its_part_of_the_picture():
    drawing = blank(112, 112)
    add_shape(drawing, "star", "green", (84, 28), 24, COLORS["green"])
    upper_right, _ = patch_labels(drawing, (56, 0, 112, 56), (8, 8))
    lower_left, _ = patch_labels(drawing, (0, 56, 56, 112), (8, 8))
    assert KIND_CLASSES.index("star") in upper_right
    assert not lower_left.any()


def test_each_character_has_labels_of_its_own():
    drawing = blank(112, 56)
    add_text(drawing, "A7", "neutral", (10, 0), 44, True, (0, 0, 0))
    kinds, _ = patch_labels(drawing, (0, 0, 112, 56), (4, 8))
    assert {KIND_CLASSES.index("A"), KIND_CLASSES.index("7")} <= set(kinds)
    assert set(np.unique(np.asarray(drawing.object_map))) == {0, 1, 2}


def test_dense_labels_agree_with_the_colors_of_the_pixels():
    """Patches that a thing covers almost whole have the color their label names (clips: no jitter, no grain)."""
    checked = 0
    for index in range(60):
        for drawing in make_sample("train", 1, index, Mixture(text=0, video=1)).drawings:
            width, height = drawing.image.size[0] // 14 * 14, drawing.image.size[1] // 14 * 14
            _, colors = patch_labels(drawing, (0, 0, width, height), (height // 14, width // 14))
            pixels = np.asarray(drawing.image)[:height, :width].reshape(height // 14, 14, width // 14, 14, 3)
            pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(-1, 196, 3)
            for color, patch in zip(colors, pixels, strict=True):
                if color > 0:
                    assert (patch == COLORS[COLOR_CLASSES[color]]).all(-1).mean() >= 0.05
                    checked += 1
    assert checked > 100


def test_the_random_module_is_left_alone():
    random.seed(0)
    before = random.getstate()
    make_sample("train", 0, 0, EVERYTHING)
    assert random.getstate() == before
