import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment


CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "chat_template.json").read_text(encoding="utf-8"))
GENERATION_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

property_test = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=50
)


@pytest.fixture(scope="module")
def render(tokenizer):
    def render(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    return render


def assistant_texts(tokenizer, messages, **kwargs):
    """The stretches of text under the assistant mask."""
    batch = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    stretches, before = [], 0
    for token_id, marked in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
        if marked and not before:
            stretches.append([])
        if marked:
            stretches[-1].append(token_id)
        before = marked
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_conversation(render, case):
    assert render(case["messages"], **case["kwargs"]) == case["text"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("trim", [True, False])
def test_same_text_in_plain_jinja_without_the_marks(tokenizer, case, trim):
    template = GENERATION_MARK.sub("", tokenizer.chat_template)
    environment = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = environment.from_string(template).render(messages=case["messages"], **case["kwargs"])
    assert text == case["text"]


def test_tokenizer_reads_the_only_copy(repository, tokenizer):
    assert tokenizer.chat_template == (repository / "chat_template.jinja").read_text(encoding="utf-8")
    assert "chat_template" not in json.loads((repository / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_thinking_literal_that_evaluation_software_edits(tokenizer, render):
    literal = "{{- '<think>\\n' }}"
    assert tokenizer.chat_template.count(literal) == 1
    edited = tokenizer.chat_template.replace(literal, "{{- '<think>\\nI' }}")
    messages = [{"role": "user", "content": "Hi"}]
    text = render(messages, chat_template=edited, add_generation_prompt=True, enable_thinking=True)
    assert text.endswith("assistant\n<think>\nI")


def test_engines_see_that_content_may_be_a_list(tokenizer):
    """vLLM looks for a loop over `message.content`; without one it moves pictures before the text."""
    template = GENERATION_MARK.sub("", tokenizer.chat_template)
    loops = list(jinja2.Environment().parse(template).find_all(jinja2.nodes.For))
    over_messages = {loop.target.name for loop in loops if getattr(loop.iter, "name", None) == "messages"}
    over_content = [loop.iter for loop in loops if isinstance(loop.iter, jinja2.nodes.Getattr)]
    assert any(iter.attr == "content" and iter.node.name in over_messages for iter in over_content)


# --- content as a list -------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PICTURE = "(<image>./</image>)"
VIDEO = "(<video>./</video>)"
PART = st.one_of(
    TEXT.map(lambda text: (text, text)),
    TEXT.map(lambda text: ({"type": "text", "text": text}, text)),
    st.just(({"type": "image"}, PICTURE)),
    st.just(({"type": "image", "image": "a.png"}, PICTURE)),
    st.just(({"type": "image_url", "image_url": {"url": "a.png"}}, PICTURE)),
    st.just(({"type": "video", "video": "a.mp4"}, VIDEO)),
    st.just(({"type": "video_url", "video_url": {"url": "a.mp4"}}, VIDEO)),
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
CONVERSATION = st.lists(st.tuples(ROLES, st.lists(PART, min_size=1, max_size=4)), min_size=1, max_size=5)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@property_test
@hypothesis.given(
    conversation=CONVERSATION,
    tools=st.sampled_from([None, TOOLS]),
    thinking=st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]),
)
def test_list_content_is_its_parts_joined_with_newlines(render, conversation, tools, thinking):
    as_lists = [{"role": role, "content": [part for part, _ in parts]} for role, parts in conversation]
    as_strings = [{"role": role, "content": "\n".join(text for _, text in parts)} for role, parts in conversation]
    kwargs = {"tools": tools, "add_generation_prompt": True, **thinking}
    assert render(as_lists, **kwargs) == render(as_strings, **kwargs)


def test_tool_response_in_a_list_is_not_a_question(render):
    wrapped = "<tool_response>\nsunny\n</tool_response>"
    call = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    for content in (wrapped, [{"type": "text", "text": wrapped}]):
        messages = [{"role": "user", "content": "w?"}, call, {"role": "user", "content": content}]
        assert "<think>\nwhy\n</think>\n\nx" in render(messages)


@pytest.mark.parametrize("content", [None, "", []])
def test_assistant_without_text_may_call_a_tool(render, content):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Zürich"}}}
    messages = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "ok"}, {"type": "image"}]},
    ]
    assert render(messages) == (
        "<|im_start|>user\nw?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n<tool_response>\nok\n{PICTURE}\n</tool_response><|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, "audio"),
        ({"role": "critic", "content": "x"}, "critic"),
    ],
)
def test_unknown_part_or_role_is_an_error_that_names_it(render, message, named):
    with pytest.raises(jinja2.TemplateError, match=f"not {named}"):
        render([message])


# --- what a model is trained on ----------------------------------------------------------------------------------------


def test_mask_covers_the_answers_and_their_closing_token(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\none"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    assert assistant_texts(tokenizer, messages) == ["one<|im_end|>", "two<|im_end|>"]


def test_mask_covers_a_thought_but_not_the_empty_one(tokenizer):
    question = {"role": "user", "content": "1"}
    thought = {"role": "assistant", "content": "ans", "reasoning_content": "abc"}
    plain = {"role": "assistant", "content": "ans"}
    assert assistant_texts(tokenizer, [question, thought]) == ["<think>\nabc\n</think>\n\nans<|im_end|>"]
    assert assistant_texts(tokenizer, [question, plain]) == ["ans<|im_end|>"]


def test_mask_covers_tool_calls_but_not_their_results(tokenizer):
    case = next(case for case in CASES if case["name"] == "tool_two")
    first, second = assistant_texts(tokenizer, case["messages"], **case["kwargs"])
    assert first.startswith("ok\n<tool_call>") and first.endswith("</tool_call><|im_end|>")
    assert second == "done<|im_end|>"


@pytest.mark.parametrize("thinking", [True, False])
def test_answer_follows_its_generation_prompt(render, thinking):
    """What is trained after a prompt is what is generated after it."""
    question = {"role": "user", "content": "1"}
    answer = {"role": "assistant", "content": "ans", **({"reasoning_content": "abc"} if thinking else {})}
    prompt = render([question], add_generation_prompt=True, enable_thinking=thinking)
    assert render([question, answer]).startswith(prompt)


# --- the way back: generated text to message ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thinking", "generated", "message"),
    [
        (False, "Hello\n\nyou<|im_end|>", {"content": "Hello\n\nyou"}),
        (True, "abc\n\ndef\n</think>\n\nHi.<|im_end|>", {"reasoning_content": "abc\n\ndef", "content": "Hi."}),
        (True, "never ends<|im_end|>", {"reasoning_content": "never ends"}),
        (None, "<think>\n\n</think>\n\nHi<|im_end|>\n<|endoftext|>", {"content": "Hi"}),
        (
            None,
            'ok\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            {
                "content": "ok",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ),
    ],
)
def test_response_is_split_into_thought_answer_and_calls(tokenizer, render, thinking, generated, message):
    chat_parsing = pytest.importorskip("transformers.utils.chat_parsing")
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    prompt = render([{"role": "user", "content": "1"}], add_generation_prompt=True, **kwargs)
    assert tokenizer.parse_response(generated, prefix=prompt) == {"role": "assistant", **message}

    parser = chat_parsing.ResponseParser(tokenizer.response_template, prefix=prompt)
    events = list(parser.initial_events)
    for character in generated:
        events += parser.feed(character)
    parsed, last_events = parser.finalize()
    assert parsed == {"role": "assistant", **message}
    streamed = {"reasoning_content": "", "content": ""}
    for event in events + last_events:
        if event["type"] == "region_chunk" and event["field"] in streamed:
            streamed[event["field"]] += event["text"]
    assert streamed == {field: message.get(field, "") for field in streamed}
