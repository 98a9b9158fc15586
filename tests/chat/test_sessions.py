"""Sessions: the answers of a stateless chat() at the price of what is new, within bounds, whatever happens in between."""

import gc
import random
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import GREEDY, REPOSITORY, name_seeded_model, nano_sized_config, wave_picture
from transformers import AutoProcessor

from minicpmv.chat import ChatSession, SessionBusyError, SessionFullError


FAST = {"max_new_tokens": 6, **GREEDY}
PICTURES = [wave_picture(90, 70, 0), wave_picture(260, 180, 1), wave_picture(40, 150, 2)]  # the second one in slices
CLIPS = [[wave_picture(64, 48, k) for k in range(4)], REPOSITORY / "assets" / "star.mp4"]
VIDEO = {"fps": 3, "max_num_packing": 6, "force_packing": 3}


@pytest.fixture(scope="module")
def processor():
    """nano's: a small vocabulary, small slices."""
    return AutoProcessor.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    """A random model of nano's size: its answers depend on every token before them."""
    return name_seeded_model(nano_sized_config())


@pytest.fixture
def start(model, processor):
    return lambda **options: ChatSession(model, processor, **{**FAST, **VIDEO, **options})


@pytest.fixture
def fed(model):
    """Counts what the parts of the model compute: tokens of the language model, slices of the tower."""
    counts = {"tokens": 0, "slices": 0}

    def count_tokens(module, args, kwargs):
        counts["tokens"] += kwargs["inputs_embeds"].shape[1]

    def count_slices(module, args):
        counts["slices"] += len(args[0])

    hooks = [
        model.llm.model.register_forward_pre_hook(count_tokens, with_kwargs=True),
        model.vpm.register_forward_pre_hook(count_slices),
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def stateless(model, processor, messages, **options):
    return model.chat(msgs=messages, processor=processor, return_dict=True, **{**FAST, **VIDEO, **options})


def random_content(rng):
    words = " ".join(
        rng.choices(["what", "color", "is", "the", "star", "and", "how", "many!", "<image>"], k=rng.randint(1, 6))
    )
    kind = rng.choice(["text", "text", "picture", "pictures", "clip", "file"])
    if kind == "text":
        return words
    media = {
        "picture": [rng.choice(PICTURES)],
        "pictures": rng.sample(PICTURES, 2),
        "clip": [{"type": "video", "video": CLIPS[0]}],
        "file": [CLIPS[1]],
    }[kind]
    return [*media, words]


def prompt_ids(processor, messages, thinking):
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, enable_thinking=thinking, **VIDEO
    )
    return inputs["input_ids"][0]


# ---- the same answers ----


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_session_answers_like_a_stateless_chat(model, processor, start, seed):
    """Text, pictures and clips; fast, deep (closed by a budget, or not at all) and auto."""
    rng = random.Random(seed)
    session = start(system_prompt=rng.choice(["", "Be short!"]))
    modes = [{"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": True, "thinking_budget": 2}]
    for _ in range(rng.randint(2, 4)):
        mode = rng.choice([*modes, {"enable_thinking": "auto", "thinking_budget": 1, "max_new_tokens": 12}])
        content = random_content(rng)
        messages = [*session.history, {"role": "user", "content": content}]
        expected = stateless(model, processor, messages, **mode)
        output = session.send(content, **mode)
        assert output.raw_text == expected.raw_text
        assert (output.mode, output.need) == (expected.mode, pytest.approx(expected.need, abs=1e-5))
        assert output.prompt_tokens == expected.prompt_tokens and output.generated_tokens == expected.generated_tokens
        ids = prompt_ids(processor, messages, output.mode == "deep")
        assert session.cached_tokens >= len(ids) == output.prompt_tokens
        assert session.history == [*messages, {"role": "assistant", "content": output.text}]


def test_cached_states_are_those_of_a_fresh_computation(model, processor, start):
    """After a thought was cut out of the cache, and what stands behind it computed at other positions."""
    session, logits = start(), []
    session.send([PICTURES[1], "what color"], enable_thinking=True, thinking_budget=3, max_new_tokens=12)
    session.send([{"type": "video", "video": CLIPS[0]}, "and this"])
    hook = model.llm.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1]))
    session.send("how many")
    ours, logits[:] = list(logits), []
    stateless(model, processor, session.history[:-1])
    hook.remove()
    for one, other in zip(ours, logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_turn_computes_only_what_is_new(start, fed):
    session = start()
    first = session.send([PICTURES[1], "what is this"], enable_thinking=True, thinking_budget=2, max_new_tokens=12)
    assert fed["slices"] == 5 and fed["tokens"] == first.prompt_tokens + first.generated_tokens - 1
    slots = 5 * session.model.config.query_num
    fed.update(tokens=0, slices=0)
    second = session.send("and what is that")
    assert fed["slices"] == 0
    assert second.cached_tokens > slots
    assert fed["tokens"] == second.prompt_tokens - second.cached_tokens + second.generated_tokens - 1
    # All but the opening of the thought was cached of the first prompt; the answer stands at another place now.
    assert second.cached_tokens >= first.prompt_tokens - 2


def test_pictures_with_equal_slots_are_not_taken_for_each_other(model, processor, start):
    other = wave_picture(90, 70, 5)
    session = start()
    first = session.send([PICTURES[0], "what"])
    session.undo()
    output = session.send([other, "what"])
    slots = prompt_ids(processor, [{"role": "user", "content": [other, "what"]}], False)
    assert output.cached_tokens == slots.index(model.config.image_token_id) < first.prompt_tokens // 2
    assert output.raw_text == stateless(model, processor, [{"role": "user", "content": [other, "what"]}]).raw_text


def test_a_picture_that_the_caller_paints_over_is_a_new_one(model, processor, start):
    """As the array of a camera, or a list of the last frames."""
    frame, clip = np.array(PICTURES[0]), [np.array(PICTURES[0])] * 2
    session = start()
    session.send([frame, {"type": "video", "video": clip}, "what"])
    before = session.history
    frame[:], clip[1] = np.array(PICTURES[0])[::-1], frame
    output = session.send([frame, {"type": "video", "video": clip}, "what"])
    new = {"role": "user", "content": [frame, {"type": "video", "video": clip}, "what"]}
    assert output.raw_text == stateless(model, processor, [*before, new]).raw_text
    np.testing.assert_array_equal(session.history[0]["content"][0], np.array(PICTURES[0]))


def test_every_way_to_give_a_picture_is_read_once(start, fed, tmp_path):
    PICTURES[0].save(tmp_path / "wave.png")
    session = start()
    data = (tmp_path / "wave.png").read_bytes()
    session.send([tmp_path / "wave.png", data, {"type": "image", "image": str(tmp_path / "wave.png")}, "what"])
    slices = fed["slices"]
    (tmp_path / "wave.png").unlink()  # what was read is known
    session.send("and")
    assert fed["slices"] == slices


def test_a_path_that_can_copy_its_file_is_a_path(start, tmp_path):
    """As all of Python 3.14."""

    class CopyingPath(type(tmp_path)):
        def copy(self, target):
            raise AssertionError("nobody wants a copy")

    PICTURES[0].save(tmp_path / "wave.png")
    session = start()
    session.send([CopyingPath(tmp_path / "wave.png"), "what"])
    assert session.history[0]["content"][0] == tmp_path / "wave.png"


def test_a_file_that_was_written_anew_is_a_new_picture_or_clip(model, processor, start, fed, tmp_path):
    """As the snapshot of a camera, under the same name every time."""
    picture, clip = tmp_path / "now.png", tmp_path / "now.gif"
    frames = CLIPS[0]
    PICTURES[0].save(picture)
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    session = start()
    content = [picture, {"type": "video", "video": str(clip)}, "what"]
    first = session.send(content)
    PICTURES[2].save(picture)
    frames[-1].save(clip, save_all=True, append_images=frames[-2::-1], duration=500)
    fed.update(slices=0)
    output = session.send(content)
    assert fed["slices"] > 0
    messages = session.history[:-1]
    assert output.raw_text == stateless(model, processor, messages).raw_text
    assert output.cached_tokens < first.prompt_tokens // 2


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_other_searches_give_the_same_in_a_session(model, processor, start, options):
    session = start(**options)
    for content in ([PICTURES[0], "star star star"], "star star", [PICTURES[1], "how many"]):
        messages = [*session.history, {"role": "user", "content": content}]
        assert session.send(content).raw_text == stateless(model, processor, messages, **options).raw_text


# ---- forks, undo, reset, files ----


def test_a_fork_shares_what_is_computed_and_goes_its_own_way(model, processor, start, fed):
    session = start()
    session.send([PICTURES[1], "what is this"])
    fork = session.fork()
    fed.update(tokens=0, slices=0)
    left = fork.send("how many")
    assert fed["slices"] == 0 and left.cached_tokens > 5 * session.model.config.query_num
    right = session.send([PICTURES[0], "and this"])
    again = fork.send("and now")
    for branch, output in ((session, right), (fork, again)):
        assert output.raw_text == stateless(model, processor, branch.history[:-1]).raw_text
    assert len(session.history) == 4 and len(fork.history) == 6


def test_undo_and_reset(start):
    session = start(system_prompt="Be short!")
    first = str(session.send([PICTURES[0], "what"]))
    before = session.history
    second = str(session.send("more"))
    assert session.undo() == "more" and session.history == before
    assert str(session.send("more")) == second
    session.reset()
    assert session.history == [{"role": "system", "content": "Be short!"}] and session.cached_tokens == 0
    assert str(session.send([PICTURES[0], "what"])) == first
    session.undo()
    with pytest.raises(ValueError, match="no turn"):
        session.undo()


def test_the_history_is_a_copy(start):
    session = start()
    session.send([PICTURES[0], "what"])
    session.history[0]["content"].clear()
    session.history.clear()
    assert session.history[0]["content"] == [PICTURES[0], "what"]


# ---- pictures that are read once ----


def test_encoded_pictures_serve_chats_batches_and_sessions(model, processor, start, fed):
    encoded = model.encode_images(PICTURES[:2], processor)
    fed.update(slices=0)
    questions = [[{"role": "user", "content": [picture, "what"]}] for picture in encoded]
    answers = model.chat(msgs=questions, processor=processor, **FAST)
    assert str(start().send([encoded[1], "what"])) == answers[1]
    assert fed["slices"] == 0
    plain = [[{"role": "user", "content": [picture, "what"]}] for picture in PICTURES[:2]]
    assert model.chat(msgs=plain, processor=processor, **FAST) == answers


def test_an_encoded_picture_is_not_used_otherwise_than_it_was_encoded(model, processor):
    encoded = model.encode_images(PICTURES[1], processor)
    messages = [{"role": "user", "content": [encoded, encoded, "what"]}]
    with pytest.raises(ValueError, match="max_slice_nums"):
        model.chat(msgs=messages, processor=processor, max_slice_nums=1, **FAST)
    with pytest.raises(ValueError, match="as a still image"):
        model.chat(msgs=messages, processor=processor, temporal_ids=[[0, 3]], **FAST)


# ---- bounds ----


def test_fifty_turns_stay_within_the_bounds(model, processor, start):
    session = start(max_tokens=300, max_media=4, system_prompt="Be short!")
    process, sizes, dropped = psutil.Process(), [], 0
    for turn in range(50):
        # A new picture every time: nothing is known from before.
        content = [wave_picture(260, 180, turn), "what"] if turn % 3 == 0 else "and how many shapes are there"
        messages = [*session.history, {"role": "user", "content": content}]
        output = session.send(content, enable_thinking=turn % 2 == 0)
        dropped += output.dropped_turns
        assert session.cached_tokens <= 300
        assert session.history[0]["role"] == "system"
        assert session.history[1:] == [
            *messages[1 + 2 * output.dropped_turns :],
            {"role": "assistant", "content": output.text},
        ]
        if turn in (20, 49):
            sizes.append(process.memory_info().rss)
            expected = stateless(model, processor, session.history[:-1], enable_thinking=turn % 2 == 0)
            assert output.raw_text == expected.raw_text
            gc.collect()
    assert session.dropped_turns == dropped > 10
    assert sizes[1] - sizes[0] < 30 * 2**20


def test_dropped_turns_are_announced(start, caplog):
    session = start(max_media=2)
    outputs = [session.send([PICTURES[0], "what"]) for _ in range(4)]
    # A full session is emptied to three quarters of its limit.
    assert [output.dropped_turns for output in outputs] == [0, 0, 2, 0] and session.dropped_turns == 2
    assert "oldest 2 turns were dropped" in caplog.text


def test_what_does_not_fit_is_refused_with_the_numbers(start):
    session = start(max_tokens=100, when_full="error")
    session.send("what")
    before, cached = session.history, session.cached_tokens
    with pytest.raises(SessionFullError, match="max_tokens=100.*when_full"):
        session.send("how many shapes are there " * 20)
    with pytest.raises(ValueError, match="1 images and videos.*max_media=0"):
        start(max_media=0).send([PICTURES[0], "what"])
    with pytest.raises(ValueError, match="max_new_tokens=100"):
        session.send("what", max_new_tokens=100)
    assert session.history == before and session.cached_tokens == cached
    session.send("and")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_tokens": 10**6}, ValueError, "max_tokens=1000000"),
        ({"max_media": -1}, ValueError, "max_media=-1"),
        ({"when_full": "wait"}, ValueError, "'drop' or 'error'"),
        ({"cache_implementation": "static"}, TypeError, "dynamic cache"),
        ({"max_new_token": 5}, TypeError, "max_new_tokens"),
        ({"history": "no json"}, ValueError, "JSON"),
    ],
)
def test_options_that_make_no_sense_are_refused(model, processor, options, error, words):
    with pytest.raises(error, match=words):
        ChatSession(model, processor, **options)


def test_options_of_the_conversation_are_not_changed_on_the_way(start):
    session = start()
    with pytest.raises(TypeError, match="ChatSession"):
        session.send("what", max_slice_nums=1)
    with pytest.raises(TypeError, match="max_tokens"):
        session.send("what", max_inp_length=100)
    assert session.history == []


def test_a_session_goes_on_from_a_given_history(model, processor, start):
    history = [{"role": "user", "content": [PICTURES[0], "what"]}, {"role": "assistant", "content": "red"}]
    output = start(history=history).send("and")
    assert output.raw_text == stateless(model, processor, [*history, {"role": "user", "content": "and"}]).raw_text


# ---- what goes wrong on the way ----


def test_an_error_in_a_turn_leaves_the_session_as_it_was(model, processor, start, monkeypatch):
    session = start()
    session.send([PICTURES[0], "what"])
    before = session.history

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with pytest.raises(ValueError):
        session.send([REPOSITORY / "no such file.png", "what"])
    for part in (model.vpm, model.llm.model.layers[1]):
        for stream in (False, True):  # an output is no list, but does not come so far
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
                patch.setattr(part, "forward", fail)
                list(session.send([wave_picture(80, 80, 9), "and"], stream=stream))
            assert session.history == before
    messages = [*before, {"role": "user", "content": [PICTURES[1], "how many"]}]
    output = session.send([PICTURES[1], "how many"])
    assert output.raw_text == stateless(model, processor, messages).raw_text


def test_a_stream_equals_the_plain_answer_and_ends_in_the_history(start):
    session = start()
    plain = session.fork().send([PICTURES[0], "what"], enable_thinking=True)
    stream = session.send([PICTURES[0], "what"], enable_thinking=True, stream=True)
    assert "".join(stream) == plain.raw_text == stream.output.raw_text
    assert session.history[-1] == {"role": "assistant", "content": plain.text}
    assert list(stream) == []


def test_a_stopped_stream_leaves_what_was_read_and_a_usable_session(model, processor, start):
    threads = threading.active_count()
    session = start(max_new_tokens=800, min_new_tokens=800, max_tokens=2000)
    with session.send([PICTURES[0], "what"], stream=True) as stream:
        read = next(stream) + next(stream)
    assert stream.output.finish_reason == "cancelled" and stream.output.generated_tokens < 800
    assert session.history[-1] == {"role": "assistant", "content": read} and threading.active_count() == threads
    messages = [*session.history, {"role": "user", "content": "go on"}]
    output = session.send("go on", max_new_tokens=6, min_new_tokens=0)
    assert output.raw_text == stateless(model, processor, messages).raw_text


@pytest.fixture
def interrupts():
    """What Ctrl-C sends is an exception here, also where a shell runs the tests in the background, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signal to a single thread")
@pytest.mark.usefixtures("interrupts")
def test_an_impatient_second_interrupt_does_not_lock_the_session(model, start, monkeypatch):
    """It comes while the first one waits for the model, which still writes to the session's cache."""
    session, forward = start(max_new_tokens=50, min_new_tokens=50), model.llm.forward
    stuck, freed, reader = threading.Event(), threading.Event(), threading.main_thread().ident

    def slow(*args, **kwargs):
        if read:
            stuck.set()
            freed.wait(30)
        return forward(*args, **kwargs)

    def interrupt_twice():
        stuck.wait(30)
        time.sleep(0.5)  # until the reader is back at the stream
        signal.pthread_kill(reader, signal.SIGINT)
        cancelled.wait(30)
        time.sleep(0.2)  # until it waits for the model
        signal.pthread_kill(reader, signal.SIGINT)

    read = []
    monkeypatch.setattr(model.llm, "forward", slow)
    stream = session.send([PICTURES[0], "what"], stream=True)
    cancelled, close = threading.Event(), stream.close
    monkeypatch.setattr(stream, "close", lambda: (cancelled.set(), close()))
    impatience = threading.Thread(target=interrupt_twice)
    impatience.start()
    with pytest.raises(KeyboardInterrupt) as interrupted:
        for piece in stream:
            read.append(piece)
    assert isinstance(interrupted.value.__context__, KeyboardInterrupt)  # the second one
    with pytest.raises(SessionBusyError, match="still answering"):
        session.send("and")
    freed.set()
    stream.close()
    impatience.join()
    assert session.history[-1] == {"role": "assistant", "content": "".join(read)}
    session.send("and")


def test_a_stream_that_was_not_read_leaves_no_trace(start):
    session = start()
    session.send("what", stream=True).close()
    stream = session.send("what", stream=True)
    with pytest.raises(SessionBusyError, match="still answering"):
        session.send("and")
    with pytest.raises(SessionBusyError, match="still answering"):
        session.fork()
    del stream  # like closing it
    assert session.history == []
    session.send("and")


def test_two_threads_with_two_sessions_get_what_each_gets_alone(start):
    talks = [
        [([PICTURES[1], "what"], {}), ("and", {"enable_thinking": True}), ([CLIPS[1], "how"], {})],
        [("star", {}), ([PICTURES[0], "color"], {"sampling": True, "seed": 3}), ("many", {"enable_thinking": "auto"})],
    ]

    def talk(turns, answers):
        session = start(max_new_tokens=16)
        for content, options in turns:
            answers.append("".join(session.send(content, stream=True, **options)))

    alone, together = ([], []), ([], [])
    for turns, answers in zip(talks, alone, strict=True):
        talk(turns, answers)
    threads = [threading.Thread(target=talk, args=pair) for pair in zip(talks, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and all(len(answers) == 3 for answers in together)
