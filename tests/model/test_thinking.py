"""Thinking: budgets, "auto", and what is known about an answer."""

import pytest
import torch
from conftest import GREEDY, REPOSITORY, ground_floor, name_seeded_model, nano_sized_config, wave_picture
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor, Qwen3Config, Qwen3ForCausalLM


PICTURE = wave_picture(260, 180, 1)  # in slices
QUESTION = [{"role": "user", "content": [PICTURE, "how many stars are there"]}]
thinking = ground_floor("decoding_minicpmv")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return name_seeded_model(nano_sized_config())


@pytest.fixture
def ask(model, processor):
    """chat() with greedy search; the threshold is put back afterwards."""

    def ask(msgs=QUESTION, **options):
        defaults = {"processor": processor, "max_new_tokens": 24, "return_dict": not options.get("stream"), **GREEDY}
        return model.chat(msgs=msgs, **defaults | options)

    yield ask
    model.set_threshold(thinking.DEFAULT_THRESHOLD)


# ---- budgets ----


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_the_thought_and_the_answer_follows(ask, processor, budget):
    free = ask(enable_thinking=True)
    assert free.text == "" and free.reasoning_tokens == 24  # this model would think on and on
    output = ask(enable_thinking=True, thinking_budget=budget)
    begun = processor.tokenizer.tokenize(free.raw_text)[: budget + 2]
    assert processor.tokenizer.tokenize(output.raw_text)[: budget + 2][:budget] == begun[:budget]
    assert output.raw_text.startswith("<think>\n") and output.text
    assert output.raw_text.count("</think>\n\n") == 1
    assert output.reasoning_tokens <= budget + 2  # "\n</think>" belongs to it
    assert output.finish_reason == "length" and output.generated_tokens == 24


def test_budgets_hold_in_batches_of_unequal_prompts_streams_and_guessed_decoding(ask):
    text = [{"role": "user", "content": "why"}]
    alone = [ask(msgs=messages, enable_thinking=True, thinking_budget=5).raw_text for messages in (QUESTION, text)]
    batch = ask(msgs=[QUESTION, text], enable_thinking=True, thinking_budget=5)
    assert [output.raw_text for output in batch] == alone
    assert "".join(ask(enable_thinking=True, thinking_budget=5, stream=True)) == alone[0]
    assert ask(enable_thinking=True, thinking_budget=5, prompt_lookup_num_tokens=3).raw_text == alone[0]


def test_a_thought_that_closes_itself_is_not_touched():
    budget = thinking.ThoughtBudget(budget=3, prompt_length=2, think_end=9, closing=[4, 9, 5])
    scores = torch.zeros(2, 10)
    for length, forced in ((4, None), (5, 4), (6, 9), (7, 5), (8, None)):
        ids = torch.ones(2, length, dtype=torch.long)
        ids[1, 3:4] = 9  # the second row has closed its thought
        result = budget(ids, scores)
        assert torch.equal(result[1], scores[1])
        assert (
            result[0].argmax() == forced and result[0].isfinite().sum() == 1 if forced else torch.equal(result, scores)
        )


@pytest.mark.parametrize("budget", [-1, 24, 2.5, True])
def test_a_budget_that_cannot_be_kept_is_refused(ask, budget):
    with pytest.raises(ValueError, match="max_new_tokens"):
        ask(enable_thinking=True, thinking_budget=budget)


# ---- auto ----


@pytest.mark.parametrize(("threshold", "mode"), [(0, "deep"), (1, "fast")])
@pytest.mark.parametrize("new", [5, 24])
def test_auto_gives_the_answer_of_the_mode_it_chooses(model, ask, threshold, mode, new):
    model.set_threshold(threshold)
    output = ask(enable_thinking="auto", max_new_tokens=new)
    chosen = ask(enable_thinking=mode == "deep", max_new_tokens=new)
    assert output.mode == chosen.mode == mode and output.raw_text == chosen.raw_text
    assert (output.reasoning is None) == (mode == "fast")
    assert output.generated_tokens == chosen.generated_tokens and output.prompt_tokens == chosen.prompt_tokens
    assert 0 < output.need < 1 and chosen.need is None
    assert output.draft_tokens == (min(8, new) if mode == "deep" else 0)


def test_auto_computes_the_prompt_once(model, ask):
    fed, slices = [], []
    hooks = [
        model.llm.model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        model.vpm.register_forward_pre_hook(lambda module, args: slices.append(len(args[0]))),
    ]
    for threshold in (0, 1):
        fed.clear(), slices.clear()
        model.set_threshold(threshold)
        output = ask(enable_thinking="auto")
        assert slices == [5] and max(fed[1:]) <= 4  # behind the draft: the opening of a thought, or one token
        assert sum(fed) <= output.prompt_tokens + output.generated_tokens + output.draft_tokens + 4
    for hook in hooks:
        hook.remove()


def test_auto_slices_the_images_once(model, processor, ask, monkeypatch):
    sliced, slice_all = [], processor.image_processor.slice_all_to_patches
    monkeypatch.setattr(
        processor.image_processor,
        "slice_all_to_patches",
        lambda images, *args: sliced.extend(images) or slice_all(images, *args),
    )
    model.set_threshold(0)
    assert ask(enable_thinking="auto").mode == "deep" and sliced == [PICTURE]


def test_auto_streams_only_what_it_decided_for(model, ask):
    for threshold, mode in ((0, "deep"), (1, "fast")):
        model.set_threshold(threshold)
        stream = ask(enable_thinking="auto", stream=True, thinking_budget=6)
        pieces = [(piece, stream.is_thought) for piece in stream]
        plain = ask(enable_thinking=mode == "deep", thinking_budget=6)
        assert "".join(piece for piece, _ in pieces) == plain.raw_text
        assert stream.output.mode == mode
        thought = "".join(piece for piece, is_thought in pieces if is_thought)
        assert thought == (plain.raw_text.split("</think>")[0] + "</think>" if mode == "deep" else "")


def test_auto_decides_for_each_conversation_of_a_batch(model, ask):
    batch = [QUESTION, [{"role": "user", "content": "why"}], [{"role": "user", "content": "a " * 300}]]
    needs = [ask(msgs=messages, enable_thinking="auto").need for messages in batch]
    model.set_threshold((min(needs) + max(needs)) / 2)
    outputs = ask(msgs=batch, enable_thinking="auto")
    assert [output.need for output in outputs] == pytest.approx(needs)
    assert [output.mode for output in outputs] == [
        "deep" if need >= model.thinking_threshold else "fast" for need in needs
    ]
    assert {output.mode for output in outputs} == {"fast", "deep"}


def test_auto_takes_frames_in_groups(model, ask):
    model.set_threshold(1)
    frames = [[wave_picture(64, 48, k) for k in range(3)], [wave_picture(64, 48, k) for k in (5, 6)]]
    batch = [[{"role": "user", "content": [*pictures, "what moves"]}] for pictures in frames]
    options = {"use_image_id": False, "max_slice_nums": 1}
    groups = [[[0, 3, 6]], [[0], [5]]]
    fast = ask(msgs=batch, temporal_ids=groups, **options)
    auto = ask(msgs=batch, temporal_ids=groups, enable_thinking="auto", **options)
    assert [output.raw_text for output in auto] == [output.raw_text for output in fast]
    alone = ask(msgs=batch[0], temporal_ids=groups[0], enable_thinking="auto", **options)
    assert alone.raw_text == fast[0].raw_text and alone.prompt_tokens == fast[0].prompt_tokens
    with pytest.raises(ValueError, match="1 entries for 2"):
        ask(msgs=batch, temporal_ids=groups[:1], enable_thinking="auto", **options)


def test_auto_samples_and_searches_with_beams_too(model, ask):
    model.set_threshold(1)
    sampled = {"decoding": "sample", "seed": 4}
    assert ask(enable_thinking="auto", **sampled).raw_text == ask(**sampled).raw_text
    assert ask(enable_thinking="auto", num_beams=2).raw_text == ask(num_beams=2).raw_text


def test_a_short_certain_answer_costs_nothing_more_than_fast(ask, model):
    """nano itself: it knows the shape, so the draft is the whole answer."""
    nano = AutoModel.from_pretrained(REPOSITORY / "nano", trust_remote_code=True).eval()
    messages = [{"role": "user", "content": [REPOSITORY / "assets" / "shapes.jpg", "What shape is red?"]}]
    steps = []
    nano.llm.register_forward_hook(lambda *_: steps.append(1))
    output = nano.chat(msgs=messages, enable_thinking="auto", return_dict=True, **GREEDY)
    assert output.text == "circle" and output.mode == "fast" and output.finish_reason == "stop"
    assert len(steps) == output.generated_tokens and output.need < 0.3


def test_the_need_is_the_doubt_about_the_weakest_token():
    logits = [torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.4, 0.6]]))]
    assert thinking.need_to_think(logits) == pytest.approx(0.4)
    assert thinking.need_to_think(logits[:1]) == pytest.approx(0.1)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "high", None, True])
def test_a_threshold_is_a_number_from_0_to_1(model, threshold):
    before = model.thinking_threshold
    with pytest.raises(ValueError, match="from 0"):
        model.set_threshold(threshold)
    assert model.thinking_threshold == before


def test_the_threshold_is_saved_with_the_model(tmp_path):
    config = nano_sized_config()
    del config.thinking_threshold  # nano brings one
    model = name_seeded_model(config)
    assert model.thinking_threshold == 0.5
    model.set_threshold(0.25)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, trust_remote_code=True).thinking_threshold == 0.25


# ---- results ----


def test_an_output_tells_where_its_time_went(ask):
    output = ask(enable_thinking=True, thinking_budget=4)
    times = [output.timings[stage] for stage in ("inputs", "vision", "first_token", "total")]
    assert times == sorted(times) and times[0] > 0
    assert str(output) == output.text and output.raw_text.endswith(output.text)
    assert output.cached_tokens == output.dropped_turns == output.draft_tokens == 0


def test_a_stop_string_is_a_stop_and_no_length(ask):
    word = ask().text[-3:]
    output = ask(stop_strings=[word])
    assert output.finish_reason == "stop" and output.text.endswith(word) and output.generated_tokens < 24


# ---- decoding ----


def assistants():
    small = {"hidden_size": 128, "num_hidden_layers": 1, "max_window_layers": 1}
    text = Qwen3Config(
        vocab_size=nano_sized_config().vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return [name_seeded_model(nano_sized_config(**small)), Qwen3ForCausalLM(text).eval()]


def test_guessed_decoding_gives_the_plain_tokens_with_pictures(model, processor, ask):
    """Guesses from the prompt, from a small model of this kind that sees the pictures too, and from a text model."""
    plain = ask().raw_text
    sees = []
    seeing, blind = assistants()
    seeing.vpm.register_forward_hook(lambda *_: sees.append(1))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": seeing}, {"assistant_model": blind}):
        assert ask(**options).raw_text == plain
        assert "".join(ask(**options, stream=True)) == plain
    assert sees
    inputs = processor.apply_chat_template(
        QUESTION,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=False,
    )
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": seeing}, {"assistant_model": blind}):
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, **options), expected)


def test_a_perfect_guess_saves_steps(model, ask):
    steps = []
    hook = model.llm.register_forward_hook(lambda *_: steps.append(1))
    ask(prompt_lookup_num_tokens=8, msgs=[{"role": "user", "content": [PICTURE, "star " * 20]}])
    hook.remove()
    assert len(steps) < 24


def test_generate_leaves_out_the_pictures_that_a_filled_cache_holds(model, processor):
    inputs = processor.apply_chat_template(
        QUESTION,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        enable_thinking=False,
    )
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    grown = {**inputs, "input_ids": torch.cat([first.sequences, inputs["input_ids"][:, -8:]], dim=1)}
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    fresh = model.generate(**grown, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(**grown, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False), fresh
    )


def test_a_static_cache_gives_the_same(ask):
    assert ask(cache_implementation="static").raw_text == ask().raw_text


def test_logits_are_computed_for_the_last_position_only(model, ask):
    lengths = []
    hook = model.llm.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    ask()
    hook.remove()
    assert set(lengths) == {1}


class CountSyncs(TorchDispatchMode):
    """Counts the reads of single values, which make a host wait for its device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_no_more_often_than_the_language_model_alone(model, ask):
    def syncs(generate, new):
        with CountSyncs() as counter:
            generate(new)
        return counter.count

    ids = torch.arange(20)[None]
    alone = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options = {"min_new_tokens": 4, "enable_thinking": True, "thinking_budget": 2}
    ours, theirs = (
        syncs(generate, 20) - syncs(generate, 10)
        for generate in (
            lambda new: ask(max_new_tokens=new, **options | {"min_new_tokens": new}),
            lambda new: model.llm.generate(ids, max_new_tokens=new, min_new_tokens=new, **alone),
        )
    )
    assert ours <= theirs
