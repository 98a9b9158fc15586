"""Tokens of an answer become pieces: together the same, however they were cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpmv.serving.writing import AnswerWriter, TokenFact


class Letters:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, tokens, **options):
        return bytes(tokens).decode(errors="replace")


def write(text, **options):
    """(thought, text, calls, stopped) of an answer, a byte at a time; and its pieces."""
    writer = AnswerWriter(Letters(), options.pop("thinking", False), **options)
    pieces = []
    for token in text.encode():
        pieces += writer.take(token)
        if writer.is_stopped:
            break
    pieces += writer.finish()
    thought, said = "".join(piece.thought for piece in pieces), "".join(piece.text for piece in pieces)
    return (thought, said, [piece.call for piece in pieces if piece.call], writer.is_stopped), pieces


texts = st.lists(st.sampled_from(["a", "é", "世", "\n", "<", "</think", "</think>", "<tool_call>", "b\n\n"])).map(
    "".join
)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_an_answer_is_what_was_written(text):
    assert write(text)[0] == ("", text, [], False)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_a_thought_is_told_apart_as_the_processor_does(nano_processor, text):
    expected_thought, expected = nano_processor.split_thought(f"<think>\n{text}")
    (thought, said, _, _), _ = write(text, thinking=True)
    assert (thought, said) == (expected_thought, expected)


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(st.sampled_from(["a", "世", "b\n", "<t", "ab"]), min_size=1, max_size=3))
def test_an_answer_ends_before_the_first_stop_string(text, stops):
    (_, said, _, stopped), _ = write(text, stops=stops)
    # The first that was whole when the text had come so far, not the one that begins first.
    length = next((end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)), None)
    head = text if length is None else text[:length]
    assert said == min((head.partition(stop)[0] for stop in stops), key=len)
    assert stopped == (length is not None)


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "世\\n"}}\n</tool_call>'


@pytest.mark.parametrize("before", ["", "Let me see.\n", "a < b\n\n"])
def test_calls_are_parsed_and_the_text_around_them_stays(before):
    (_, said, calls, _), pieces = write(f"{before}{CALL}\n{CALL}", with_calls=True)
    assert said == before.rstrip("\n")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"x": "世\n"})] * 2
    assert sum(bool(piece.text) for piece in pieces) == 0 or before


@pytest.mark.parametrize(
    "text", ["<tool_call>\nno JSON\n</tool_call>", '<tool_call>{"x": 1}</tool_call>', "<tool_call> open"]
)
def test_what_is_no_call_stays_text(text):
    assert write(text, with_calls=True)[0] == ("", text, [], False)


def test_without_tools_a_call_is_text():
    assert write(CALL)[0][:3] == ("", CALL, [])


def test_text_comes_as_soon_as_it_is_certain():
    writer = AnswerWriter(Letters(), thinking=False, stops=["##"])
    said = [["".join(piece.text for piece in writer.take(token))] for token in b"a#b##"]
    assert said == [["a"], [""], ["#b"], [""], [""]]
    assert writer.is_stopped


def test_facts_of_tokens_come_with_the_text_they_belong_to():
    writer = AnswerWriter(Letters(), thinking=True)
    pieces = [piece for token in b"x</think>yz" for piece in writer.take(token, TokenFact(token, -1.0, []))]
    assert [(piece.thought, piece.text, [fact.token for fact in piece.facts]) for piece in pieces] == [
        ("x", "", []),
        ("", "y", [ord("y")]),
        ("", "z", [ord("z")]),
    ]
