"""chat(): forms of messages, streaming, thinking, limits, errors."""

import copy
import gc
import json
import threading

import psutil
import pytest
import torch
from conftest import GREEDY, wave_picture


PICTURE = wave_picture(300, 200, 0)


@pytest.fixture(scope="module")
def processor(nano_processor):
    return nano_processor


@pytest.fixture(scope="module")
def ask(small_model, processor):
    """chat() with greedy search, unless asked otherwise."""

    def ask(*content, **options):
        messages = options.pop("msgs", None) or [{"role": "user", "content": list(content)}]
        defaults = {"processor": processor, "max_new_tokens": 8, **GREEDY}
        return small_model.chat(msgs=messages, **defaults | options)

    return ask


def test_every_form_of_messages_gives_the_same_answer(ask, small_model, processor):
    answer = ask(PICTURE, "What is this?")
    assert isinstance(answer, str) and answer
    text = [{"role": "user", "content": "What is this?"}]
    options = {"processor": processor, "max_new_tokens": 8, **GREEDY}
    assert small_model.chat(PICTURE, text, None, processor, max_new_tokens=8, **GREEDY) == answer
    assert small_model.chat(image=PICTURE, msgs=json.dumps(text), tokenizer=processor.tokenizer, **options) == answer
    assert (
        small_model.chat(
            image=None, msgs=[{"role": "user", "content": [PICTURE, "What is this?"]}], context=None, **options
        )
        == answer
    )
    typed = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]
    assert ask(msgs=[{"role": "user", "content": typed}]) == answer
    with_system = [{"role": "system", "content": "Be short!"}, {"role": "user", "content": "Hi"}]
    assert ask(msgs=with_system) == ask(msgs=with_system[1:], system_prompt="Be short!")
    in_the_question = [with_system[0], {"role": "user", "content": [PICTURE, "Hi"]}]
    assert ask(msgs=with_system, image=PICTURE) == ask(msgs=in_the_question)


def test_a_batch_equals_singles(ask):
    messages = [
        [{"role": "user", "content": [PICTURE, wave_picture(97, 411, 2), "Compare!"]}],
        [{"role": "user", "content": "Only text! Really!"}],
        [{"role": "user", "content": [wave_picture(1000, 700, 1), "?"]}],
    ]
    assert ask(msgs=messages) == [ask(msgs=conversation) for conversation in messages]


def test_messages_are_left_as_they_were(ask):
    messages = [{"role": "user", "content": "Hi"}]
    ask(msgs=messages, system_prompt="S", image=PICTURE)
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        (None, "list of messages"),
        ("not json", "not JSON"),
        ([{"role": "robot", "content": "Hi"}], "role"),
        ([{"content": "Hi"}], "role"),
        ([{"role": "system", "content": "Hi"}], "no message of a user"),
        ([["Hi"]], "role"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(small_model, processor, messages, words):
    with pytest.raises(ValueError, match=words):
        small_model.chat(msgs=messages, processor=processor)


@pytest.mark.parametrize("content", ["Hello! 你好!", "Tell me."])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_stream_equals_the_plain_answer(ask, content, thinking):
    plain = ask(PICTURE, content, enable_thinking=thinking, max_new_tokens=24)
    chunks = list(ask(PICTURE, content, enable_thinking=thinking, max_new_tokens=24, stream=True))
    assert "".join(chunks) == plain and len(chunks) > 1
    assert plain.startswith("<think>\n") == thinking


def test_sampling_repeats_with_a_seed_and_leaves_the_global_state(ask):
    options = {"decoding": "sample"}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ask("Hi", seed=1, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert ask("Hi", seed=1, **options) == first == "".join(ask("Hi", seed=1, stream=True, **options))
    assert len({ask("Hi", seed=seed, **options) for seed in range(4)}) > 1


def test_an_error_while_streaming_reaches_the_reader(ask, small_model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(small_model.llm, "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(ask("Hi", stream=True))


def test_closing_a_stream_stops_the_model(ask, small_model, monkeypatch):
    steps, forward = [], small_model.llm.forward
    monkeypatch.setattr(
        small_model.llm, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs)
    )
    before = threading.active_count()
    stream = ask("Count on and on", stream=True, max_new_tokens=2000, min_new_tokens=2000)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert len(steps) < 500


def test_a_stream_is_of_one_conversation_without_beams(ask):
    with pytest.raises(ValueError, match="one conversation"):
        ask(msgs=[[{"role": "user", "content": "a"}]], stream=True)
    with pytest.raises(ValueError, match="num_beams=1"):
        ask("a", stream=True, num_beams=3)


def test_thought_and_answer_apart(ask, processor):

    split = processor.split_thought
    assert split("<think>\nhm\n</think>\n\nyes") == ("hm", "yes")
    assert split("<think>\nnever closed") == ("never closed", "")
    assert split("hm</think>yes") == ("hm", "yes")
    assert split("yes") == (None, "yes")
    output = ask(PICTURE, "?", enable_thinking=True, return_dict=True)
    assert output.reasoning and output.text == "" and output.finish_reason == "length"
    assert output.generated_tokens == 8
    assert output.prompt_tokens == len(
        processor.apply_chat_template(
            [{"role": "user", "content": [PICTURE, "?"]}],
            tokenize=True,
            add_generation_prompt=True,
            enable_thinking=True,
        )[0]
    )
    with pytest.raises(ValueError, match='"auto"'):
        ask("?", enable_thinking="often")


def test_exclamation_marks_survive_in_answers(ask, small_model, processor, monkeypatch):
    ids = processor.tokenizer("Hello! Yes!!")["input_ids"] + [889]
    assert 0 in ids

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr(small_model, "generate", generate)
    assert ask("Hi!", max_new_tokens=16) == "Hello! Yes!!"
    ids[:] = [889]
    assert ask("Hi!") == ""


def test_the_checkpoint_decides_how_to_decode_where_the_caller_does_not(small_model, processor, monkeypatch):
    given = []

    def generate(input_ids, **kwargs):
        given.append({name: kwargs.get(name) for name in ("do_sample", "num_beams", "temperature", "top_k")})
        return input_ids

    monkeypatch.setattr(small_model, "generate", generate)
    monkeypatch.setattr(small_model, "generation_config", copy.deepcopy(small_model.generation_config))
    names = ("do_sample", "num_beams", "temperature", "top_k")
    nothing, sample = (None, None, None, None), (True, None, 0.7, 100)
    for do_sample, options, expected in (
        (False, {}, nothing),
        (True, {}, sample),
        (True, {"decoding": "greedy"}, (False, 1, None, None)),
        (False, {"decoding": "sample"}, sample),
        (False, {"sampling": True}, sample),
        (True, {"sampling": False}, (False, 3, None, None)),
        (True, {"decoding": "beam"}, (False, 3, None, None)),
        (False, {"temperature": 0.2}, (True, None, 0.2, 100)),
        (True, {"decoding": "sample", "enable_thinking": True}, (True, None, 0.7, None)),
    ):
        small_model.generation_config.do_sample = do_sample
        small_model.chat(msgs=[{"role": "user", "content": "Hi"}], processor=processor, **options)
        assert given.pop() == dict(zip(names, expected, strict=True))


def test_the_same_conversation_twice_in_a_batch_gets_two_sampled_answers(ask):
    messages = [[{"role": "user", "content": "Hi"}]] * 2
    first, second = ask(msgs=messages, decoding="sample", seed=3)
    assert first != second and ask("Hi", decoding="sample", seed=3) == first
    assert ask(msgs=messages, decoding="sample", seed=3, enable_thinking="auto")[0]


def test_a_seed_of_its_own_makes_an_answer_independent_of_its_batch(ask):
    """Neither its place nor its neighbors matter."""
    hi, longer = ([{"role": "user", "content": text}] for text in ("Hi", "Tell me about the weather of tomorrow"))
    pair = ask(msgs=[hi, longer], decoding="sample", seed=["a", "b"])
    assert ask(msgs=[longer, hi], decoding="sample", seed=["b", "a"]) == pair[::-1]
    assert ask(msgs=[hi], decoding="sample", seed=["a"]) == pair[:1]
    with pytest.raises(ValueError, match="seed has 1 entries for 2 conversations"):
        ask(msgs=[hi, longer], decoding="sample", seed=["a"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 1.5}, "num_beams=1.5"),
        ({"decoding": "lucky"}, "greedy, beam, sample"),
        ({"decoding": "sample", "sampling": True}, "older name"),
        ({"decoding": "sample", "num_beams": 2, "seed": 1}, "2 beams"),
        ({"decoding": "beam", "stream": True}, "3 beams"),
        ({"enable_thinking": True, "thinking_budget": 99}, "thinking_budget=99"),
    ],
)
def test_settings_that_cannot_be_used_are_told_from_bugs(ask, options, words):
    with pytest.raises(ValueError, match=words) as refused:
        ask("Hi", **options)
    assert refused.value.is_minicpmv


def test_a_misspelt_keyword_names_the_nearest(ask):
    with pytest.raises(TypeError, match="'max_new_tokens'"):
        ask("Hi", max_new_token=3)
    with pytest.raises(TypeError, match="'force_packing'"):
        ask("Hi", force_pack=3)


def test_a_prompt_that_is_too_long_is_an_error_before_anything_runs(ask):
    with pytest.raises(ValueError, match=r"\d+ of them for images; the limit is 50"):
        ask(PICTURE, "What?", max_inp_length=50)
    with pytest.raises(ValueError, match="limit is 5"):
        ask("A question that is long enough", max_inp_length=5, stream=True)


def test_without_a_processor_nothing_is_downloaded(small_model, processor, tmp_path, monkeypatch):
    from transformers import AutoModel

    monkeypatch.setattr(small_model.config, "_name_or_path", "")
    with pytest.raises(ValueError, match="processor="):
        small_model.chat(msgs=[{"role": "user", "content": "Hi"}])
    small_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="does not download"):
        loaded.chat(msgs=[{"role": "user", "content": "Hi"}])
    processor.save_pretrained(tmp_path)
    assert loaded.chat(msgs=[{"role": "user", "content": "Hi"}], max_new_tokens=4, **GREEDY)


def test_an_edited_template_of_the_tokenizer_is_used(ask, processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    edited = tokenizer.chat_template.replace("{{- '<think>\\n' }}", "{{- '<think>\\nI' }}")
    assert edited != tokenizer.chat_template
    tokenizer.chat_template = edited
    output = ask("?", enable_thinking=True, tokenizer=tokenizer, return_dict=True)
    assert output.prompt_tokens == ask("?", enable_thinking=True, return_dict=True).prompt_tokens + 1


def test_features_of_a_picture_can_be_used_again(ask, small_model, processor):
    inputs = processor("(<image>./</image>)", [PICTURE])
    with torch.no_grad():
        features = small_model.get_image_features(inputs["pixel_values"], inputs["tgt_sizes"]).pooler_output
    assert ask(PICTURE, "What?", vision_hidden_states=[features]) == ask(PICTURE, "What?")


def test_fifty_streamed_chats_leave_nothing_behind(ask):
    process = psutil.Process()
    for _ in range(10):
        "".join(ask(PICTURE, "Hi!", stream=True, max_new_tokens=3))
    gc.collect()
    threads, memory = threading.active_count(), process.memory_info().rss
    for _ in range(50):
        "".join(ask(PICTURE, "Hi!", stream=True, max_new_tokens=3))
    gc.collect()
    assert threading.active_count() == threads
    assert process.memory_info().rss - memory < 50 * 2**20  # a picture's tensors alone would be 50 times 2 MB
