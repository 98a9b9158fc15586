"""Direct preference optimisation: what the trainer is given, step 0, the reference, resuming, rounds with feedback."""

import json
import math
import zlib

import pytest
import torch
from conftest import REPOSITORY, wave_picture


pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import AutoModelForImageTextToText  # noqa: E402

from minicpmv.data.collator import IGNORED, ConversationCollator, ConversationTooLongError  # noqa: E402
from minicpmv.data.formats import BadRowError  # noqa: E402
from minicpmv.data.load import load_conversations  # noqa: E402
from minicpmv.train import dpo, merge  # noqa: E402
from minicpmv.train.common.arguments import parse  # noqa: E402
from minicpmv.train.common.errors import ArgumentsError  # noqa: E402
from minicpmv.train.feedback import run as feedback  # noqa: E402
from minicpmv.train.feedback.respondent import Respondent  # noqa: E402


NANO = str(REPOSITORY / "nano")
LN_2 = math.log(2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A JSONL file with pairs about a picture, a sliced one, two pictures, a packed clip, a video file, and no picture."""
    folder = tmp_path_factory.mktemp("pairs")
    for k, size in enumerate([(120, 90), (320, 300), (100, 130), (112, 112), (112, 112), (112, 112)]):
        wave_picture(*size, k).save(folder / f"{k}.png")
    answers = {"chosen": "a red circle, a blue star", "rejected": "a star"}
    rows = [
        {"images": ["0.png"], "prompt": "Describe the picture."},
        {"images": ["1.png"], "prompt": "Describe the picture.", "max_slice_nums": 4},
        {"images": ["0.png", "2.png"], "prompt": "What is on <image> and on <image>?"},
        {"images": ["3.png", "4.png", "5.png"], "prompt": "What happens?", "temporal_ids": [[0, 3, 6]]},
        {"videos": [str(REPOSITORY / "assets/star.mp4")], "prompt": "What happens?", "fps": 3, "force_packing": 3},
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "Why?"},
            ]
        },
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | answers) + "\n" for row in rows), encoding="utf-8")
    return path


def train(pairs, folder, **options):
    options = {
        "model_name_or_path": NANO,
        "dataset_name": str(pairs),
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,  # with it the two passes agree to its precision only
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return dpo.train(*parse(dpo.GROUPS, flags))


def logged(trainer, name="loss"):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


# ---- what the trainer is given ----


def test_both_answers_get_the_pictures_slices_and_packed_frames_of_their_prompt(pairs, nano_processor):
    rows = list(load_conversations(str(pairs)))
    batch = dpo.PreferenceCollator(nano_processor)(rows)
    half = len(rows)
    assert {name for name in batch} == {
        *("input_ids", "attention_mask", "completion_mask", "pixel_values", "tgt_sizes", "temporal_ids")
    }
    for name in ("pixel_values", "tgt_sizes", "temporal_ids"):
        assert len(batch[name]) == 2 * half
    batch["temporal_ids"] = [[list(map(int, unit)) for unit in units] for units in batch["temporal_ids"]]
    assert batch["temporal_ids"][:half] == batch["temporal_ids"][half:]
    assert batch["temporal_ids"][3] == [[0, 3, 6]]
    assert len(batch["temporal_ids"][4]) > 1 and len(batch["temporal_ids"][4][0]) == 3
    assert batch["temporal_ids"][5] == []
    assert len(batch["pixel_values"][1]) > 1  # slices
    for row in range(half):
        two = []
        for place, answer in ((row, "a red circle, a blue star"), (row + half, "a star")):
            ids, mask = batch["input_ids"][place], batch["completion_mask"][place].bool()
            assert nano_processor.tokenizer.decode(ids[mask]) == f"{answer}<|im_end|>"
            two.append(ids[: int(mask.nonzero()[0])].tolist())
            for pixels, others in zip(batch["pixel_values"][row], batch["pixel_values"][row + half], strict=True):
                assert torch.equal(pixels, others)
        assert two[0] == two[1]
        slots = two[0].count(nano_processor.image_token_id)
        assert slots == len(batch["temporal_ids"][row]) * nano_processor.image_processor.image_feature_size


def test_answers_are_encoded_as_in_supervised_tuning(pairs, nano_processor):
    row = load_conversations(str(pairs))[2]
    tuned = ConversationCollator(nano_processor)([{"messages": row["prompt"] + row["chosen"]}])
    batch = dpo.PreferenceCollator(nano_processor)([row])
    length = tuned["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], tuned["input_ids"][0])
    assert torch.equal(batch["completion_mask"][0, :length].bool(), tuned["labels"][0] != IGNORED)


def test_pairs_that_are_too_long_are_an_error_or_dropped_whole(pairs, nano_processor):
    rows = list(load_conversations(str(pairs)))
    whole = dpo.PreferenceCollator(nano_processor)([rows[0]])["attention_mask"].sum(-1).tolist()
    collator = dpo.PreferenceCollator(nano_processor, max_length=whole[0] - 1)  # the chosen answer alone is too long
    assert whole[1] < whole[0]
    with pytest.raises(ConversationTooLongError, match=r"pairs.jsonl\[0\]"):
        collator([rows[0]])
    collator.on_too_long = "drop"
    batch = collator([rows[0], rows[5]])
    assert len(batch["input_ids"]) == 2 and collator.dropped == 1
    with pytest.raises(BadRowError, match="it needs 'prompt', 'chosen' and 'rejected'"):
        collator([{"messages": rows[0]["prompt"] + rows[0]["chosen"]}])


# ---- step 0 and after ----


@pytest.mark.parametrize(
    "reference",
    [
        {"adapter": "lora"},
        {"adapter": "lora", "train_resampler": True},
        {"adapter": "none"},
        {"adapter": "none", "precompute_ref_log_probs": True},
    ],
    ids=["adapter", "adapter and resampler", "second model", "computed before"],
)
def test_at_step_0_policy_and_reference_agree_for_all_kinds_of_pairs(pairs, tmp_path, reference):
    trainer = train(pairs, tmp_path, max_steps=2, per_device_train_batch_size=6, **reference)
    losses, margins = logged(trainer), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(LN_2, abs=1e-5)
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert losses[1] < losses[0] and margins[1] > 0  # the reference has stayed


def test_encoding_pictures_once_a_pair_changes_nothing(pairs, tmp_path):
    trainer = train(pairs, tmp_path, adapter="lora", per_device_train_batch_size=6)
    assert trainer.shares_features
    batch = trainer.data_collator(list(load_conversations(str(pairs))))
    calls = []
    model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    encode = model.get_image_features
    model.get_image_features = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    losses = []
    for shared in (True, False):
        trainer.shares_features = shared
        calls.clear()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
        assert len(calls) == (1 if shared else 2)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < LN_2
    shuffled = batch | {"temporal_ids": [[list(reversed(unit)) for unit in units] for units in batch["temporal_ids"]]}
    with torch.no_grad():
        assert abs(trainer.compute_loss(trainer.model, shuffled).item() - losses[0]) > 1e-7  # times of frames count


def test_a_pair_whose_picture_breaks_off_ends_the_run_by_name_or_is_left_out(pairs, tmp_path):
    """Its header is whole, so that only decoding brings it to light."""
    whole = (pairs.parent / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    answers = {"chosen": "a red circle", "rejected": "a star"}
    rows = [{"images": [name], "prompt": "?"} | answers for name in (str(pairs.parent / "0.png"), "half.png")]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"adapter": "lora", "per_device_train_batch_size": 2}
    with pytest.raises(BadRowError, match=r"half.jsonl\[1\]"):
        train(path, tmp_path / "stopped", **options)
    options["per_device_train_batch_size"] = 1  # nothing would be left of a batch
    assert len(train(path, tmp_path / "went_on", on_bad_row="skip", max_steps=2, **options).train_dataset) == 1


def test_the_loss_of_supervised_tuning_can_be_mixed_in(pairs, tmp_path, nano_processor):
    rows = [row for row in load_conversations(str(pairs)) if row["temporal_ids"] is None and row["fps"] is None][:2]
    path = tmp_path / "two"
    datasets.Dataset.from_list(rows, features=load_conversations(str(pairs)).features).save_to_disk(path)
    trainer = train(
        path,
        tmp_path / "out",
        adapter="lora",
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5],
        per_device_train_batch_size=2,
    )
    batch = dpo.PreferenceCollator(nano_processor)(rows)
    model = AutoModelForImageTextToText.from_pretrained(NANO, trust_remote_code=True)
    half = {name: value[:2] for name, value in batch.items()}
    labels = half["input_ids"].masked_fill(half.pop("completion_mask") == 0, IGNORED)
    with torch.no_grad():
        likelihood = model(**half, labels=labels).loss.item()
    assert logged(trainer)[0] == pytest.approx(LN_2 + 0.5 * likelihood, rel=1e-3)


def test_a_run_that_goes_on_from_a_checkpoint_has_the_losses_of_one_that_did_not_stop(pairs, tmp_path):
    options = {"adapter": "lora", "train_resampler": True, "per_device_train_batch_size": 1, "save_strategy": "steps"}
    whole = logged(train(pairs, tmp_path / "whole", max_steps=3, **options))
    train(pairs, tmp_path / "parts", max_steps=1, **options)
    again = train(pairs, tmp_path / "parts", max_steps=3, resume_from_checkpoint="last", **options)
    assert logged(again) == pytest.approx(whole, abs=1e-4)


def test_the_adapter_is_saved_without_the_reference_and_can_be_merged(pairs, tmp_path):
    trainer = train(pairs, tmp_path / "adapter", adapter="lora", max_steps=2)
    assert not (tmp_path / "adapter" / "ref").exists()
    assert "direct preference optimization" in (tmp_path / "adapter" / "README.md").read_text()
    merge.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    batch = trainer.data_collator(list(load_conversations(str(pairs)))[:1])
    batch.pop("completion_mask")
    with torch.no_grad():
        trained = trainer.model.eval()(**batch).logits
        assert not torch.allclose(trained, trainer.model.get_base_model()(**batch).logits * 0, atol=1e-3)
        torch.testing.assert_close(merged(**batch).logits, trained, atol=1e-4, rtol=1e-4)


# ---- options ----


def test_wrong_options_are_named(pairs, tmp_path):
    with pytest.raises(ArgumentsError, match="shorten would give the two answers different prompts"):
        train(pairs, tmp_path, on_too_long="shorten")
    with pytest.raises(ArgumentsError, match="truncation_mode belongs to TRL's own preparation of data"):
        train(pairs, tmp_path, truncation_mode="keep_end")


def test_a_file_of_conversations_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "completion": "no"}))
    flags = ["--model_name_or_path", NANO, "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        dpo.main([*flags, "--max_steps", "1"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("minicpmv: The rows are conversations, not pairs")


def test_recipe_and_flags_have_the_same_names():
    _model, _adapter, _, data, args = parse(
        dpo.GROUPS, ["--config", str(REPOSITORY / "recipes/dpo.yaml"), "--dataset_name", NANO, "--beta", "0.2"]
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert (batch, args.learning_rate, args.max_steps, args.beta) == (256, 1e-6, 400, 0.2)
    assert data.dataset_name == NANO
    (_, options) = parse(
        feedback.GROUPS,
        ["--config", str(REPOSITORY / "recipes/feedback.yaml"), "--dataset_name", "x", "--num_answers", "3"],
    )
    assert options.num_answers == 3 and options.claims == "model"


# ---- rounds ----


@pytest.mark.slow
def test_two_rounds_of_feedback_and_optimisation_run_one_after_the_other(tmp_path, monkeypatch):
    """Each round samples from the model of the round before. The verdicts are made up: what nano knows does not matter."""

    def yes_and_no(self, conversations, options=None, features=None):
        texts = [messages[-1]["content"][-1]["text"] for messages in conversations]
        return [(0.1, 0.9) if zlib.crc32(text.encode()) % 2 else (0.9, 0.1) for text in texts]

    monkeypatch.setattr(Respondent, "yes_and_no", yes_and_no)
    monkeypatch.setattr("minicpmv.train.feedback.judged.claims_by_rule", claims_of_any_words)
    for k in range(8):
        wave_picture(120, 100, k).save(tmp_path / f"{k}.png")
    rows = [{"images": [f"{k}.png"], "prompt": "Describe the picture."} for k in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = NANO
    for number in range(2):
        pairs, adapter, merged = (tmp_path / f"{name}{number}" for name in ("feedback", "adapter", "model"))
        feedback.main(
            ["--model_name_or_path", model]  # a path with a space stays whole
            + (
                f"--dataset_name {tmp_path}/prompts.jsonl --output_dir {pairs} --first_prompt {4 * number} --max_prompts 4 "
                "--num_answers 6 --temperature 2.0 --max_new_tokens 24 --length_tolerance 0.9"
            ).split()
        )
        dpo.main(
            [
                "--model_name_or_path",
                model,
                *f"--dataset_name {pairs}/pairs --output_dir {adapter} --adapter lora --max_steps 2 "
                "--per_device_train_batch_size 2 --report_to none --learning_rate 1e-3 --save_strategy no".split(),
            ]
        )
        merge.merge(adapter, merged)
        answers = (pairs / "answers-000.jsonl").read_text()
        assert json.loads(answers.splitlines()[0])["settings"]["model_name_or_path"] == model
        model = str(merged)
    first, second = (
        AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).state_dict()
        for path in (NANO, model)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


def claims_of_any_words(answer):
    from minicpmv.train.feedback.claims import Claim, Reading

    return Reading([Claim(word, f"Is there {word}?") for word in answer.split()[:6]])
