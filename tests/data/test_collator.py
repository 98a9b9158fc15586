"""The training batch: labels are what the assistant wrote, prompts are those of inference, no picture is cut."""

import ast
import json
import logging
import os
import pickle
import re
import subprocess

import pytest
import torch
from conftest import REPOSITORY, wave_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoProcessor

from minicpmv.data.collator import (
    IGNORED,
    ConversationCollator,
    ConversationTooLongError,
)
from minicpmv.data.formats import BadRowError, DataError, conversation_row


NANO = REPOSITORY / "nano"
STAR = str(REPOSITORY / "assets/star.mp4")
SMALL, WIDE, SLICED = (wave_picture(*size) for size in ((60, 40, 0), (300, 200, 1), (700, 500, 2)))
IM_END = 151645


def picture(image):
    return {"type": "image", "image": image}


def conversation(*contents, **columns):
    """A row of alternating questions and answers; questions may be lists of texts and pictures."""
    messages = []
    for place, content in enumerate(contents):
        parts = content if isinstance(content, list) else [content]
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        messages.append({"role": "assistant" if place % 2 else "user", "content": parts})
    return {"messages": messages, **columns}


def learned(collator, row):
    """The text that a row's labels hold."""
    return collator.processor.tokenizer.decode([label for label in collator.encode(row).labels if label != IGNORED])


def rendered(collator, row):
    return collator.processor.tokenizer.decode(collator.encode(row).input_ids)


@pytest.fixture(scope="module")
def collator(processor):
    return ConversationCollator(processor, pad_pixel_values=False)


@pytest.fixture(scope="module")
def nano_processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture
def nano():
    return AutoModel.from_pretrained(NANO, trust_remote_code=True, dtype=torch.float32)


PACKED = {"temporal_ids": [[0, 3, 6], [9, 12]], "use_image_id": False, "max_slice_nums": 1}
MIXED = [
    conversation([picture(SMALL), "What?"], "A wave!"),
    conversation("Hello!", "Hi!", "And now?", "<think>\nHm!\n</think>\n\nStill hi!"),
    conversation([picture(SLICED), picture(WIDE), "Compare!"], "Not alike."),
    conversation([*[picture(SMALL)] * 5, "What moves?"], "Nothing.", **PACKED),
    conversation([{"type": "video", "video": STAR}, "Which way?"], "Left.", fps=2, force_packing=3),
]

# For nano, whose slices are smaller.
LIGHT = [
    *MIXED[:2],
    conversation([picture(SLICED.resize((150, 110))), picture(SMALL), "Compare!"], "Not alike."),
    MIXED[3],
]

# ---- labels ----


def test_a_fast_answer_is_learned_without_its_empty_thought(collator):
    row = conversation([picture(SMALL), "What?"], "A wave!")
    assert learned(collator, row) == "A wave!<|im_end|>"
    assert rendered(collator, row).endswith("assistant\n<think>\n\n</think>\n\nA wave!<|im_end|>\n")
    given = conversation([picture(SMALL), "What?"], "<think>\n\n</think>\n\nA wave!")  # as some datasets write it
    assert collator.encode(given).labels == collator.encode(row).labels


def test_a_thinking_answer_is_learned_with_its_thought(collator):
    row = conversation("What?", "<think>\nLet me see!\n</think>\n\nA wave!")
    assert learned(collator, row) == "<think>\nLet me see!\n</think>\n\nA wave!<|im_end|>"
    assert rendered(collator, row).startswith("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\nLet")


def test_every_turn_is_learned_as_the_template_has_it_or_only_the_last(collator, processor):
    row = conversation("A", "<think>\nHm\n</think>\n\nB", "C", "<think>\nSo\n</think>\n\nD")
    assert learned(collator, row) == "B<|im_end|><think>\nSo\n</think>\n\nD<|im_end|>"
    last = "<think>\nSo\n</think>\n\nD<|im_end|>"
    assert learned(ConversationCollator(processor, train_on="last"), row) == last
    assert learned(collator, row | {"train_on": "last"}) == last
    completion = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    assert learned(collator, completion) == last


PIECES = ["a", "B", "!", " ", "\n", "\t", "\r\n", "7", "é", "你", "😀", " word", "<box>", "<image_id>0</image_id>"]
PIECES += ["<image>", "</image>", "<slice>", "<unk>", "(<image>./</image>)", "<|im_end|>", "<|im_start|>assistant\n"]
REGION = {"type": "text", "text": "Find ", "ref": "the <box> star"}
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
ANSWERS = TEXTS.filter(str.strip)
TURNS = st.tuples(
    st.lists(st.one_of(TEXTS, st.sampled_from([picture(SMALL), picture(SLICED), REGION])), min_size=1, max_size=3),
    st.one_of(st.none(), ANSWERS),  # the thought
    ANSWERS,
)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=3), system=st.one_of(st.none(), TEXTS))
def test_labels_are_the_answers_and_the_prompt_is_that_of_inference(collator, turns, system):
    contents, expected = [], []
    for question, thought, answer in turns:
        contents += [question, answer if thought is None else f"<think>\n{thought}\n</think>\n\n{answer}"]
        answer = re.sub(r"\A\s*\n", "", answer)  # would melt into the line break of the prompt
        thought = thought and re.sub(r"\A\s*\n", "", thought).strip("\n")
        with_thought = thought is not None and len(contents) == 2 * len(turns)
        expected.append((f"<think>\n{thought}\n</think>\n\n" if with_thought else "") + answer + "<|im_end|>")
    row = conversation(*contents)
    row["messages"][:0] = [] if system is None else [{"role": "system", "content": system}]
    encoded = collator.encode(row)
    labels = [label for label in encoded.labels if label != IGNORED]
    assert collator.processor.tokenizer.decode(labels) == "".join(expected)
    assert labels.count(IM_END) == len(turns)  # what users and answers spell out is plain text
    slots = encoded.input_ids.count(collator.processor.image_token_id)
    assert slots == 64 * len(encoded.pixel_values) == 64 * len(encoded.tgt_sizes)
    read = conversation_row(row)["messages"]  # of its answers alone: questions reach the model as they were given
    messages = [
        ours if ours["role"] == "assistant" else given for given, ours in zip(row["messages"], read, strict=True)
    ]
    asked = collator.processor.apply_chat_template(
        messages[:-1],
        tokenize=True,
        add_generation_prompt=True,
        enable_thinking=turns[-1][1] is not None,
    )
    assert encoded.input_ids[: len(asked[0])] == asked[0]


@pytest.mark.parametrize("image", [SMALL, WIDE, SLICED], ids=["small", "one slice", "slices"])
def test_pictures_of_any_size_have_their_number_as_in_inference(collator, image):
    """Training with the number for sliced pictures only, as the published script did, is another prompt than chat()'s."""
    row = conversation([picture(image), "What?"], "A wave.")
    assert "<image_id>0</image_id><image>" in rendered(collator, row)
    prompt = collator.processor.apply_chat_template(
        [{"role": "user", "content": [image, "What?"]}],
        tokenize=True,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert collator.encode(row).input_ids[: len(prompt[0])] == prompt[0]


def test_a_batch_without_any_label_is_an_error(processor):
    silent = AutoProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
    silent.chat_template = re.sub(r"\{%-? *(end)?generation *-?%\}", "", processor.chat_template)
    with pytest.raises(DataError, match="None of the 2 rows"):
        ConversationCollator(silent)(MIXED[:2])


# ---- batches ----


def test_padding_is_on_the_right_and_exclamation_marks_are_no_padding(collator):
    assert collator.processor.tokenizer.convert_tokens_to_ids("!") == 0
    batch = collator([conversation("!!! !", "! !"), conversation("A much longer question than that?", "A" * 50)])
    ids, mask, labels = (batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels"))
    length = sum(mask)
    assert mask == [1] * length + [0] * (len(ids) - length) and length < len(ids)
    assert set(ids[length:]) == {collator.processor.tokenizer.pad_token_id} == {151643}
    assert 0 in ids[:length] and set(labels[length:]) == {IGNORED}
    assert ConversationCollator(collator.processor, pad_to_multiple_of=64)(MIXED)["labels"].shape[1] % 64 == 0


def test_a_mixed_batch_holds_each_row_as_it_is_alone(collator):
    batch = collator(MIXED)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "tgt_sizes", "temporal_ids"}
    for place, row in enumerate(MIXED):
        alone, length = collator.encode(row), int(batch["attention_mask"][place].sum())
        assert batch["input_ids"][place, :length].tolist() == alone.input_ids
        assert batch["labels"][place, :length].tolist() == alone.labels
        assert torch.equal(batch["tgt_sizes"][place], alone.tgt_sizes)
        assert all(torch.equal(*pair) for pair in zip(batch["pixel_values"][place], alone.pixel_values, strict=True))
    assert batch["temporal_ids"][1] == [] and batch["temporal_ids"][2] == [[-1]] * len(batch["pixel_values"][2])
    assert batch["temporal_ids"][3] == PACKED["temporal_ids"]
    assert max(map(len, batch["temporal_ids"][4])) == 3
    assert "temporal_ids" not in collator(MIXED[:3])
    assert set(collator(MIXED[1:2])) == {"input_ids", "attention_mask", "labels"}


def test_options_of_a_row_go_before_those_of_the_collator(processor):
    row = conversation([picture(SLICED), "What?"], "A wave.")
    assert len(ConversationCollator(processor).encode(row).pixel_values) > 1
    one_slice = ConversationCollator(processor, processor_options={"max_slice_nums": 1})
    assert len(one_slice.encode(row).pixel_values) == 1
    assert len(one_slice.encode(row | {"max_slice_nums": 9}).pixel_values) > 1
    assert "<image_id>" not in rendered(one_slice, row | {"use_image_id": False})


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_a_mixed_batch_is_that_of_its_rows(nano, nano_processor, padded):
    nano.eval()
    collator = ConversationCollator(nano_processor, pad_pixel_values=padded)
    with torch.no_grad():
        batch = collator(LIGHT)
        assert padded == all(isinstance(value, torch.Tensor) for value in batch.values())
        losses, counts = [], []
        for row in LIGHT:
            alone = collator([row])
            counts.append(int((alone["labels"] != IGNORED).sum()))
            losses.append(float(nano(**alone).loss) * counts[-1])
        assert float(nano(**batch).loss) == pytest.approx(sum(losses) / sum(counts), abs=1e-4)


def test_temporal_ids_reach_the_model(nano, nano_processor):
    """The published training path left them out: packed clips were trained as if their frames had no time."""
    nano.eval()
    frames = [picture(SMALL.rotate(15 * turn)) for turn in range(5)]
    batch = ConversationCollator(nano_processor)([conversation([*frames, "What moves?"], "It turns.", **PACKED)])
    with torch.no_grad():
        loss = nano(**batch).loss
        later = torch.where(batch["temporal_ids"] >= 0, batch["temporal_ids"] + 50, batch["temporal_ids"])
        assert not torch.isclose(loss, nano(**batch | {"temporal_ids": later}).loss, atol=1e-6)


@pytest.mark.parametrize("rows", [LIGHT, LIGHT[1:2]], ids=["mixed", "text only"])
def test_every_part_of_the_model_gets_gradients(nano, nano_processor, rows):
    nano.train()
    nano(**ConversationCollator(nano_processor)(rows)).loss.backward()
    assert all(parameter.grad is not None for parameter in nano.parameters())
    has_pictures = any(nano.resampler.query.grad.flatten().tolist())
    assert has_pictures == (len(rows) > 1)


# ---- bad rows ----


def test_a_bad_row_is_named_with_its_reason_or_left_out_and_counted(processor, caplog):
    bad = [
        conversation([picture(b"nothing"), "?"], "A", origin="train.json[17]"),
        conversation([picture(SMALL), "?"], "A", id="x9", temporal_ids=[[0, 1]]),
        {"messages": [{"role": "user", "content": "A"}]},
    ]
    reasons = [
        r"Row train\.json\[17\]: 7 bytes: .*not an image",
        "Row x9: .*2 ids",
        "Row place 1 of the batch: .*the user's",
    ]
    collator = ConversationCollator(processor)
    for row, reason in zip(bad, reasons, strict=True):
        with pytest.raises(BadRowError, match=reason):
            collator([MIXED[0], row])
    skipping = ConversationCollator(processor, on_bad_row="skip")
    with caplog.at_level(logging.WARNING):
        batch = skipping([bad[0], MIXED[0], *bad[1:], MIXED[1]])
    assert batch["input_ids"].shape[0] == 2 and skipping.dropped == 3
    assert torch.equal(batch["labels"], collator(MIXED[:2])["labels"])
    assert "Row train.json[17] is left out (1 so far)" in caplog.text and "(3 so far)" in caplog.text
    assert [skipping.accepts(row) for row in (*bad, *MIXED)] == [False] * 3 + [True] * 5


def test_errors_come_whole_out_of_data_loader_workers(processor):
    error = pickle.loads(pickle.dumps(BadRowError("Row 3: no", 3)))
    assert (str(error), error.index) == ("Row 3: no", 3)
    bad = conversation([picture(b"nothing"), "?"], "A", origin="train.json[1]")
    loader = torch.utils.data.DataLoader(
        [MIXED[0], bad], batch_size=2, num_workers=1, collate_fn=ConversationCollator(processor)
    )
    with pytest.raises(BadRowError, match=r"Row train\.json\[1\]"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["on_too_long", "on_bad_row", "train_on"])
def test_an_unknown_policy_is_refused_at_once(processor, name):
    with pytest.raises(ValueError, match=f"{name}='cut' is unknown; choose one of"):
        ConversationCollator(processor, **{name: "cut"})


def test_rows_without_a_conversation_to_learn_are_refused(collator):
    with pytest.raises(BadRowError, match="it needs 'messages'"):
        collator([{"prompt": "A", "chosen": "B", "rejected": "C"}])


# ---- over-long rows ----


def test_too_long_a_row_is_an_error_with_numbers(processor):
    row = conversation([picture(SMALL), "What?"], "A wave." * 20, id="long")
    collator = ConversationCollator(processor, max_length=100)
    count = len(ConversationCollator(processor).encode(row).input_ids)
    with pytest.raises(
        ConversationTooLongError, match=f"Row long: .* {count} tokens, 64 of them for images; the limit is 100"
    ):
        collator([row])
    assert ConversationCollator(processor, max_length=count)([row])["input_ids"].shape[1] == count


def test_too_long_rows_are_dropped_counted_and_never_silently_all_of_them(processor, caplog):
    collator = ConversationCollator(processor, max_length=100, on_too_long="drop")
    long = conversation("A " * 200, "B", origin="train.json[4]")
    with caplog.at_level(logging.WARNING):
        assert collator([long, MIXED[0]])["input_ids"].shape[0] == 1
    assert collator.dropped == 1
    assert "Row train.json[4] is left out (1 so far)" in caplog.text and "the limit is 100" in caplog.text
    with pytest.raises(DataError, match="All 2 rows of a batch were dropped"):
        collator([long, long])
    assert list(filter(collator.accepts, [long, MIXED[0]])) == MIXED[:1]


HISTORY = [
    [picture(SMALL), "The first question, which is rather long?"],
    "<think>\nHm.\n</think>\n\nThe first answer, of several words.",
    "The second question!",
    "The second answer!",
    [picture(WIDE), "The last question?"],
    "<think>\nA thought.\n</think>\n\nThe last answer.",
]


def test_shortening_takes_the_oldest_text_first_and_learns_only_whole_turns(processor):
    row = conversation(*HISTORY)
    row["messages"][:0] = [{"role": "system", "content": "Be kind!"}]
    whole = ConversationCollator(processor).encode(row)
    slot = processor.image_token_id
    last = "<think>\nA thought.\n</think>\n\nThe last answer.<|im_end|>"
    end = "The last question?<|im_end|>\n<|im_start|>assistant\n" + last + "\n"
    seen = set()
    for limit in range(len(whole.input_ids), 0, -1):
        collator = ConversationCollator(processor, max_length=limit, on_too_long="shorten")
        try:
            encoded = collator.encode(row)
        except ConversationTooLongError as error:
            assert f"{64 * 2} of them for images; the limit is {limit}" in str(error)
            break
        text = processor.tokenizer.decode(encoded.input_ids).replace("<unk>", "")
        assert len(encoded.input_ids) <= limit
        assert encoded.input_ids.count(slot) == whole.input_ids.count(slot) == 64 * len(encoded.pixel_values)
        assert text.count("<image_id>") == text.count("</image>") == 2
        assert text.startswith("<|im_start|>system\nBe kind!<|im_end|>\n") and text.endswith(end)
        learned = processor.tokenizer.decode([label for label in encoded.labels if label != IGNORED])
        first = "The first answer, of several words.<|im_end|>"
        second = "The second answer!<|im_end|>"
        assert (
            learned
            == (first if limit == len(whole.input_ids) else "")
            + (second if "The second question!" in text else "")
            + last
        )
        # The oldest goes first: what is left of a text is its end, and all after it is untouched.
        old = "The first question, which is rather long?|The first answer, of several words.|The second question!|" + (
            "The second answer!"
        )
        kept = re.sub(r"<\|im_end\|>\n<\|im_start\|>(user|assistant)\n", "|", text.split("Be kind!<|im_end|>\n")[1])
        kept = re.sub(r"<image_id>\d</image_id><image></image>\n?", "", kept.removeprefix("<|im_start|>user\n"))
        assert old.endswith(kept[: kept.index("The last")].strip("|")), kept
        seen.add(learned)
    assert len(seen) == 3 and limit > 128
    assert "The " not in text.split("The last question?")[0]


def test_frames_of_a_clip_survive_shortening_as_groups(processor):
    row = conversation([*[picture(SMALL)] * 5, "What moves? " * 30], "Nothing.", "Sure?", "Yes.", **PACKED)
    encoded = ConversationCollator(processor, max_length=180, on_too_long="shorten").encode(row)
    assert len(encoded.input_ids) <= 180 and encoded.temporal_ids == PACKED["temporal_ids"]


# ---- other software ----


def train_rows(count=8):
    return [LIGHT[place % 4] | {"origin": f"[{place}]"} for place in range(count)]


def trainer_settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    } | changes


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_and_evaluates(nano, nano_processor, tmp_path):
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model=nano,
        args=TrainingArguments(**trainer_settings(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)),
        train_dataset=train_rows(4),
        eval_dataset=train_rows(2),
        data_collator=ConversationCollator(nano_processor),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(losses(trainer)) == 2
    assert trainer.state.log_history[-2]["eval_loss"] < before


def stream_file(tmp_path):
    """A JSONL file of rows with pictures of their own."""
    rows = []
    for place in range(8):
        Image.new("RGB", (40 + place, 40), (20 * place, 90, 9)).save(tmp_path / f"{place}.png")
        rows.append({"image": f"{place}.png", "conversations": conversation("What color?", f"{place}")["messages"]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_trainer_streams_a_file_with_workers(nano, nano_processor, tmp_path):
    pytest.importorskip("datasets")
    from transformers import Trainer, TrainingArguments

    from minicpmv.data.load import load_conversations

    trainer = Trainer(
        model=nano,
        args=TrainingArguments(**trainer_settings(tmp_path, dataloader_num_workers=1)),
        train_dataset=load_conversations(stream_file(tmp_path), streaming=True),
        data_collator=ConversationCollator(nano_processor),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_sft_trainer_of_trl_trains_on_exactly_these_labels(nano, nano_processor, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from minicpmv.data.load import load_conversations

    dataset = load_conversations(stream_file(tmp_path))
    assert isinstance(dataset, datasets.Dataset)
    collator = ConversationCollator(nano_processor)
    options = {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    trainer = trl.SFTTrainer(
        model=nano,
        args=trl.SFTConfig(**trainer_settings(tmp_path, max_steps=1, per_device_train_batch_size=8, **options)),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=nano_processor,
    )
    with torch.no_grad():
        expected = float(nano(**collator(list(dataset))).loss)
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, abs=1e-4)]


def test_accelerate_slices_batches_row_by_row(nano, nano_processor):
    """On a streaming dataset one process fetches the batch of all and hands out slices (`split_batches=True`)."""
    from accelerate.utils import slice_tensors

    rows = [LIGHT[place] for place in (3, 2, 0, 1)]
    whole = ConversationCollator(nano_processor)(rows)
    model = nano.eval()
    for start in (0, 2):
        part = slice_tensors(whole, slice(start, start + 2))
        with torch.no_grad():
            expected = model(
                **ConversationCollator(nano_processor, pad_pixel_values=False)(rows[start : start + 2])
            ).loss
            assert float(model(**part).loss) == pytest.approx(float(expected), abs=1e-4)


TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from transformers import AutoProcessor
from minicpmv.data.collator import ConversationCollator
from minicpmv.data.load import load_conversations

collator = ConversationCollator(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True))
tokenizer = collator.processor.tokenizer
for split in (True, False):
    config = DataLoaderConfiguration(split_batches=split, dispatch_batches=split)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    rows = load_conversations(sys.argv[2], streaming=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=4 if split else 2, collate_fn=collator)
    for batch in accelerator.prepare(loader):
        answers = [tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) for labels in batch["labels"]]
        reds = ((batch["pixel_values"][:, 0, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        sys.stdout.write(f"{split} {accelerator.process_index} {list(zip(answers, reds))}\\n")
"""


@pytest.mark.slow
def test_two_processes_share_a_stream(tmp_path, warm_python):
    """Batches fetched by one process and sliced, or by each its own: every row goes to one of them, picture and all."""
    pytest.importorskip("datasets")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    arguments = [str(tmp_path / "script.py"), str(NANO), str(stream_file(tmp_path))]
    launch = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHON_EXEC": warm_python}
    done = subprocess.run(launch + arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for split in (True, False):
        lines = re.findall(rf"^{split} ([01]) (\[.*\])$", done.stdout, re.MULTILINE)
        assert sorted(rank for rank, _ in lines) == ["0", "0", "1", "1"]
        seen = [row for _, batch in lines for row in ast.literal_eval(batch)]
        assert sorted(seen) == [(str(place), 20 * place) for place in range(8)]


@pytest.mark.slow
def test_spawned_workers_collate_as_the_main_process(nano_processor):
    collator = ConversationCollator(nano_processor)
    loader = torch.utils.data.DataLoader(
        train_rows(4), batch_size=2, num_workers=1, collate_fn=collator, multiprocessing_context="spawn"
    )
    for number, batch in enumerate(loader):
        expected = collator(train_rows(4)[2 * number : 2 * number + 2])
        assert torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(batch["pixel_values"][0][0], expected["pixel_values"][0][0])


def test_undecoded_pictures_of_datasets_are_loaded_from_bytes_or_path(collator):
    path = REPOSITORY / "assets/number.jpg"
    rows = [
        conversation([picture(image), "?"], "47")
        for image in (Image.open(path), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)})
    ]
    first, *others = (collator.encode(row) for row in rows)
    assert all(torch.equal(other.pixel_values[0], first.pixel_values[0]) for other in others)
