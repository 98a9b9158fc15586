"""nano under lmms-eval, on a task of our own from local files. Needs lmms-eval: `make runners`."""

import json
import os
import subprocess
import sys

import pytest
from conftest import NANO, REPOSITORY


pytest.importorskip("lmms_eval")

ASSETS = REPOSITORY / "assets"
QUESTIONS = [
    {"images": ["number.jpg"], "video": "", "question": "What does it say?", "answer": "47"},
    {"images": ["shapes.jpg"], "video": "", "question": "How many shapes are there?", "answer": "2"},
    {"images": ["sum.jpg"], "video": "", "question": "What is the result?", "answer": "17"},
    {"images": [], "video": "star.mp4", "question": "Which way does the shape move?", "answer": "right"},
    {"images": ["number.jpg", "shapes.jpg"], "video": "", "question": "What does it say?", "answer": "47"},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function drawn.doc_to_visual
doc_to_text: !function drawn.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
process_results: !function drawn.process_results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
FUNCTIONS = """
from PIL import Image

FOLDER = {folder!r}

def doc_to_visual(doc):
    images = [Image.open(f"{{FOLDER}}/{{name}}").convert("RGB") for name in doc["images"]]
    return images + [f"{{FOLDER}}/{{doc['video']}}"] * bool(doc["video"])

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {{"right": float(results[0] == doc["answer"])}}
"""


def run(folder, *arguments):
    """What the tool stores of a run on the drawn task: {question: (answer, tokens)}."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "drawn.py").write_text(FUNCTIONS.format(folder=str(ASSETS)))
    (tasks / "drawn.yaml").write_text(TASK.format(name="drawn", data=tasks / "data.jsonl"))
    command = [sys.executable, "-m", "lmms_eval", "--model", "minicpmv", "--tasks", "drawn", "--include_path", tasks]
    command += ["--log_samples", "--output_path", folder / "out", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | offline, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (samples,) = (folder / "out").rglob("*samples_drawn.jsonl")
    (results,) = (folder / "out").rglob("*results.json")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return [answer[0] if isinstance(answer, list) else answer for answer in found], json.loads(results.read_text())


def test_images_several_images_and_packed_video_are_answered(tmp_path):
    options = f"pretrained={NANO},device=cpu,max_num_packing=6,max_num_frames=4"
    answers, results = run(tmp_path, "--model_args", options, "--batch_size", 3)
    assert answers[:2] == ["47", "2"] and answers[3] == "right"
    assert results["results"]["drawn"]["right,none"] >= 0.6


def test_a_thought_has_tokens_of_its_own_and_stays_out_of_the_answer(tmp_path):
    answers, _ = run(tmp_path, "--model_args", f"pretrained={NANO},device=cpu,thinking=True,thought_tokens=200")
    assert answers[2] == "17"


def test_what_does_not_exist_is_refused_by_name():
    from minicpmv.evaluate.adapters.lmms_eval import AdapterError, MiniCPMV45, as_conversation, generation_arguments

    with pytest.raises(AdapterError, match=r"no option max_frames; there are max_slice_nums"):
        MiniCPMV45(str(NANO), max_frames=4)
    with pytest.raises(AdapterError, match="batch_size='auto' is not a number"):
        MiniCPMV45(str(NANO), batch_size="auto")
    from lmms_eval.protocol import ChatMessages

    audio = {"messages": [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]}
    with pytest.raises(AdapterError, match="a question holds audio"):
        as_conversation(ChatMessages(**audio).messages)
    sampled = generation_arguments({"temperature": 0.5, "top_p": 0.9, "until": ["\n\n", "END"]})
    assert (sampled["decoding"], sampled["temperature"], sampled["until"]) == ("sample", 0.5, ["END"])
    assert generation_arguments({"temperature": 0, "top_p": 1.0, "max_new_tokens": 4}) == {
        "until": [],
        "max_new_tokens": 4,
        "decoding": "greedy",
    }


def test_a_part_of_a_video_is_seen_where_the_task_names_it():
    from lmms_eval.protocol import ChatMessages

    from minicpmv.evaluate.adapters.lmms_eval import as_conversation

    part = {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": 2.0}
    conversation, excerpt = as_conversation(ChatMessages(messages=[{"role": "user", "content": [part]}]).messages)
    assert excerpt == {"start": 1.0, "end": 2.0}
    assert conversation == [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
