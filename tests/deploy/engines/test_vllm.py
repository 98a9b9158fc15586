"""vLLM with the plugin against `model.chat`: the same ids in the prompt, the same greedy answers. Needs vLLM: `make engines`."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import transformers
from conftest import NANO, REPOSITORY
from PIL import Image

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
        Case(
            asked(CLIP, "before", CLIP, "Which way does the shape move?"), {"max_num_packing": 6, "force_packing": 6}
        ),
    ]
    turns = [*asked(CLIP, examples.CLIP_QUESTIONS[0]), {"role": "assistant", "content": "right"}]
    numbered = {"videos_kwargs": {"use_image_id": True, "max_slice_nums": 1}, "max_slice_nums": 2}
    return [*cases, Case([*turns, *asked(number, question)]), Case(asked(number, CLIP, number, "What?"), numbered)]


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


def answers(engine, requests):
    from vllm import SamplingParams

    return engine.generate(requests, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_prompts_and_answers_are_those_of_chat(engine, reference, kind):
    model, processor = reference
    cases = kind()
    outputs = answers(engine, [request(processor, case) for case in cases])
    found, expected = [], []
    for case, output in zip(cases, outputs, strict=True):
        inputs = processor.apply_chat_template(
            case.messages,
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **case.options,
        )
        answer = model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options)
        expected.append((inputs["input_ids"][0].tolist(), answer))
        found.append((output.prompt_token_ids, output.outputs[0].text))
    same = sum(mine == theirs for mine, theirs in zip(expected, found, strict=True))
    print(f"\n{kind.__name__}: {same}/{len(cases)} prompts and answers equal")
    assert found == expected


def test_the_same_file_with_another_packing_is_another_item_of_the_caches(engine, reference):
    model, processor = reference
    question = examples.CLIP_QUESTIONS[0]
    packings = [1, 6, 2, 1, 6, 2]
    cases = [Case(asked(CLIP, question), {"max_num_packing": 6, "force_packing": packing}) for packing in packings]
    found = [answers(engine, [request(processor, case)])[0] for case in cases]  # one after the other: caches are warm
    expected = [model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options) for case in cases]
    assert [output.outputs[0].text for output in found] == expected
    assert [len(output.prompt_token_ids) for output in found[:3]] == [len(o.prompt_token_ids) for o in found[3:]]
    assert len({len(output.prompt_token_ids) for output in found[:3]}) == 3
    assert found[3].num_cached_tokens > 0  # of packing 1; the other prompts are shorter than a block of vLLM's cache


def test_the_same_frames_at_other_times_are_another_item_of_the_caches(engine, reference):
    case = drawn("clip_times", 0)
    (frames, metadata), model, processor = case.given[0], *reference
    later = [[temporal_id + 7 for temporal_id in group] for group in metadata["temporal_ids"]]
    expected, found = [], []
    for ids in (metadata["temporal_ids"], later, metadata["temporal_ids"]):
        case.options["temporal_ids"] = [ids]
        expected.append(model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options))
        case.given = [(frames, {"temporal_ids": ids})]
        found.append(answers(engine, [request(processor, case)])[0].outputs[0].text)
    assert found == expected


def test_times_beyond_the_first_hour_are_answered(engine, reference):
    case = drawn("video_order", 0)
    (frames, metadata), model, processor = case.given[0], *reference
    late = [[temporal_id + 36_000 for temporal_id in group] for group in metadata["temporal_ids"]]
    case.options["temporal_ids"], case.given = [late], [(frames, {"temporal_ids": late})]
    expected = model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options)
    assert answers(engine, [request(processor, case)])[0].outputs[0].text == expected


def test_frames_of_other_loaders_keep_the_times_that_their_metadata_tell(engine, reference):
    model, processor = reference
    question, frames = examples.CLIP_QUESTIONS[0], drawn("video_direction", 1).given[0][0]
    metadata = {"fps": 30.0, "frames_indices": [i * 15 for i in range(len(frames))], "do_sample_frames": False}
    found = answers(
        engine,
        [
            {
                "prompt": processor.apply_chat_template(
                    asked({"type": "video", "video": frames}, question),
                    add_generation_prompt=True,
                    enable_thinking=False,
                ),
                "multi_modal_data": {"video": [video]},
                "mm_processor_kwargs": {"max_num_packing": 6, "force_packing": 6},
            }
            for video in ((frames, metadata), (frames, {"fps": 2.0}))
        ],
    )
    ids = [[i * 5 for i in range(len(frames))]]  # half a second from one to the next
    expected = model.chat(
        msgs=asked(*map(Image.fromarray, frames), question),
        decoding="greedy",
        temporal_ids=[ids],
        max_slice_nums=1,
        use_image_id=False,
    )
    assert [output.outputs[0].text for output in found] == [expected, expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": -1}, "fps=-1 must be a positive number"),
        ({"pfs": 3}, "mm_processor_kwargs hold pfs; they may hold"),
        ({"max_num_frames": 100_000}, "max_num_frames=100000 is more than 113"),
        ({"videos_kwargs": {"max_slice_nums": 1000}}, "max_slice_nums=1000 is more than 113"),
        ({"start": 99}, "lies past the end of the video"),
        ({"temporal_ids": [[0]]}, "this video is a file"),
        ({"video_metadata": {"fps": 1}}, "hold video_metadata"),
        ({"images_kwargs": 4}, "are objects of options"),
    ],
)
def test_what_an_option_gets_wrong_is_an_error_of_the_request_alone(engine, reference, options, message):
    case = Case(asked(CLIP, examples.CLIP_QUESTIONS[0]), {})
    with pytest.raises(ValueError, match=message):
        answers(engine, [request(reference[1], case) | {"mm_processor_kwargs": options}])
    assert answers(engine, [request(reference[1], case)])[0].outputs[0].text


def test_a_checkpoint_in_8_bits_answers_as_it_does_in_transformers(engine, reference):
    from vllm import LLM

    folder = REPOSITORY / "build" / "nano-w8a8"
    assert folder.is_dir(), "make engines writes it"
    model, processor = reference
    cases = [*stills()[:6], *clips()[::2], *mixtures()[:2]]
    eight_bits = LLM(**ENGINE | {"model": str(folder), "dtype": "bfloat16"})  # its kernels have no float32
    outputs = answers(eight_bits, [request(processor, case) for case in cases])
    expected = [model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options) for case in cases]
    same = sum(output.outputs[0].text == answer for output, answer in zip(outputs, expected, strict=True))
    print(f"\nw8a8: {same}/{len(cases)} answers equal to those of the whole checkpoint")
    assert same >= len(cases) - 1  # activations are rounded too


def test_two_ranks_answer_as_one(reference, monkeypatch):
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core for each
    model, processor = reference
    cases = [*stills()[:4], *clips()[::2], *mixtures()]
    # Three heads of nano's tower cannot be shared by two: each rank has all of it, and its share of the slices.
    ranks = LLM(**ENGINE, tensor_parallel_size=2, mm_encoder_tp_mode="data")
    found = [output.outputs[0].text for output in answers(ranks, [request(processor, case) for case in cases])]
    expected = [model.chat(msgs=case.messages, decoding="greedy", max_new_tokens=24, **case.options) for case in cases]
    assert found == expected


def test_a_group_that_the_tower_would_not_read_at_a_time_is_refused(engine, reference):
    frames = np.zeros((65, 28, 28, 3), np.uint8)
    video = (frames, {"temporal_ids": [list(range(65))]})
    with pytest.raises(ValueError, match="a group of 65 frames is more than 64"):
        answers(engine, [request(reference[1], Case(asked(Image.fromarray(frames[0]), "What?"), given=[video]))])


# ---- over HTTP ----


@pytest.fixture(scope="module")
def address():
    """Of vLLM's server as `minicpmv serve` starts it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = ["serve", "--engine", "vllm", "-m", str(NANO), "--port", str(port), "--max-rows", "8", "--"]
    words += ["--enforce-eager", "--dtype", "float32", "--limit-mm-per-prompt", '{"image": 8, "video": 2}']
    environment = os.environ | {"MINICPMV_API_KEY": "secret"}
    with subprocess.Popen([sys.executable, "-m", "minicpmv", *words], cwd=REPOSITORY, env=environment) as server:
        try:
            deadline = time.monotonic() + 900
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None and time.monotonic() < deadline
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=120)


def data_url(path, kind):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video(url=None):
    return {"type": "video_url", "video_url": {"url": url or data_url(CLIP, "video/mp4")}}


def image(name):
    return {"type": "image_url", "image_url": {"url": data_url(ASSETS / name, "image/jpeg")}}


def ask(client, *content, options=None, **fields):
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    body = {"mm_processor_kwargs": options} if options else {}
    return client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": parts}], temperature=0, extra_body=body, **fields
    )


@pytest.mark.parametrize("packing", [1, 2, 6])
@pytest.mark.parametrize("question", examples.CLIP_QUESTIONS)
def test_the_client_of_openai_packs_a_video_as_chat_does(client, reference, packing, question):
    model, processor = reference
    options = {"max_num_packing": 6, "force_packing": packing, "fps": 3}
    response = ask(client, video(), question, options=options)
    inputs = processor.apply_chat_template(
        asked(CLIP, question),
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        **options,
    )
    assert response.choices[0].message.content == model.chat(msgs=asked(CLIP, question), decoding="greedy", **options)
    assert response.usage.prompt_tokens == len(inputs["input_ids"][0])


def test_images_and_a_video_in_one_message_are_answered_as_in_chat(client, reference):
    number = ASSETS / "number.jpg"
    response = ask(client, video(), image("number.jpg"), image("sum.jpg"), "What does it say?")
    expected = reference[0].chat(msgs=asked(CLIP, number, ASSETS / "sum.jpg", "What does it say?"), decoding="greedy")
    assert response.choices[0].message.content == expected


def test_frames_that_a_client_has_chosen_come_with_their_times(client, reference):
    case = drawn("video_direction", 0)
    frames, metadata = case.given[0]
    encoded = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        encoded.append(base64.b64encode(file.getvalue()).decode())
    question = case.messages[0]["content"][-1]
    url = "data:video/jpeg;base64," + ",".join(encoded)
    response = ask(client, video(url), question, options={"temporal_ids": metadata["temporal_ids"]})
    assert response.choices[0].message.content == reference[0].chat(
        msgs=case.messages, decoding="greedy", **case.options
    )


def test_a_thought_comes_apart_from_the_answer_in_a_stream_too(client):
    body = {"chat_template_kwargs": {"enable_thinking": True}}
    content = [image("sum.jpg"), {"type": "text", "text": "What is the result?"}]
    stream = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": content}], temperature=0, stream=True, extra_body=body
    )
    thought = answer = ""
    for chunk in stream:
        thought += getattr(chunk.choices[0].delta, "reasoning", None) or ""
        answer += chunk.choices[0].delta.content or ""
    assert thought.split() == ["7+5-3+8", "7+5=12", "12-3=9", "9+8=17"]
    assert answer.strip() == "17"


def test_bad_options_addresses_and_keys_are_refused_and_the_server_goes_on(client, address):
    with pytest.raises(openai.BadRequestError, match="fps=-1 must be a positive number"):
        ask(client, video(), "What?", options={"fps": -1})
    with pytest.raises(openai.BadRequestError, match="give fps, num_frames"):
        client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": [video(), {"type": "text", "text": "What?"}]}],
            extra_body={"media_io_kwargs": {"video": {"fps": 2}}},
        )
    with pytest.raises(openai.BadRequestError, match="allowed domains"):
        ask(client, video("http://127.0.0.1:9/clip.mp4"), "What?")
    with pytest.raises(openai.BadRequestError, match="cannot be read as a video"):
        ask(client, video("data:video/mp4;base64,AAAA"), "What?")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="none", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["nano"]
    assert ask(client, image("number.jpg"), "What does it say?").choices[0].message.content == "47"


# ---- who is not packed ----


def test_other_versions_stay_with_the_classes_of_vllm(monkeypatch):
    from vllm.model_executor.models import minicpmv as stock

    from minicpmv.deploy.vllm.model import PackedMiniCPMV
    from minicpmv.deploy.vllm.processing import PackedProcessingInfo, processing_info

    class Older:
        packed_modules_mapping, embedding_modules = {}, {}

        def __init__(self, **kwargs):
            self.made_with = kwargs

    monkeypatch.setitem(stock._SUPPORT_VERSION, (2, 6), Older)
    config = transformers.PretrainedConfig(version=2.6, hidden_size=8, query_num=64)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    assert isinstance(PackedMiniCPMV(vllm_config=vllm_config, prefix="p"), Older)

    context = SimpleNamespace(get_hf_config=lambda: config)
    assert type(processing_info(context)) is stock.MiniCPMVProcessingInfo
    assert not issubclass(stock.MiniCPMVProcessingInfo, PackedProcessingInfo)


def test_frames_are_read_in_batches_of_whole_units():
    from minicpmv.deploy.vllm.model import batches

    units = [[-1], [0, 3, 6], [9, 12], [15], [0, 1, 2, 3, 4, 5]]
    assert batches(units, 4) == [[[-1], [0, 3, 6]], [[9, 12], [15]], [[0, 1, 2, 3, 4, 5]]]
    assert [unit for batch in batches(units, 1) for unit in batch] == units
    assert batches([], 4) == []
