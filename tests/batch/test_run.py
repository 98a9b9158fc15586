"""A batch answers every row once, whatever happens to it."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from answering import EchoOptions

from minicpmv.batch.answerers import EngineError
from minicpmv.batch.jobs import Asked
from minicpmv.batch.results import OutputError
from minicpmv.batch.run import open_batch, side_by_side


# A run of its own, which tells of every row.
PROGRAM = """
import sys
from pathlib import Path
from answering import EchoOptions
from minicpmv.batch.jobs import Asked
from minicpmv.batch.run import open_batch
with open_batch(Path(sys.argv[1]), Path(sys.argv[2]), EchoOptions(seconds=0.5), Asked()) as batch:
    for row in batch.rows:
        print(row["id"], flush=True)
"""


@pytest.fixture
def source(tmp_path):
    """A function that writes an input with these texts."""

    def write(texts):
        rows = [{"id": place, "messages": [{"role": "user", "content": text}]} for place, text in enumerate(texts)]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "in.jsonl"

    return write


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source, output, options=None, **more):
    with open_batch(source, output, options or EchoOptions(), Asked(), **more) as batch:
        return batch.done, [row["id"] for row in batch.rows]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("lanes", [1, 3, 50])
def test_work_is_done_side_by_side_and_in_order_where_it_should_be(lanes, ordered):
    taken = []

    def items():
        for place in range(40):
            taken.append(place)
            yield place

    found = []
    for result in side_by_side(lambda place: place * 2, items(), lanes, ordered):
        found.append(result)
        assert len(taken) - len(found) <= 4 * lanes + 1
    assert (found if ordered else sorted(found)) == [2 * place for place in range(40)]


def test_what_was_under_way_comes_before_an_error():
    def work(place):
        if place == 7:
            raise KeyError(place)
        return place

    found = []
    with pytest.raises(KeyError, match="7"):
        for result in side_by_side(work, range(100), 4):
            found.append(result)
    assert set(range(7)) <= set(found) and len(found) == len(set(found)) < 30


def test_rows_with_an_error_do_not_stop_the_others(source, tmp_path):
    done, ids = run(source(["a", "bad", "c"]), tmp_path / "out.jsonl")
    assert done == 0 and sorted(ids) == [0, 1, 2]
    rows = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    assert [rows[place]["text"] for place in range(3)] == ["a", None, "c"]
    assert [rows[place]["error"] for place in range(3)] == [None, "it is bad", None]


def test_a_run_that_was_killed_goes_on_and_loses_nothing(source, tmp_path):
    path, output = source([f"text {place}" for place in range(120)]), tmp_path / "out.jsonl"
    command = [sys.executable, "-c", PROGRAM, str(path), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent, text=True) as process:
        seen = [int(process.stdout.readline()) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
    done, ids = run(path, output)
    assert 25 <= done < 120 and not set(seen) & set(ids)
    assert sorted(row["id"] for row in read(output)) == list(range(120))
    assert run(path, output) == (120, [])


def test_order_is_kept_also_by_a_run_that_goes_on(source, tmp_path):
    texts = [f"text {place}" for place in range(30)]
    path, output = source([*texts[:17], "gone", *texts[18:]]), tmp_path / "out.jsonl"
    options = EchoOptions(seconds=0.02)
    with pytest.raises(EngineError, match="has stopped"):
        run(path, output, options, ordered=True)
    ids = [row["id"] for row in read(output)]
    assert ids == list(range(17))
    done, _ = run(source(texts), output, options, ordered=True)
    assert done == 17 and [row["id"] for row in read(output)] == list(range(30))


def test_an_output_in_another_order_or_of_another_input_is_refused(source, tmp_path):
    path, output = source(["a", "b"]), tmp_path / "out.jsonl"
    run(path, output)
    rows = read(output)
    output.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: -row["id"])))
    with pytest.raises(OutputError, match="not the first of the input in their order"):
        run(path, output, ordered=True)
    assert run(path, output)[0] == 2
    with pytest.raises(OutputError, match="the id '1' that the input does not have"):
        run(source(["a"]), output)


def test_rows_with_an_error_are_asked_again_on_request(source, tmp_path):
    output = tmp_path / "out.jsonl"
    run(source(["a", "bad"]), output)
    assert run(source(["a", "b"]), output) == (2, [])
    assert run(source(["a", "b"]), output, retry_errors=True) == (1, [1])
    assert sorted(row["text"] for row in read(output)) == ["a", "b"]


def test_nothing_is_loaded_where_nothing_is_left(source, tmp_path):
    path, output = source(["a"]), tmp_path / "out.jsonl"
    run(path, output)

    class Broken(EchoOptions):
        def open(self):
            raise AssertionError

    assert run(path, output, Broken()) == (1, [])


def test_thousands_of_rows_come_out_once(source, tmp_path):
    texts = random.Random(0).choices(["a", "bad", "ü\u2028"], k=3000)
    output = tmp_path / "out.jsonl"
    run(source(texts), output, EchoOptions(concurrency=16))
    rows = sorted((json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]), key=lambda row: row["id"])
    assert [row["text"] or "bad" for row in rows] == texts
