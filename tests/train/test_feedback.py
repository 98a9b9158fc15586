"""Preference pairs from the model's own answers: claims, pairs, sampling, verdicts, the whole command."""

import json
import os
import random
import shutil
import subprocess
import zlib
from collections import Counter
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, wave_picture
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from minicpmv.data.formats import BadRowError  # noqa: E402
from minicpmv.data.load import load_conversations  # noqa: E402
from minicpmv.drawn.wording import CHINESE, ENGLISH  # noqa: E402
from minicpmv.train.common.arguments import ModelArguments  # noqa: E402
from minicpmv.train.common.errors import ArgumentsError, TrainingError  # noqa: E402
from minicpmv.train.feedback import judged  # noqa: E402
from minicpmv.train.feedback import run as feedback  # noqa: E402
from minicpmv.train.feedback.arguments import FeedbackArguments  # noqa: E402
from minicpmv.train.feedback.claims import (  # noqa: E402
    Claim,
    MalformedClaimsError,
    claims_by_rule,
    claims_prompt,
    parse_claims,
)
from minicpmv.train.feedback.judged import Feedback  # noqa: E402
from minicpmv.train.feedback.log import FeedbackLog  # noqa: E402
from minicpmv.train.feedback.pairs import Pair, ScoredAnswer, balance_lengths, choose_pairs  # noqa: E402
from minicpmv.train.feedback.respondent import (  # noqa: E402
    Respondent,
    load_respondent,
    yes_and_no_tokens,
)
from minicpmv.train.feedback.sampling import Answer, sample_answers  # noqa: E402


NANO = str(REPOSITORY / "nano")


@pytest.fixture(scope="module")
def nano():
    return load_respondent(ModelArguments(NANO), trust_remote_code=False)


# ---- claims ----


@pytest.mark.parametrize(
    "caption, questions, unread",
    [
        ("a red circle, a blue star", ["Is there a red circle?", "Is there a blue star?"], []),
        ("An orange cross and a cup.", ["Is there an orange cross?", "Is there a cup?"], []),
        ("There are two cats. A dog", ["Are there two cats?", "Is there a dog?"], []),
        ("a cat, the sky is blue", ["Is there a cat?"], ["the sky is blue"]),
        ("a 3.5 inch disk", ["Is there a 3.5 inch disk?"], []),
        ("红色圆形，两个蓝色星形和3个方形。", ["有红色圆形吗？", "有两个蓝色星形吗？", "有3个方形吗？"], []),
        ("the number 47", [], ["the number 47"]),
        (" , .", [], []),
        (
            "A red star, a cup, a red star, a red star.",
            [
                "Is there a red star?",
                "Is there a cup?",
                "Is there a red star at least twice?",
                "Is there a red star at least 3 times?",
            ],
            [],
        ),
        (
            "红色星形，一只猫，红色星形，一只猫",
            ["有红色星形吗？", "有一只猫吗？", "有至少2个红色星形吗？", "有至少2个猫吗？"],
            [],
        ),
    ],
)
def test_captions_that_list_things_become_questions_by_rule(caption, questions, unread):
    reading = claims_by_rule(caption)
    assert [claim.question for claim in reading.claims] == questions
    assert reading.unread == unread


@pytest.mark.parametrize("say", [ENGLISH, CHINESE])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_nano_is_taught_to_judge_what_a_caption_repeats(say, times):
    """The rule asks what the drawn data ask."""
    name = say.named("orange", "star")
    question = claims_by_rule(say.listing([name] * times)).claims[-1].question
    assert question == say.phrases["repeated_object"][0].format(say.at_least(name, times))


def test_a_language_model_is_shown_question_and_answer_as_they_are():
    prompt = claims_prompt("What is {answer}?", "A {question} mark | and braces.")
    assert prompt.endswith("Question: What is {answer}?\nAnswer: A {question} mark | and braces.")
    assert "claim | " not in prompt.rsplit("Question: ", 1)[1]


def test_lists_of_claims_are_read_with_bullets_and_an_opening_line():
    reply = "Here they are:\n1. The cup is white. | Is the cup white?\n\n- 有一只猫。 | 有一只猫吗？\nThat is all."
    reading = parse_claims(reply)
    assert reading.claims == [Claim("The cup is white.", "Is the cup white?"), Claim("有一只猫。", "有一只猫吗？")]
    assert reading.unread == ["That is all."]
    assert parse_claims(' "None." ').claims == parse_claims("none").unread == []


@pytest.mark.parametrize("reply", ["", "The cup is white.", "The cup is white. | Yes", "a | b | c?", "| Is it?"])
def test_a_reply_without_claims_is_an_error_that_shows_it(reply):
    with pytest.raises(MalformedClaimsError, match="claims_model") as caught:
        parse_claims(reply)
    assert repr(reply) in str(caught.value)


# ---- pairs ----


def answers(*lengths_and_errors):
    return [ScoredAnswer(f"answer {place}", *pair) for place, pair in enumerate(lengths_and_errors)]


def test_fewer_errors_are_preferred_and_near_lengths_taken_first():
    pairs, reason = choose_pairs(7, answers((10, 2), (4, 0), (9, 1), (10, 4), (3, None)), limit=2)
    assert reason is None
    assert [(pair.chosen.errors, pair.rejected.errors, pair.extra_length) for pair in pairs] == [(2, 4, 0), (1, 4, -1)]
    assert {pair.prompt for pair in pairs} == {7}


@pytest.mark.parametrize(
    "given_answers, reason",
    [
        (answers((3, None), (4, None)), "no answer could be scored"),
        ([ScoredAnswer("same", 3, 1)] * 4, "only one answer to compare"),
        (answers((3, 1), (4, 1), (9, None)), "all answers have as many errors"),
    ],
)
def test_prompts_without_a_pair_say_why(given_answers, reason):
    assert choose_pairs(0, given_answers, limit=2) == ([], reason)


def pair_of(extra, number=0):
    return Pair(number, ScoredAnswer("good", 100 + extra, 0), ScoredAnswer("bad", 100, 1))


@given(st.lists(st.integers(-40, 40), max_size=40), st.sampled_from([0.0, 0.25, 0.5]))
@settings(max_examples=80, deadline=None)
def test_after_balancing_each_longer_choice_has_a_shorter_one_beside_it(extras, tolerance):
    pairs = [pair_of(extra, number) for number, extra in enumerate(extras)]
    kept = balance_lengths(pairs, tolerance)
    assert kept == sorted(kept, key=lambda pair: pair.prompt)  # their old order
    assert [pair for pair in kept if not pair.extra_length] == [pair for pair in pairs if not pair.extra_length]
    longer = sorted(pair.extra_length for pair in kept if pair.extra_length > 0)
    shorter = sorted(-pair.extra_length for pair in kept if pair.extra_length < 0)
    assert len(longer) == len(shorter)
    assert all(abs(a - b) <= tolerance * max(a, b) for a, b in zip(longer, shorter, strict=True))
    # Nothing that could still be matched was left out.
    rest = Counter(pair.extra_length for pair in pairs) - Counter(pair.extra_length for pair in kept)
    assert not any(a > 0 > b and abs(a + b) <= tolerance * max(a, -b) for a in rest for b in rest)


def test_where_the_shorter_answer_is_always_better_no_pair_says_so():
    assert balance_lengths([pair_of(-extra) for extra in range(1, 20)]) == []
    assert len(balance_lengths([pair_of(extra) for extra in (-8, -8, 8, 7, 0)])) == 5


# ---- sampling ----


def test_seeded_choices_follow_the_probabilities_and_their_seed_alone(nano):
    scores = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log()

    def choose(seeds):
        prompt = torch.zeros(len(seeds), 1, dtype=torch.long)
        left = nano.model.seeded_choice(seeds, prompt_length=1)(prompt, scores.repeat(len(seeds), 1))
        assert (left > -torch.inf).sum(-1).eq(1).all()
        return left.argmax(-1)

    drawn = choose(range(4000))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.03, rtol=0)
    assert torch.equal(choose([*range(20, 10, -1)]), drawn[11:21].flip(0))


def question(picture, text="Describe the picture."):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def test_answers_depend_on_seed_and_prompt_and_not_on_the_batch(nano):
    pictures = [wave_picture(120 + 10 * k, 100, k) for k in range(4)]

    def sample(prompts, seed=0):
        inputs = nano.render([question(pictures[prompt]) for prompt in prompts])
        features = nano.image_features(inputs)
        inputs = nano.with_features(inputs, features)
        return sample_answers(nano.model, nano.tokenizer, inputs, prompts, 3, seed, 1.5, 1.0, max_new_tokens=8)

    together = sample([0, 1, 2, 3])
    assert together[2:] == sample([2, 3]) and together[1:2] == sample([1])
    assert len({answer.text for group in together for answer in group}) > 4
    assert sample([0, 1], seed=1) != together[:2]
    assert all(answer.finished == (answer.length < 8) or answer.length == 8 for group in together for answer in group)


# ---- verdicts ----


def test_verdicts_are_the_first_token_and_the_same_with_pictures_encoded_before(nano):
    pictures = [wave_picture(150, 100, 1), wave_picture(300, 260, 2)]
    asked = [question(picture, "Is there a red circle?") for picture in pictures]
    verdicts = nano.yes_and_no(asked)
    for conversation, verdict in zip(asked, verdicts, strict=True):
        inputs = nano.render([conversation])
        logits = nano.model(**inputs).logits[0, -1].float().softmax(-1)
        expected = [logits[sorted(ids)].sum().item() for ids in yes_and_no_tokens(nano.tokenizer)]
        assert verdict == pytest.approx(expected, abs=1e-5)
    features = nano.image_features(nano.render([question(picture) for picture in pictures]))
    again = nano.yes_and_no([*asked, asked[0]], None, [*features, features[0]])
    assert again == [pytest.approx(verdict, abs=1e-5) for verdict in [*verdicts, verdicts[0]]]


def test_a_tokenizer_that_begins_yes_and_no_alike_is_refused():
    class Bytes:
        name_or_path = "bytes"
        decode = staticmethod(lambda ids: "x")

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1]}

    with pytest.raises(TrainingError, match="Choose another feedback_model"):
        yes_and_no_tokens(Bytes())


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory, nano):
    """A vision-language model of another kind, with random weights."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=nano.tokenizer.backend_tokenizer, pad_token="<|endoftext|>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=nano.processor.image_token_id)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<unk>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<unk>",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


def test_another_vision_language_model_can_judge(foreign_model):
    judge = load_respondent(ModelArguments(foreign_model), trust_remote_code=False)
    asked = [
        question(wave_picture(60, 40, k), f"Is there a {color} circle?") for k, color in enumerate(("red", "pink"))
    ]
    options = {"max_slice_nums": 4}  # of this model's processor: nothing to the other one
    assert judge.image_features(judge.render(asked, options)) is None
    verdicts = judge.yes_and_no(asked, options)
    assert judge.yes_and_no(asked[1:]) == [pytest.approx(verdicts[1], rel=1e-4)]
    assert all(0 < probability < 1 for pair in verdicts for probability in pair)
    assert verdicts[0] != verdicts[1]


def test_a_language_model_replies_to_texts_alone(nano):
    reader = load_respondent(ModelArguments(NANO), trust_remote_code=False, language_only=True)
    texts = ["What color is the circle?", "Is there a star? Say it at once."]
    assert reader.processor is reader.tokenizer
    assert reader.reply(texts, 6) == nano.reply(texts, 6)
    with pytest.raises(ArgumentsError, match="cannot be loaded as AutoModelForImageTextToText"):
        load_respondent(ModelArguments("nobody/nothing"), trust_remote_code=False)


# ---- the command ----


def png(picture):
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A JSONL file of prompts about one picture, two pictures, frames that are packed, and a video."""
    folder = tmp_path_factory.mktemp("prompts")
    for k in range(4):
        wave_picture(120, 90, k).save(folder / f"{k}.png")
    rows = [{"images": [f"{k}.png"], "prompt": f"What do you see? ({k})"} for k in range(4)]
    rows.append({"images": ["0.png", "1.png"], "prompt": "What is on both?"})
    rows.append({"images": ["0.png", "1.png", "2.png"], "prompt": "What happens?", "temporal_ids": [[0, 3, 6]]})
    star = str(REPOSITORY / "assets/star.mp4")
    rows.append({"videos": [star], "prompt": "Which way?", "fps": 2, "force_packing": 3})
    rows = [row | {"use_image_id": False} for row in rows]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def verdict_of(text):
    """Made up, but the same each time."""
    return zlib.crc32(text.encode()) % 3 == 0


@pytest.fixture
def scripted(monkeypatch):
    """Captions and verdicts from a script, so that what follows does not hang on what nano has learned."""
    calls = SimpleNamespace(sampled=[], asked=[])

    def sample(model, tokenizer, inputs, prompts, count, seed, *rest, **options):
        calls.sampled += prompts
        groups = []
        for prompt in prompts:
            rng = random.Random(f"{seed}/{prompt}")
            texts = [
                ", ".join(f"a {rng.choice(['red', 'blue', 'pink'])} {rng.choice(['cup', 'cat'])}" for _ in range(2))
                for _ in range(count - 2)
            ]
            groups.append([Answer(text, 6, True) for text in texts])
            groups[-1] += [Answer("it is nice", 3, True), Answer("a red", 2, False)]
        return groups

    def yes_and_no(self, conversations, options=None, features=None):
        texts = [messages[-1]["content"][-1]["text"] for messages in conversations]
        calls.asked += texts
        return [(0.1, 0.9) if verdict_of(text) else (0.9, 0.1) for text in texts]

    monkeypatch.setattr(judged, "sample_answers", sample)
    monkeypatch.setattr(Respondent, "yes_and_no", yes_and_no)
    return calls


def run(prompts, folder, model=NANO, **options):
    args = FeedbackArguments(dataset_name=str(prompts), output_dir=str(folder), batch_size=2, **options)
    return feedback.run(ModelArguments(str(model)), args)


def log_of(folder):
    lines = [
        json.loads(line) for path in sorted(folder.glob("answers-*.jsonl")) for line in path.open(encoding="utf-8")
    ]
    return {line["prompt"]: line for line in lines if "prompt" in line}


def test_pairs_are_saved_as_a_preference_dataset_and_everything_is_counted(prompts, scripted, tmp_path, nano):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    summary = run(prompts, tmp_path)
    assert summary["prompts"] == 7
    assert summary["prompts_with_pairs"] + sum(summary["prompts_without_pairs"].values()) == 7
    assert summary["answers"] == 56
    assert summary["answers_without_score"] == {"parts that are not claims": 7, "cut at max_new_tokens": 7}
    assert summary["claims_rejected"] == sum(
        claim["no"] > claim["yes"]
        for line in log_of(tmp_path).values()
        for a in line["answers"]
        for claim in a["claims"]
    )
    once = [{c["question"] for a in line["answers"] for c in a["claims"]} for line in log_of(tmp_path).values()]
    assert len(scripted.asked) == sum(map(len, once)) < summary["claims"]  # each question once a prompt
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

    saved = datasets.load_from_disk(tmp_path / "pairs")
    assert len(saved) == summary["pairs"] > 3
    assert {"prompt", "chosen", "rejected", "images", "origin", "temporal_ids"} <= set(saved.column_names)
    for row in saved:
        claims = {side: claims_by_rule(row[side][0]["content"][0]["text"]).claims for side in ("chosen", "rejected")}
        errors = {side: sum(verdict_of(claim.question) for claim in found) for side, found in claims.items()}
        assert (row["chosen_errors"], row["rejected_errors"]) == (errors["chosen"], errors["rejected"])
        assert errors["chosen"] < errors["rejected"]
        assert len(row["images"]) == sum(part["type"] == "image" for part in row["prompt"][0]["content"])
    pictured = next(row for row in saved if len(row["images"]) == 1)
    stock = DataCollatorForVisionPreference(nano.processor)([dict(pictured)])  # TRL's own reads them as well
    assert len(stock["input_ids"]) == len(stock["pixel_values"]) == 2
    (prompts.parent / "0.png").rename(prompts.parent / "moved.png")  # pictures were stored, not their paths
    try:
        rows = load_conversations(str(tmp_path / "pairs"))
    finally:
        (prompts.parent / "moved.png").rename(prompts.parent / "0.png")
    video = next(row for row in rows if row["fps"])
    assert video["prompt"][0]["content"][0]["video"].endswith("star.mp4") and video["force_packing"] == 3
    clip = next(row for row in rows if row["temporal_ids"])
    assert [part["type"] for part in clip["prompt"][0]["content"]] == ["image"] * 3 + ["text"]
    assert clip["temporal_ids"] == [[0, 3, 6]]
    assert clip["prompt"][0]["content"][0]["image"]["bytes"] == (prompts.parent / "0.png").read_bytes()


def test_a_run_that_was_killed_goes_on_and_ends_like_one_that_was_not(prompts, scripted, tmp_path, monkeypatch):
    whole = run(prompts, tmp_path / "whole")
    records, batches = Feedback.records, []

    def killed(self, batch):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(batch)
        return records(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Feedback, "records", killed)
        run(prompts, tmp_path / "killed")
    log = tmp_path / "killed" / "answers-000.jsonl"
    assert len(log_of(tmp_path / "killed")) == 4
    log.write_bytes(log.read_bytes() + b'{"prompt": 5, "answ')  # in the middle of a line
    scripted.sampled.clear()
    assert run(prompts, tmp_path / "killed") == whole
    assert len(scripted.sampled) == 3
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    # Pairs are chosen anew without asking again.
    assert run(prompts, tmp_path / "killed", pairs_per_prompt=1)["pairs"] < whole["pairs"]
    assert len(scripted.sampled) == 3


def test_a_log_of_other_options_or_prompts_is_refused(prompts, scripted, tmp_path):
    run(prompts, tmp_path / "out")
    with pytest.raises(TrainingError, match="made with seed = 0, not 1. Take another output_dir"):
        run(prompts, tmp_path / "out", seed=1)
    text = prompts.read_text()
    try:
        prompts.write_text(text.replace("What", "Which"))
        with pytest.raises(TrainingError, match=r"prompts.jsonl\[\d\] has changed"):
            run(prompts, tmp_path / "out")
    finally:
        prompts.write_text(text)
    # The same path, but trained further since.
    shutil.copytree(NANO, model := tmp_path / "model")
    run(prompts, tmp_path / "further", model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(TrainingError, match="made with weights = .*Take another output_dir"):
        run(prompts, tmp_path / "further", model)
    log = tmp_path / "out" / "answers-000.jsonl"
    log.write_text(log.read_text().replace('"errors"', "errors", 1))
    with pytest.raises(TrainingError, match="line 2 is damaged"):
        run(prompts, tmp_path / "out")


@pytest.mark.parametrize("line", ["null", "[1]", "3", "{}", '{"prompt": "x"}', '{"settings": 5}', "\0", "[" * 100_000])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    FeedbackLog(tmp_path, {"seed": 0}).add([{"prompt": 0}])
    path = tmp_path / "answers-000.jsonl"
    path.write_text(path.read_text() + line + "\n" + '{"prompt": 1}\n')
    with pytest.raises(TrainingError, match=r"answers-000\.jsonl, line 3 is damaged .* Delete the line"):
        FeedbackLog(tmp_path, {"seed": 0})


def test_rounds_take_their_own_prompts(prompts, scripted, tmp_path):
    run(prompts, tmp_path, first_prompt=4, max_prompts=2)
    assert scripted.sampled == [4, 5]
    with pytest.raises(ArgumentsError, match="first_prompt is 7, but .* has 7 prompts"):
        run(prompts, tmp_path, first_prompt=7)


def test_claims_by_a_language_model_and_replies_that_cannot_be_read(prompts, scripted, tmp_path, monkeypatch):
    def reply(self, texts, max_new_tokens):
        replies = []
        for text in texts:
            answer = text.rsplit("Answer: ", 1)[1]
            claims = "\n".join(f"- There is {thing}. | Is there {thing}?" for thing in answer.split(", "))
            replies.append("I cannot say." if "pink cat" in answer else "none" if "nice" in answer else claims)
        return replies

    monkeypatch.setattr(Respondent, "reply", reply)
    summary = run(prompts, tmp_path, claims="model")
    texts = [answer for line in log_of(tmp_path).values() for answer in line["answers"]]
    malformed = sum("pink cat" in answer["text"] for answer in texts)
    assert malformed and summary["answers_without_score"]["list of claims not readable"] == malformed
    assert summary["answers_without_score"]["no claim"] == 7
    assert all(asked.endswith("? Please answer yes or no.") for asked in scripted.asked)
    assert not any("pink cat" in a["text"] and a["errors"] is not None for a in texts)


def test_a_picture_that_cannot_be_decoded_ends_the_run_or_is_counted(prompts, scripted, tmp_path):
    whole = (prompts.parent / "3.png").read_bytes()
    try:
        (prompts.parent / "3.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadRowError, match=r"prompts.jsonl\[3\]: .*3.png"):
            run(prompts, tmp_path / "raise")
        summary = run(prompts, tmp_path / "skip", on_bad_row="skip")
    finally:
        (prompts.parent / "3.png").write_bytes(whole)
    assert summary["prompts"] == 7 and summary["prompts_without_pairs"]["bad row"] == 1


PROGRAM = """
import sys, zlib
from minicpmv.train.feedback import judged, respondent, run
from minicpmv.train.feedback.claims import Claim, Reading
judged.claims_by_rule = lambda answer: Reading([Claim(word, f"Is there {word}?") for word in answer.split()[:5]])
rejects = lambda asked: zlib.crc32(asked[-1]["content"][-1]["text"].encode()) % 2
respondent.Respondent.yes_and_no = lambda self, asked, *rest: [(0, 1) if rejects(one) else (1, 0) for one in asked]
run.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_one_can_go_on_alone(prompts, tmp_path, scripted, warm_python):
    program, output = tmp_path / "program.py", tmp_path / "output"
    program.write_text(PROGRAM)
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "recipes/accelerate/ddp.yaml",
        "--num_processes",
        "2",
    ]
    launch += ["--mixed_precision", "no", "--main_process_port", "0", str(program), "--model_name_or_path", NANO]
    launch += ["--dataset_name", str(prompts), "--output_dir", str(output), "--batch_size", "2", "--use_cpu", "true"]
    launch += ["--temperature", "2.0", "--max_new_tokens", "12", "--length_tolerance", "0.9"]
    done = subprocess.run(
        [warm_python, *launch],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHON_EXEC": warm_python},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [
        sorted(json.loads(line)["prompt"] for line in path.read_text().splitlines()[1:])
        for path in sorted(output.glob("answers-*.jsonl"))
    ]
    assert shared == [[0, 2, 4, 6], [1, 3, 5]]
    assert json.loads((output / "summary.json").read_text())["prompts"] == 7
    second = output / "answers-001.jsonl"
    second.write_text("".join(second.read_text().splitlines(keepends=True)[:2]))  # as if it had been killed
    run(prompts, output, temperature=2.0, max_new_tokens=12, length_tolerance=0.9)
    assert scripted.sampled == [3, 5]


def test_without_a_pair_the_command_says_in_one_line_what_became_of_the_prompts(
    prompts, scripted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Respondent, "yes_and_no", lambda self, asked, *rest: [(0.9, 0.1)] * len(asked))
    flags = ["--model_name_or_path", NANO, "--dataset_name", str(prompts), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        feedback.main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("minicpmv: 7 prompts gave no pair") and "all answers have as many errors" in error
    with pytest.raises(SystemExit):
        feedback.main([*flags, "--temperture", "2"])
    assert "Did you mean '--temperature'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_answers": 1}, "num_answers is 1"),
        ({"temperature": 0.0}, "temperature 0.0 must be more than 0"),
        ({"claims_model": "x"}, "Add claims: model"),
        ({"max_prompts": 0}, "max_prompts is 0"),
        ({"dataset_name": None}, "dataset_name is missing"),
    ],
)
def test_wrong_options_are_named_before_anything_loads(changes, message):
    with pytest.raises(ArgumentsError, match=message):
        FeedbackArguments(**{"dataset_name": "x", "output_dir": "y"} | changes)
