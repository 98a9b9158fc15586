"""The input of a batch is looked at whole, cut into pieces, and read as it was written."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpmv.batch import rows
from minicpmv.batch.rows import InputError, open_input


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(pieces):
    return [(row.id, row.columns) for piece in pieces for row in piece]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=20),
    st.sets(st.integers(0, 20)),
    st.integers(1, 7),
    st.booleans(),
)
def test_every_row_that_is_not_done_is_read_once_and_in_order(tmp_path_factory, texts, done, size, blank):
    written = [{"custom_id": f"{place}-é", "body": text} for place, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    lines = [json.dumps(row, ensure_ascii=bool(place % 2)) for place, row in enumerate(written)]
    path.write_text(("\n\n" if blank else "\n").join([*lines, ""]), encoding="utf-8")
    known = {f"{place}-é" for place in done}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PIECE_ROWS", size)
        if not written:
            with pytest.raises(InputError, match="has no rows"):
                open_input(path)
            return
        pieces = [pickle.loads(pickle.dumps(piece.without(known))) for piece in open_input(path)]
    assert all(len(piece.ids) <= size for piece in pieces)
    left = [(row["custom_id"], row) for row in written if row["custom_id"] not in known]
    assert read(pieces) == left and sum(piece.left for piece in pieces) == len(left)


def test_a_parquet_file_is_read_by_row_groups(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    written = [{"id": 10 + place, "messages": [{"role": "user", "content": str(place)}]} for place in range(7)]
    parquet.write_table(pa.Table.from_pylist(written), tmp_path / "in.parquet", row_group_size=3)
    pieces = open_input(tmp_path / "in.parquet")
    assert [len(piece.ids) for piece in pieces] == [3, 3, 1]
    assert read(piece.without({"11", "16"}) for piece in pieces) == [
        (row["id"], row) for row in written if row["id"] not in (11, 16)
    ]


def test_files_of_a_folder_are_rows_by_their_kind_and_hidden_or_other_ones_are_not(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.mp4", "deep/d.pdf", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read(open_input(tmp_path)) == [
        ("a.jpg", {"image": "a.jpg"}),
        ("b.PNG", {"image": "b.PNG"}),
        ("deep/c.mp4", {"video": "deep/c.mp4"}),
        ("deep/d.pdf", {"document": "deep/d.pdf"}),
    ]


def test_rows_without_an_id_have_their_number(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"image": "a"}, {"id": "x", "image": "b"}, {"image": "c"}])
    assert [row_id for row_id, _ in read(open_input(path))] == [1, "x", 3]


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"id": 1}\n{"id": "1"}\n', "rows 1 and 2 both have the id '1'"),
        ('{"id": 1}\n{"id"\n', "line 2 is not JSON"),
        ("[1]\n", "line 1 is JSON, but not an object"),
        ('{"id": 1.5}\n', "the id of row 1 is '1.5'"),
        ("", "it is empty"),
    ],
)
def test_a_broken_input_is_refused_as_a_whole(tmp_path, content, reason):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=reason):
        open_input(path)


def test_other_inputs_are_refused(tmp_path):
    (tmp_path / "in.csv").touch()
    (tmp_path / "in.parquet").write_text("no")
    with pytest.raises(InputError, match=r"in\.csv: give a folder"):
        open_input(tmp_path / "in.csv")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_input(tmp_path / "in.parquet")
    with pytest.raises(InputError, match="no such file"):
        open_input(tmp_path / "none.jsonl")
