"""The assistant: personalities, what it remembers, and its transcripts. nano answers; what it says does not matter here."""

import json

import numpy as np
import pytest
from conftest import GREEDY, REPOSITORY
from PIL import Image

from minicpmv.chat import ChatSession
from minicpmv.chat.assistant import FORGOTTEN, PERSONALITIES, Assistant, AssistantError


@pytest.fixture
def assistant(nano_model, nano_processor):
    def make(**options):
        return Assistant(nano_model, nano_processor, **{"max_new_tokens": 4, **GREEDY, **options})

    return make


def picture(color="red"):
    return Image.new("RGB", (60, 40), color)


def seen(assistant):
    """The texts of the questions in what the model sees, FORGOTTEN and pictures included."""
    contents = [message["content"] for message in assistant.history if message["role"] == "user"]
    return [
        [part if isinstance(part, str) else "picture" for part in ([content] if isinstance(content, str) else content)]
        for content in contents
    ]


@pytest.mark.parametrize("name", sorted(PERSONALITIES))
def test_a_personality_is_the_system_prompt(assistant, name):
    talk = assistant(personality=name)
    assert talk.history == [{"role": "system", "content": PERSONALITIES[name]}]


def test_own_text_takes_the_place_of_a_personality(assistant):
    assert assistant(system_prompt="Speak like a pirate.").history[0]["content"] == "Speak like a pirate."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"personality": "freindly"}, "helpful, concise, friendly"),
        ({"media": "some"}, "keep, latest, once"),
        ({"max_turns": 0}, "max_turns=0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(assistant, options, words):
    with pytest.raises(AssistantError, match=words):
        assistant(**options)


def test_turns_are_the_same_as_those_of_a_stateless_chat(assistant, nano_model, nano_processor):
    talk, messages = assistant(), [{"role": "system", "content": PERSONALITIES["helpful"]}]
    for content in ([picture(), "What color is it?"], ["And now?"]):
        messages.append({"role": "user", "content": content})
        output = talk.send(content)
        assert output.text == nano_model.chat(msgs=messages, processor=nano_processor, max_new_tokens=4, **GREEDY)
        messages.append({"role": "assistant", "content": output.text})
    assert output.cached_tokens > 0
    assert [turn.answer for turn in talk.turns] == [message["content"] for message in messages[2::2]]


def test_a_picture_that_the_caller_paints_over_stays_what_it_was(assistant):
    talk, frame = assistant(max_turns=2), np.asarray(picture()).copy()
    for _ in range(3):  # the third one starts a new session from what is kept
        before = frame.copy()
        talk.send([frame, "What color is it?"])
        np.testing.assert_array_equal(talk.turns[-1].content[0], before)
        frame[:] = frame // 2
        np.testing.assert_array_equal(talk.turns[-1].content[0], before)


def test_too_many_turns_forget_the_oldest_and_say_so(assistant):
    talk = assistant(max_turns=4)
    dropped = [talk.send([f"Question {number}"]).dropped_turns for number in range(6)]
    assert dropped == [0, 0, 0, 0, 2, 0]
    assert seen(talk) == [["Question 2"], ["Question 3"], ["Question 4"], ["Question 5"]]
    assert [turn.content for turn in talk.turns] == [[f"Question {number}"] for number in range(6)]
    assert [turn.dropped_turns for turn in talk.turns] == dropped


def test_too_many_tokens_forget_the_oldest_and_say_so(assistant):
    talk = assistant(max_tokens=400, system_prompt="Hi")
    outputs = [talk.send(["A question of several words, again and again. " * 2]) for _ in range(6)]
    assert outputs[0].dropped_turns == 0 and any(output.dropped_turns for output in outputs)
    assert all(output.prompt_tokens + output.generated_tokens <= 400 for output in outputs)
    assert len(talk.turns) == 6
    assert len(seen(talk)) == 6 - sum(output.dropped_turns for output in outputs)


def test_pictures_are_kept_shown_while_they_are_the_latest_or_shown_once(assistant):
    contents = [[picture(), "A"], ["B"], [picture("blue"), "C"], ["D"]]
    expected = {
        "keep": [["picture", "A"], ["B"], ["picture", "C"], ["D"]],
        "latest": [[FORGOTTEN, "A"], ["B"], ["picture", "C"], ["D"]],
        "once": [[FORGOTTEN, "A"], ["B"], [FORGOTTEN, "C"], ["D"]],
    }
    for media, questions in expected.items():
        talk = assistant(media=media)
        for content in contents:
            talk.send(content)
        assert seen(talk) == questions, media


def test_a_stream_becomes_a_turn_and_gives_the_same_answer(assistant):
    plain, streamed = assistant(), assistant()
    answer = plain.send([picture(), "What color is it?"]).text
    assert "".join(streamed.stream([picture(), "What color is it?"])) == answer
    assert streamed.turns[0].answer == answer and streamed.turns[0].finish_reason == plain.turns[0].finish_reason


def test_what_was_read_of_a_closed_stream_is_the_answer(assistant):
    talk = assistant(max_new_tokens=64, min_new_tokens=60)
    stream = talk.stream(["Describe everything."])
    piece = next(stream)
    stream.close()
    assert talk.turns[0].answer == piece and talk.turns[0].finish_reason == "cancelled"
    talk.send("Go on.")
    assert len(seen(talk)) == 2


def test_a_turn_that_fails_changes_nothing(assistant, nano_model, monkeypatch):
    talk = assistant(max_turns=2)
    talk.send("One")
    talk.send("Two")
    before = seen(talk)

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(nano_model.llm, "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            talk.send("Three")
    assert seen(talk) == before and len(talk.turns) == 2
    assert talk.send("Three").dropped_turns == 2
    assert seen(talk) == [["Three"]]


def test_reset_begins_anew(assistant):
    talk = assistant()
    talk.send("One")
    talk.reset()
    assert talk.turns == [] and seen(talk) == []


def test_a_transcript_holds_everything_and_can_be_gone_on_from(assistant, nano_model, nano_processor, tmp_path):
    talk = assistant(media="once", max_turns=2, personality="concise")
    talk.send([picture(), "What color is it?"])
    talk.send([{"type": "video", "video": str(REPOSITORY / "assets" / "star.mp4")}, "And <b>now</b>?"])
    talk.send("The end?", min_new_tokens=4)
    folder = tmp_path / "talk"
    text = talk.save(folder).read_text(encoding="utf-8")
    assert PERSONALITIES["concise"] in text and f"![image]({next(folder.glob('*.png')).name})" in text
    assert f"[video]({next(folder.glob('*.mp4')).name})" in text
    assert seen(talk) == [["The end?"]]
    for turn in talk.turns:
        assert turn.time in text and turn.answer in text
    assert "no longer sees the 2 oldest turns" in text and "unfinished: length" in text
    messages = json.loads((folder / "history.json").read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    again = ChatSession.load(folder, nano_model, nano_processor)
    assert len(again.history) == 7
    talk.send("More?")
    talk.save(folder)  # replaces the older one
    assert "More?" in (folder / "transcript.md").read_text(encoding="utf-8")


def test_a_transcript_replaces_nothing_else(assistant, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="no saved history"):
        assistant().save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
