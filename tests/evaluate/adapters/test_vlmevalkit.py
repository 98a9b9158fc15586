"""nano under VLMEvalKit, on drawn images and a clip. Needs VLMEvalKit: `make runners`."""

import base64
import csv
import json
import os
import subprocess
import sys

import pytest
from conftest import NANO, REPOSITORY


pytest.importorskip("vlmeval")

ASSETS = REPOSITORY / "assets"
IMAGES = [("number.jpg", "What does it say?"), ("shapes.jpg", "How many shapes are there?")]
# A video set of the runner's own kind: what to ask, and how to ask it.
SCRIPT = """
import sys
import vlmeval.dataset
from vlmeval.dataset.video_base import VideoBaseDataset

class DrawnVideo(VideoBaseDataset):
    TYPE = "Video-MCQ"

    @classmethod
    def supported_datasets(cls):
        return ["DrawnVideo"]

    def prepare_dataset(self, dataset):
        return {"root": ROOT, "data_file": f"{ROOT}/DrawnVideo.tsv"}

    def build_prompt(self, line, video_llm):
        line = self.data.iloc[line]
        return [
            {"type": "video", "value": f"{ROOT}/{line['video']}.mp4"},
            {"type": "text", "value": line["question"]},
        ]

    @classmethod
    def evaluate(cls, eval_file, **judge_kwargs):
        return {}

ROOT = sys.argv.pop(1)
vlmeval.dataset.DrawnVideo = DrawnVideo
vlmeval.dataset.DATASET_CLASSES.append(DrawnVideo)

from minicpmv.evaluate.adapters import vlmevalkit

seen = vlmevalkit.MiniCPMV45.generate_inner

def generate_inner(self, message, dataset=None):
    answer = seen(self, message, dataset)
    print("ASKED", dataset, self._num_frames, self._fps, repr(answer))
    return answer

vlmevalkit.MiniCPMV45.generate_inner = generate_inner
vlmevalkit.main()
"""


def store_tsv(path, lines):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, lines[0], delimiter="\t")
        table.writeheader()
        table.writerows(lines)


@pytest.fixture
def run(tmp_path):
    def run(*arguments, data=None):
        store_tsv(
            tmp_path / "drawn_openended.tsv",
            [
                {"index": number, "image": base64.b64encode((ASSETS / name).read_bytes()).decode(), "question": text}
                for number, (name, text) in enumerate(IMAGES)
            ],
        )
        video = {"index": 0, "video": "star", "question": "Which way does the shape move?", "answer": "right"}
        store_tsv(tmp_path / "DrawnVideo.tsv", [video])
        (tmp_path / "star.mp4").write_bytes((ASSETS / "star.mp4").read_bytes())
        (tmp_path / "drawn.py").write_text(SCRIPT)
        config = {"model": {"ours": {"class": "MiniCPMV45", "model_path": str(NANO)}}, "data": data or {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = [sys.executable, tmp_path / "drawn.py", tmp_path, *arguments, "--work-dir", tmp_path / "out"]
        environment = os.environ | {
            "LMUData": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        asked = [line.split(maxsplit=4)[1:] for line in done.stdout.splitlines() if line.startswith("ASKED")]
        return asked, tmp_path / "out"

    return run


def test_images_are_asked_as_the_stock_class_asks_and_predictions_are_stored(run):
    options = ("--model-path", NANO, "--max-new-tokens", 24)
    asked, output = run(*options, "--", "--data", "drawn_openended", "--mode", "infer")
    assert [line[0] for line in asked] == ["drawn_openended"] * 2
    assert list(output.rglob("minicpmv_drawn_openended.*"))


def test_a_video_is_seen_packed_at_the_frames_or_the_rate_of_its_set(run):
    frames = {"class": "DrawnVideo", "dataset": "DrawnVideo", "nframe": 6}
    asked, _ = run("--", "--config", "config.json", "--mode", "infer", data={"DrawnVideo": frames})
    assert asked == [["DrawnVideo", "6", "None", "'right'"]]


def test_a_video_can_be_seen_at_a_rate(run):
    rate = {"class": "DrawnVideo", "dataset": "DrawnVideo", "fps": 3}
    asked, _ = run("--", "--config", "config.json", "--mode", "infer", data={"DrawnVideo": rate})
    assert asked == [["DrawnVideo", "None", "3", "'right'"]]
