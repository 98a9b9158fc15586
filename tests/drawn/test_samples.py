"""The synthetic tasks: seeded, disjoint between splits, and labelled as they are drawn."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from PIL import Image

from minicpmv.apps import clips, grounding
from minicpmv.apps.documents.prompts import SUMMARY_LENGTHS, Prompts
from minicpmv.apps.documents.reader import REGION_KINDS
from minicpmv.apps.documents.tables import find_tables
from minicpmv.apps.grounding import parse_boxes
from minicpmv.drawn import prompts
from minicpmv.drawn.drawing import (
    BOX_BINS,
    COLOR_CLASSES,
    COLORS,
    KIND_CLASSES,
    Drawing,
    Print,
    add_shape,
    add_text,
    patch_labels,
)
from minicpmv.drawn.photos import SEEN, UNSEEN, photo
from minicpmv.drawn.samples import (
    BENCH_TASKS,
    SPLITS,
    Mixture,
    SampleError,
    bench_sample,
    make_sample,
    named_objects,
    sample_rng,
)
from minicpmv.drawn.scenes import split_of_text
from minicpmv.drawn.stream import conversation_row
from minicpmv.drawn.wording import CHINESE, ENGLISH, WORDINGS


EVERYTHING = Mixture(sliced=0.3)


def fingerprint(sample):
    pixels = [np.asarray(image).tobytes() for image in sample.images]
    return pixels, sample.turns, sample.temporal_ids, sample.max_slice_nums, sample.shown, sample.labels, sample.system


def printed(sample):
    """What is written in the picture, in order of drawing."""
    return "".join(thing.kind for drawing in sample.drawings for thing in drawing.things if len(thing.kind) == 1)


DIGEST = """
import hashlib
from minicpmv.drawn.samples import BENCH_TASKS, Mixture, bench_sample, make_sample
samples = [make_sample("train", 3, index, Mixture(sliced=0.5, thinking=0.5)) for index in (7, *range(20))]
samples += [bench_sample(task, index=1) for task in BENCH_TASKS]
said = repr([(sample.turns, sample.temporal_ids, sample.max_slice_nums) for sample in samples]).encode()
print(hashlib.sha256(said + b"".join(image.tobytes() for sample in samples for image in sample.images)).hexdigest())
"""


def test_a_sample_depends_on_split_seed_and_index_alone():
    """Not on what was drawn before it, nor on the order of sets and the hashes of texts, which differ between processes."""
    whole = fingerprint(make_sample("train", 3, 7, EVERYTHING))
    make_sample("train", 3, 8, EVERYTHING)
    assert fingerprint(make_sample("train", 3, 7, EVERYTHING)) == whole
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", DIGEST]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_other_splits_seeds_and_indices_give_other_random_states():
    states = {
        sample_rng(split, seed, index).getrandbits(64) for split in SPLITS for seed in range(4) for index in range(50)
    }
    assert len(states) == len(SPLITS) * 4 * 50


def test_an_unknown_split_or_task_is_refused_by_name():
    with pytest.raises(SampleError, match="'holdout' is none of train, validation, test"):
        sample_rng("holdout", 0, 0)
    with pytest.raises(SampleError, match="'color' in 'en' is none of printed_line"):
        bench_sample("color")


@pytest.mark.parametrize("scene", ["line", "lower", "sum"])
def test_a_long_text_is_drawn_in_one_split_only(scene):
    mixture = Mixture(scenes={scene: 1})
    for split in SPLITS:
        for index in range(60):
            text = printed(make_sample(split, 0, index, mixture))
            assert len(text) < 3 or scene == "sum" or split_of_text(text) == split


@pytest.mark.parametrize("task", ["form_value", "fine_print"])
def test_values_of_forms_belong_to_one_split(task):
    for split in SPLITS:
        for index in range(15):
            value = bench_sample(task, split, 0, index).turns[0].answer
            assert len(value) < 3 or split_of_text(value) == split


def test_questions_have_answers_that_the_scene_bears_out():
    seen = set()
    for index in range(1600):
        sample = make_sample("train", 0, index, EVERYTHING)
        things = sample.drawings[0].things
        if not things and sample.temporal_ids is None:
            refusals = {ENGLISH.refusal, CHINESE.refusal}
            assert {turn.answer for turn in sample.turns} <= refusals
            seen |= {turn.task for turn in sample.turns}
            continue
        for turn in sample.turns:
            seen.add(turn.task)
            assert turn.question and turn.answer == turn.answer.strip() and len(turn.answer) <= 200
            if turn.task == "printed_line":
                assert "".join(turn.answer.split()) == printed(sample)
            if turn.task == "form_value":
                assert f":{turn.answer}" in printed(sample)
            if turn.task == "caption" and sample.objects:
                assert sorted(named_objects(turn.answer, sample.language)) == sorted(sample.objects)
            elif turn.task == "caption":  # of a chart: every bar, and on its axis the numbers 3, 6, 9
                bars = [part.split() for part in turn.answer.replace("，", ",").split(",")]
                assert "369" + "".join(name for name, _ in bars) == printed(sample)
                assert all(1 <= int(value) <= 9 for _, value in bars)
            if turn.task == "count" and turn.question in [p.format("shape") for p in ENGLISH.phrases["count"]]:
                assert turn.answer == str(len(things))
            if turn.task == "absent_object" and sample.language == "en":
                names = {f"{thing.color} {thing.kind}" for thing in things} | {thing.kind for thing in things}
                asked = turn.question.rstrip("?").removesuffix(" in the picture").split(" a ")[-1].split(" an ")[-1]
                assert (asked in names) == (turn.answer == "yes")
            if turn.task == "repeated_object" and sample.language == "en":
                name, times = re.search(r" an? (\w+ \w+) at least (.*)\?", turn.question).groups()
                least = 2 if times == "twice" else int(times.split()[0])
                assert (sample.objects.count(name) >= least) == (turn.answer == "yes")
    assert seen == set(ENGLISH.phrases) == set(CHINESE.phrases)


def test_steps_of_a_thought_lead_to_the_answer():
    for index in range(40):
        sample = bench_sample("multistep", "train", 0, index)
        turn = sample.turns[0]
        for step in (line for line in turn.thought.splitlines() if "=" in line):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert turn.thought.splitlines()[-1].split("=")[-1] == turn.answer
        if turn.task == "multistep_sum":
            assert eval(printed(sample)) == int(turn.answer)


@settings(max_examples=40, deadline=None)
@given(task=st.sampled_from(sorted(BENCH_TASKS)), index=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_both_languages_ask_the_same_of_the_same_picture(task, index, seed):
    english, chinese = (bench_sample(task, "validation", seed, index, language) for language in WORDINGS)
    assert fingerprint(english)[0] == fingerprint(chinese)[0]
    assert english.turns[0].task == chinese.turns[0].task and len(english.turns) == len(chinese.turns) == 1
    assert english.temporal_ids == chinese.temporal_ids
    answers = english.turns[0].answer, chinese.turns[0].answer
    assert answers[0].isascii() and (answers[0] == answers[1] or not answers[1].isascii())
    assert english.labels == chinese.labels
    assert fingerprint(english) == fingerprint(bench_sample(task, "validation", seed, index))


def test_yes_and_no_and_all_counts_are_asked_for():
    answers = [bench_sample("absent_object", "test", 0, i).turns[0].answer for i in range(200)]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    pictures = (make_sample("train", 0, i, Mixture({"repeated": 1}, tasks=["repeated_object"])) for i in range(200))
    answers = [turn.answer in (ENGLISH.yes, CHINESE.yes) for picture in pictures for turn in picture.turns]
    assert 0.35 < sum(answers) / len(answers) < 0.65
    counts = [bench_sample("count", "test", 0, i).turns[0].answer for i in range(200)]
    assert set(counts) == set("123456") and counts.count("1") < 80
    flashes = [bench_sample("video_count", "test", 0, i).turns[0].answer for i in range(200)]
    assert all(50 < flashes.count(count) < 85 for count in "123")


def about(task, count, **mixture):
    """Samples with a question of a task, and that question."""
    for index in range(count):
        for scene in SCENES_OF[task]:
            sample = make_sample(
                "train", 4, index, Mixture({scene: 1}, tasks=[task], chinese=0, turns=(1, 1), **mixture)
            )
            yield sample, sample.turns[0]


SCENES_OF = {
    **dict.fromkeys(("grounding", "where"), ("shapes", "repeated")),
    **dict.fromkeys(("pair_which", "pair_more", "pair_same", "pair_count"), ("pair",)),
    **dict.fromkeys(("page_json", "page_question"), ("paper_form",)),
    **dict.fromkeys(("page_markdown", "page_text", "page_regions"), ("paper_form", "paper_table", "paper_words")),
    **{"mixed_same": ("mixed",), "clip_times": ("clip_times",), "page_language": ("paper_words",)},
}


@pytest.mark.parametrize("task", ["grounding", "where"])
def test_boxes_lie_around_what_is_drawn(task):
    for sample, turn in about(task, 40):
        name = turn.ref or turn.question.rstrip("?.").split("the ")[-1]
        drawing = sample.drawings[0]
        boxes, malformed = parse_boxes(turn.answer, *drawing.image.size)
        assert not malformed and len(boxes) == sample.objects.count(name)
        assert boxes or turn.answer == f"There is no {name}."
        for box in boxes:  # within two hundredths of a side
            slack = max(drawing.image.size) / 50
            found = False
            for number, thing in enumerate(drawing.things, 1):
                rows, columns = np.nonzero(np.asarray(drawing.object_map) == number)
                drawn = (columns.min(), rows.min(), columns.max(), rows.max())
                near = all(abs(one - other) <= slack for one, other in zip(box.corners, drawn, strict=True))
                found = found or (near and f"{thing.color} {thing.kind}" == name)
            assert found, (turn, box)


def test_questions_about_two_pictures_are_answered_by_what_they_show():
    place = {"first": 0, "second": 1, "third": 2}
    answers = []
    for sample, turn in about("pair_which", 30):
        name = re.search(r"(?:the|the only) (\w+(?: \w+)?)\?", turn.question)[1].split()[-1]
        assert any(thing.kind == name for thing in sample.drawings[place[turn.answer]].things)
        answers.append(turn.answer)
    assert {"first", "second"} <= set(answers)
    for sample, turn in about("pair_more", 20):
        counts = [len(drawing.things) for drawing in sample.drawings if len(drawing.things[0].kind) > 1]
        assert len(sample.drawings[place[turn.answer]].things) == max(counts)
    same = [(sample, turn) for sample, turn in about("pair_same", 40)]
    for sample, turn in same:
        first, second = (np.asarray(image) for image in sample.images[:2])
        assert (turn.answer == "yes") == (first.shape == second.shape and bool((first == second).all()))
    assert 10 < sum(turn.answer == "yes" for _, turn in same) < 30


def test_a_second_picture_may_come_with_the_second_question():
    mixture = Mixture({"pair": 1}, turns=(2, 3), chinese=0)
    shown = [sample for sample in (make_sample("train", 0, index, mixture) for index in range(80)) if sample.shown]
    assert shown
    for sample in shown:
        assert sum(sample.shown) == len(sample.drawings) and "first" in sample.turns[0].question
        messages = conversation_row(sample)["messages"]
        counts = [sum(part["type"] == "image" for part in message["content"]) for message in messages[::2]]
        assert counts[: len(sample.shown)] == sample.shown and sum(counts) == len(sample.drawings)


def test_a_clip_after_a_picture_shows_the_same_shape_or_another():
    answers = []
    for sample, turn in about("mixed_same", 40):
        shape = next(drawing.things[0] for drawing in sample.drawings[1:] if drawing.things)
        there = {(thing.kind, thing.color) for thing in sample.drawings[0].things}
        assert ((shape.kind, shape.color) in there) == (turn.answer == "yes")
        assert sample.temporal_ids[0] == [-1] and sum(map(len, sample.temporal_ids)) == 7
        answers.append(turn.answer)
    assert 8 < answers.count("yes") < 32


def test_times_of_a_clip_are_those_of_its_frames():
    for sample, turn in about("clip_times", 20):
        times = sample.temporal_ids[0]
        for color, time in re.findall(r"(\w+) at ([\d.]+) s", turn.answer):
            frame = times.index(round(10 * float(time)))
            assert sample.drawings[frame].things[0].color == color
            assert frame == 0 or sample.drawings[frame - 1].things[0].color != color


def test_pages_are_told_as_they_are_printed():
    for task in ("page_text", "page_markdown"):
        for sample, turn in about(task, 15):
            letters = "".join(line for line in turn.answer.splitlines() if "---" not in line)
            assert re.sub(r"[\s|#]", "", letters) == printed(sample)
    for sample, turn in about("page_markdown", 15):
        assert all(len(table) > 1 and len({len(row) for row in table}) == 1 for table in find_tables(turn.answer))
        assert bool(find_tables(turn.answer)) == ("ITEM" in printed(sample).replace("ITEM:", ""))


def test_data_of_a_form_fit_the_schema_and_the_page():
    for sample, turn in about("page_json", 30):
        schema = json.loads(turn.question.split("\n")[1])
        validate(json.loads(turn.answer), schema)
        assert sample.labels == ["Page 1:"]
        for key, value in json.loads(turn.answer, parse_float=str, parse_int=str).items():
            assert f"{key.upper()}:{value}" in printed(sample)


def test_a_system_message_changes_answers_in_a_fixed_way():
    mixture = Mixture({"shapes": 1, "line": 1, "paper_form": 1}, chinese=0.3, systems=1.0)
    styles = set()
    for index in range(60):
        sample, plain = (make_sample("train", 0, index, replace(mixture, systems=share)) for share in (1.0, 0.0))
        assert not plain.system
        say = WORDINGS[sample.language]
        for turn, other in zip(sample.turns, plain.turns, strict=True):
            if sample.system == say.systems["friendly"]:
                assert turn.answer == say.friendly.format(other.answer)
            elif sample.system and turn.task == "caption":
                assert turn.answer == say.comma.join(named_objects(other.answer, sample.language))
            else:
                assert turn.answer == other.answer
        styles.add(sample.system and conversation_row(sample)["messages"][0]["content"][0]["text"])
    assert len(styles) == 5  # of two languages, and none


def test_textures_of_the_test_split_are_partly_of_other_kinds():
    assert not set(SEEN) & set(UNSEEN)
    for split in SPLITS:
        image = photo(random.Random(0), (60, 40), split)
        assert image.size == (60, 40) and np.asarray(image).std() > 5


def test_our_applications_ask_by_the_words_that_are_taught():
    asked = Prompts()
    assert (asked.markdown, asked.text) == (prompts.READ_MARKDOWN, prompts.READ_TEXT)
    assert prompts.READ_DATA.format("{}") == asked.data.format(schema="{}")
    assert asked.regions.format(kinds=", ".join(REGION_KINDS)) == prompts.REGIONS
    assert asked.page == prompts.PAGE and asked.question == prompts.PAGE_QUESTION
    assert asked.summary == prompts.SUMMARY and tuple(SUMMARY_LENGTHS.values()) == prompts.LENGTHS
    assert prompts.BOX == grounding.QUESTION and prompts.CLIP == clips.PROMPT


def test_fine_print_is_small_on_a_large_page():
    for index in range(10):
        drawing = bench_sample("fine_print", "test", 0, index).drawings[0]
        assert all(900 <= side <= 1344 for side in drawing.image.size)
        letters = [thing for thing in drawing.things if len(thing.kind) == 1 and thing.kind.isalnum()]
        heights = [thing.box[3] - thing.box[1] for thing in letters]
        assert max(heights) < 0.055 * max(drawing.image.size)


def test_clips_are_packed_in_order_of_time():
    clips = [make_sample("train", 0, i, Mixture(scenes={"clip_move": 1, "clip_order": 1})) for i in range(40)]
    clips += [bench_sample("video_count", "test", 0, i) for i in range(5)]
    for clip in clips:
        times = [time for group in clip.temporal_ids for time in group]
        assert len(times) == len(clip.images) == 6 and times == sorted(times) and min(times) >= 0
        assert len({image.size for image in clip.images}) == 1
    assert {len(clip.temporal_ids[0]) for clip in clips[:40]} == {1, 2, 3, 6}
    assert all(len(clip.temporal_ids) == 1 for clip in clips[40:])


def blank(width, height):
    return Drawing(Image.new("RGB", (width, height), (230, 230, 230)), Image.new("L", (width, height), 0))


def test_patch_labels_name_what_lies_under_each_patch():
    drawing = blank(112, 56)
    add_shape(drawing, "square", "red", (28, 28), 20, COLORS["red"])
    add_shape(drawing, "circle", "blue", (84, 28), 20, COLORS["blue"])
    kinds, colors, boxes = patch_labels(drawing, (0, 0, 112, 56), (4, 8))
    kinds, colors, boxes = kinds.reshape(4, 8), colors.reshape(4, 8), boxes.reshape(4, 8, 4)
    assert KIND_CLASSES[kinds[1, 1]] == "square" and COLOR_CLASSES[colors[1, 1]] == "red"
    assert KIND_CLASSES[kinds[2, 5]] == "circle" and COLOR_CLASSES[colors[2, 6]] == "blue"
    assert kinds[0, 4] == 0 and colors[3, 4] == 0  # between the two
    for thing, box in zip(drawing.things, (boxes[1, 1], boxes[2, 5]), strict=True):
        found = (box + 0.5) / BOX_BINS * (112, 56, 112, 56)
        assert np.abs(found - thing.box).max() <= 112 / BOX_BINS
    assert (boxes[kinds <= 0] == -100).all()
    assert set(kinds[:, :4].ravel()) <= {0, -100, KIND_CLASSES.index("square")}


def test_patch_labels_of_a_slice_are_those_of_its_part_of_the_picture():
    drawing = blank(112, 112)
    add_shape(drawing, "star", "green", (84, 28), 24, COLORS["green"])
    upper_right, _, boxes = patch_labels(drawing, (56, 0, 112, 56), (8, 8))
    lower_left, *_ = patch_labels(drawing, (0, 56, 56, 112), (8, 8))
    assert KIND_CLASSES.index("star") in upper_right
    assert (boxes == -100).all()  # a part does not tell where in the whole it lies
    assert not lower_left.any()


def test_each_character_has_labels_of_its_own():
    drawing = blank(112, 56)
    add_text(drawing, "A7", "neutral", (10, 0), Print("aileron", True, 44), (0, 0, 0))
    kinds, *_ = patch_labels(drawing, (0, 0, 112, 56), (4, 8))
    assert {KIND_CLASSES.index("A"), KIND_CLASSES.index("7")} <= set(kinds)
    assert set(np.unique(np.asarray(drawing.object_map))) == {0, 1, 2}


def test_print_too_small_to_read_has_no_label():
    drawing = blank(1120, 1120)
    add_text(drawing, "A", "neutral", (500, 500), Print("sans", False, 60), (0, 0, 0))
    whole, *_ = patch_labels(drawing, (0, 0, 1120, 1120), (8, 8))
    close, *_ = patch_labels(drawing, (440, 440, 660, 660), (8, 8))
    assert set(whole) <= {0, -100} and KIND_CLASSES.index("A") in close


def test_dense_labels_agree_with_the_colors_of_the_pixels():
    """Patches that a thing covers almost whole have the color their label names (clips: no jitter, no grain)."""
    checked = 0
    for index in range(60):
        for drawing in make_sample("train", 1, index, Mixture(scenes={"clip_move": 1, "clip_flash": 1})).drawings:
            width, height = drawing.image.size[0] // 14 * 14, drawing.image.size[1] // 14 * 14
            _, colors, _ = patch_labels(drawing, (0, 0, width, height), (height // 14, width // 14))
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
