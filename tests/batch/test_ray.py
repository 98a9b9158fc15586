"""Several processes of Ray answer as one does. Where Ray is not installed, `make batch` runs these."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from answering import Echo, EchoOptions

from minicpmv.batch.answerers import EngineError
from minicpmv.batch.jobs import Asked
from minicpmv.batch.run import Workers, open_batch
from minicpmv.errors import MiniCPMVError


pytest.importorskip("ray", reason="make batch runs it in an environment of its own")


class Signed(Echo):
    """Says also which process answers; the last of ten dies once."""

    def answer(self, what, body):
        reply = super().answer(what, body)
        message = reply["choices"][0]["message"]
        if message["content"] == "die" and not (marker := Path(body["marker"])).exists():
            marker.touch()
            os._exit(1)
        message["reasoning_content"] = str(os.getpid())
        return reply


@dataclass(frozen=True)
class SignedOptions(EchoOptions):
    def open(self):
        return Signed(self.seconds)


@dataclass(frozen=True)
class BrokenOptions(EchoOptions):
    def open(self):
        raise EngineError("no such model")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    folder = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000
        )
        yield
        ray.shutdown()


@pytest.fixture
def source(tmp_path):
    def write(texts):
        rows = [{"id": place, "messages": [{"role": "user", "content": text}]} for place, text in enumerate(texts)]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "in.jsonl"

    return write


def run(source, output, options, asked=None, count=2, **more):
    with open_batch(source, output, options, asked or Asked(), workers=Workers(count), **more) as batch:
        return batch.done, list(batch.rows)


def test_two_workers_answer_every_row_once_and_in_order(source, tmp_path):
    texts = ["bad" if place % 9 == 8 else f"text {place}" for place in range(300)]
    _, rows = run(source(texts), tmp_path / "out.jsonl", SignedOptions(seconds=0.5), ordered=True)
    assert [row["text"] or "bad" for row in rows] == texts
    assert len({row.get("reasoning") for row in rows} - {None}) == 2
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows


def test_a_run_that_was_stopped_goes_on(source, tmp_path):
    path, output = source([f"text {place}" for place in range(300)]), tmp_path / "out.jsonl"
    with open_batch(path, output, SignedOptions(seconds=1), Asked(), workers=Workers(2)) as batch:
        seen = {next(batch.rows)["id"] for _ in range(40)}
    done, rows = run(path, output, SignedOptions())
    assert done == 40 and sorted(seen | {row["id"] for row in rows}) == list(range(300)) and len(rows) == 260


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost_or_twice(source, tmp_path):
    texts = ["die" if place == 40 else f"text {place}" for place in range(200)]
    asked = Asked(fields={"marker": str(tmp_path / "died")})
    _, rows = run(source(texts), tmp_path / "out.jsonl", SignedOptions(seconds=0.2), asked)
    assert (tmp_path / "died").exists()
    assert sorted(row["id"] for row in rows) == list(range(200))


def test_errors_of_workers_come_as_they_are(source, tmp_path):
    path = source(["a", "gone", "c"])
    with pytest.raises(EngineError, match="the engine has stopped"):
        run(path, tmp_path / "out.jsonl", EchoOptions())
    with pytest.raises(EngineError, match="no such model"):
        run(path, tmp_path / "out.jsonl", BrokenOptions())
    with pytest.raises(MiniCPMVError, match="3 workers are more than the 2 CPU cores"):
        run(path, tmp_path / "out.jsonl", EchoOptions(), count=3)
