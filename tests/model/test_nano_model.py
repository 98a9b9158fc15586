"""nano as users load it, and the main job on real files."""

import shutil

import pytest
import torch
from conftest import GREEDY, REPOSITORY
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor


ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def nano():
    return AutoModel.from_pretrained(REPOSITORY / "nano", trust_remote_code=True).eval()


def ask(model, *content, **options):
    options = GREEDY | {"max_new_tokens": 32} | options
    return model.chat(msgs=[{"role": "user", "content": list(content)}], **options)


def test_nano_loads_from_its_folder_from_the_repository_and_from_a_copy(nano, tmp_path, monkeypatch):
    number = ASSETS / "number.jpg"
    assert ask(nano, number, "What does it say?") == "47"
    monkeypatch.chdir(REPOSITORY)
    beside = AutoModelForImageTextToText.from_pretrained("nano", trust_remote_code=True).eval()
    inside = AutoModel.from_pretrained(".", subfolder="nano", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(".", subfolder="nano", trust_remote_code=True)
    shutil.copytree("nano", tmp_path / "my nano v1.0")  # links become files
    copied = AutoModel.from_pretrained(tmp_path / "my nano v1.0", trust_remote_code=True).eval()
    assert ask(beside, number, "What does it say?") == "47"
    assert ask(inside, number, "What does it say?", processor=processor) == "47"
    assert ask(inside, number, "What does it say?") == "47"  # and finds its processor
    assert ask(copied, number, "What does it say?") == "47"


def test_nano_answers_the_same_every_time_unless_asked_to_sample(nano):
    """Its generation_config says so; the same question in different words of the caller's is the same answer."""
    number = [{"role": "user", "content": [ASSETS / "number.jpg", "What does it say?"]}]
    assert {nano.chat(msgs=number, max_new_tokens=16) for _ in range(3)} == {"47"}
    assert nano.chat(msgs=number, max_new_tokens=16, decoding="beam") == nano.chat(
        msgs=number, max_new_tokens=16, sampling=False
    )
    sampled = {nano.chat(msgs=number, max_new_tokens=16, temperature=3.0, seed=seed) for seed in range(6)}
    assert len(sampled) > 1


def test_nano_holds_links_to_the_code_and_no_copies():
    code = {path.name for path in REPOSITORY.glob("*.py")}
    linked = {path.name for path in (REPOSITORY / "nano").glob("*.py")}
    assert linked == code and all((REPOSITORY / "nano" / name).is_symlink() for name in linked)


def test_nano_answers_about_a_picture_and_a_clip(nano):
    shapes, clip = ASSETS / "shapes.jpg", ASSETS / "star.mp4"
    assert ask(nano, shapes, "How many shapes are there?") == "2"
    assert ask(nano, shapes, "What shape is red?") == "circle"
    assert ask(nano, clip, "Which way does the shape move?", fps=3, force_packing=3) == "right"


def test_nano_thinks_before_it_answers(nano):
    answer = ask(
        nano, ASSETS / "sum.jpg", "What is the result?", enable_thinking=True, return_dict=True, max_new_tokens=96
    )
    assert answer.finish_reason == "stop" and answer.text.isdigit()
    first, *steps = answer.reasoning.splitlines()
    assert first == "7+5-3+8" and steps[0] == "7+5=12" and all("=" in step for step in steps)


def test_nano_batches_and_streams_like_it_answers_alone(nano):
    questions = ["How many shapes are there?", "What color is the square?", "Describe the picture."]
    conversations = [[{"role": "user", "content": [ASSETS / "shapes.jpg", question]}] for question in questions]
    alone = [ask(nano, *conversation[0]["content"]) for conversation in conversations]
    assert nano.chat(msgs=conversations, max_new_tokens=32, **GREEDY) == alone
    assert ["".join(ask(nano, *c[0]["content"], stream=True)) for c in conversations] == alone


@pytest.mark.parametrize("thinking", [False, True])
def test_a_real_photograph_and_a_real_video_go_the_whole_road(nano, golden_model, processor, thinking):
    """nano has never seen a photograph, and the other model is random: what counts is that every part takes part."""
    photograph, film = ASSETS / "coffee.jpg", ASSETS / "big_buck_bunny.mp4"
    content = [photograph, film, "What is in the picture, and what happens in the film?"]
    options = {"fps": 5, "max_num_packing": 6, "force_packing": 6, "enable_thinking": thinking}
    assert isinstance(ask(nano, *content, **options), str)
    answer = ask(golden_model, *content, processor=processor, return_dict=True, **options)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        return_metadata=True,
        **options,
    )
    (report,) = inputs["video_metadata"][0]
    assert (len(report.frames_indices), report.packing) == (26, 6)  # 5.28 s at 5 frames a second
    assert report.num_tokens == 64 * report.num_groups == 64 * 5
    slots = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert slots == 64 * len(inputs["temporal_ids"][0]) and answer.prompt_tokens == inputs["input_ids"].shape[1]
    with torch.no_grad():
        features = golden_model.get_image_features(*(inputs[n] for n in ("pixel_values", "tgt_sizes", "temporal_ids")))
    assert features.pooler_output.shape == (slots // 64, 64, 256)
