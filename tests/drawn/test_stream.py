"""Synthetic rows as a stream: the same rows anywhere, shared out to workers, ready for the collator."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from minicpmv.data.collator import ConversationCollator
from minicpmv.data.load import load_conversations
from minicpmv.drawn.samples import Mixture, SampleError, make_sample
from minicpmv.drawn.stream import SyntheticData, conversation_row, synthetic_dataset


NANO = Path(__file__).resolve().parents[2] / "nano"


def questions(rows):
    return sorted(row["messages"][0]["content"][-1]["text"] for row in rows)


def test_a_stream_holds_the_samples_of_its_indices_each_once():
    rows = list(synthetic_dataset(SyntheticData(samples=13, start=5, shards=4)))
    samples = [make_sample("train", 0, index, Mixture()) for index in range(5, 18)]
    assert questions(rows) == questions(map(conversation_row, samples))


def test_workers_share_a_stream():
    stream = synthetic_dataset(SyntheticData(samples=10, shards=2))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda row: row)
    assert questions(loader) == questions(stream)


def test_a_yaml_file_describes_a_stream_for_the_trainers(tmp_path):
    file = tmp_path / "mixture.yaml"
    file.write_text("samples: 6\nseed: 3\nmixture: {scenes: {sum: 1, clip_move: 1, form: 1}, thinking: 1.0}\n")
    rows = list(load_conversations(file))
    assert len(rows) == 6
    processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
    batch = ConversationCollator(processor)(rows)
    assert batch["input_ids"].shape[0] == 6 and (batch["labels"] >= 0).any(1).all()


def test_a_misspelt_field_and_an_empty_stream_are_refused(tmp_path):
    file = tmp_path / "mixture.yaml"
    file.write_text("sampels: 6\n")
    with pytest.raises(SampleError, match="sampels"):
        load_conversations(file)
    with pytest.raises(SampleError, match="at least 1"):
        synthetic_dataset(SyntheticData(samples=0))
    with pytest.raises(SampleError, match="'trian' is none of train"):
        synthetic_dataset(SyntheticData(split="trian"))
    with pytest.raises(SampleError, match="no scenes shape; scenes are shapes, "):
        synthetic_dataset(SyntheticData(mixture=Mixture(scenes={"shape": 1, "line": 1})))
    with pytest.raises(SampleError, match="video_order"):
        synthetic_dataset(SyntheticData(mixture=Mixture(scenes={"line": 1}, tasks=["video_order"])))


def test_only_questions_of_the_named_kinds_are_asked():
    mixture = Mixture(scenes={"shapes": 1, "line": 1}, tasks=["caption"])
    assert {turn.task for i in range(20) for turn in make_sample("train", 0, i, mixture).turns} == {"caption"}
    with pytest.raises(SampleError, match="video_order"):
        make_sample("train", 0, 0, Mixture(scenes={"line": 1}, tasks=["video_order"]))
