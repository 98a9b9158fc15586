"""The output of a batch keeps every row through kills, and takes none that is not its own."""

import json

import pytest
from pyarrow import parquet

from minicpmv.batch.results import OutputError, Results


def row(place, error=None):
    return {"id": place, "text": None if error else f"text {place}", "segments": [{"start": 0.5}], "error": error}


def test_a_line_that_a_kill_cut_is_dropped_and_its_row_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        results.add(row(1))
        results.add(row(2))
    path.write_bytes(path.read_bytes()[:-5])
    with Results(path) as results:
        assert results.ids == ["1"]
        results.add(row(2))
        results.finish()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(1), row(2)]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_parquet_file_appears_whole_at_the_end_and_grows_with_its_input(tmp_path):
    path = tmp_path / "out.parquet"
    with Results(path) as results:
        results.add(row(1, "bad"))
    assert not path.exists()
    with Results(path) as results:
        assert results.ids == ["1"]
        results.add(row(2))
        results.finish()
    expected = [r | {"segments": json.dumps(r["segments"])} for r in (row(1, "bad"), row(2))]
    assert parquet.read_table(path).to_pylist() == expected
    with Results(path) as results:
        assert results.ids == ["1", "2"]
        results.add(row(3))
        results.finish()
    assert parquet.read_table(path).column("id").to_pylist() == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_rows_with_an_error_are_forgotten_where_they_are_to_be_asked_again(tmp_path, name):
    with Results(tmp_path / name) as results:
        results.add(row(1, "bad"))
        results.add(row(2))
        results.finish()
    with Results(tmp_path / name, retry_errors=True) as results:
        assert results.ids == ["2"]


def test_two_runs_do_not_write_into_one_output(tmp_path):
    with Results(tmp_path / "out.jsonl"), pytest.raises(OutputError, match="another run writes"):
        Results(tmp_path / "out.jsonl")
    with Results(tmp_path / "out.jsonl") as results:
        assert results.ids == []


def test_a_file_that_is_no_output_is_left_as_it_is(tmp_path):
    path = tmp_path / "out.jsonl"
    for content in ('{"id": 1}\n', "text\n", "[1]\n"):
        path.write_text(content)
        with pytest.raises(OutputError):
            Results(path)
        assert path.read_text() == content
    with pytest.raises(OutputError, match=r"\.jsonl or a \.parquet"):
        Results(tmp_path / "out.csv")
