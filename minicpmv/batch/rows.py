"""The input of a batch: JSON lines, a Parquet file, or a folder -> rows.

What is special:
- The whole input is looked at once, before a model is loaded: every row has an id, no id comes twice, no line is broken.
- It is cut into pieces, which say where to read and what to leave out. A piece is small and can be sent to another
  machine that sees the same files; rows are read where they are answered.
"""

import json
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError, require


PIECE_ROWS = 64
JSON_SUFFIXES = {".jsonl", ".ndjson"}
PARQUET_SUFFIXES = {".parquet"}
ID_COLUMNS = ("custom_id", "id")
# What a file in a folder is, by the beginning of its type.
KINDS = {"image/": "image", "video/": "video", "application/pdf": "document"}


class InputError(MiniCPMVError):
    """The input of a batch cannot be used: the message names the place and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of the input. `folder` is where its relative paths begin."""

    id: str | int
    columns: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Piece:
    """Some rows of the input, in order, without those whose ids are in `done`.

    `start` is the byte where a piece of JSON lines begins, and the row group of a Parquet file.
    """

    path: Path
    ids: Sequence[str | int]
    start: int = 0
    done: frozenset[str] = field(default=frozenset())

    @property
    def left(self) -> int:
        """How many rows are to be answered."""
        return len(self.ids) - len(self.done)

    def without(self, done: set[str]) -> "Piece":
        return replace(self, done=frozenset(done.intersection(map(str, self.ids))))

    def __iter__(self) -> Iterator[Row]:
        """Read the rows that are left.

        Raises:
            InputError: the input is not what it was when it was looked at.
        """
        for identity, columns in zip(self.ids, self._columns(), strict=True):
            if str(identity) not in self.done:
                yield Row(identity, columns, self.path if self.path.is_dir() else self.path.parent)

    def _columns(self) -> Iterator[dict[str, Any]]:
        if self.path.is_dir():
            for name in map(str, self.ids):
                yield {kind_of(Path(name)) or "": name}
        elif self.path.suffix.lower() in PARQUET_SUFFIXES:
            from pyarrow.parquet import ParquetFile

            with ParquetFile(self.path) as file:
                for batch in file.iter_batches(64, row_groups=[self.start]):
                    yield from batch.to_pylist()
        else:
            with self.path.open("rb") as file:
                file.seek(self.start)
                lines = (line for line in file if line.strip())
                yield from map(json.loads, islice(lines, len(self.ids)))


def open_input(path: Path) -> list[Piece]:
    """The pieces of a batch's input, checked.

    Args:
        path: a `.jsonl` or `.parquet` file, or a folder, whose images, videos and PDF files become rows, in the order of
            their names and with their paths as ids. A row without `custom_id` or `id` has its number, from 1.

    Raises:
        InputError: there is no such input, it is broken, or two rows have one id.
        MissingPackageError: a Parquet file, and pyarrow is not installed.
    """
    if path.is_dir():
        pieces = _open_folder(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    elif path.suffix.lower() in JSON_SUFFIXES:
        pieces = _open_json_lines(path)
    elif path.suffix.lower() in PARQUET_SUFFIXES:
        pieces = _open_parquet(path)
    else:
        raise InputError(f"{path}: give a folder, a .jsonl file with one JSON object a line, or a .parquet file")
    seen: dict[str, int] = {}
    number = 0
    for piece in pieces:
        for identity in piece.ids:
            number += 1
            if (first := seen.setdefault(str(identity), number)) != number:
                raise InputError(
                    f"{path}: rows {first} and {number} both have the id {str(identity)[:80]!r}; give each its own"
                )
    if not number:
        raise InputError(
            f"{path} has no rows: " + ("no images, videos or PDF files" if path.is_dir() else "it is empty")
        )
    return pieces


def kind_of(file: Path) -> str | None:
    """`"image"`, `"video"` or `"document"` by a file's name; None: none of them."""
    guessed = mimetypes.guess_type(file.name)[0] or ""
    return next((kind for beginning, kind in KINDS.items() if guessed.startswith(beginning)), None)


def _open_folder(path):
    files = (file for file in path.rglob("*") if kind_of(file) and not file.name.startswith(".") and file.is_file())
    names = iter(sorted(file.relative_to(path).as_posix() for file in files))
    return [Piece(path, ids) for ids in iter(lambda: list(islice(names, PIECE_ROWS)), [])]


def _open_json_lines(path):
    pieces: list[Piece] = []
    ids: list[str | int] = []
    start = place = number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if line.strip():
                number += 1
                ids.append(_id_in(_object(line, path, line_number), number, path))
            place += len(line)
            if len(ids) == PIECE_ROWS:
                pieces.append(Piece(path, ids, start))
                ids, start = [], place
    return [*pieces, Piece(path, ids, start)] if ids else pieces


def _object(line, path, number):
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}, line {number} is JSON, but not an object: one line is one row")
    return found


def _open_parquet(path):
    require("batch", "pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    pieces, number = [], 0
    try:
        with ParquetFile(path) as file:
            column = next((name for name in ID_COLUMNS if name in file.schema_arrow.names), None)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                found = [{}] * rows if column is None else file.read_row_group(group, [column]).to_pylist()
                pieces.append(Piece(path, [_id_in(row, number + i, path) for i, row in enumerate(found, 1)], group))
                number += rows
    except ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet ({error})") from error
    return pieces


def _id_in(columns, number, path):
    """The id that a row's columns hold, else its number."""
    for name in ID_COLUMNS:
        if (found := columns.get(name)) is not None:
            if isinstance(found, bool) or not isinstance(found, (str, int)):
                raise InputError(
                    f"{path}: the {name} of row {number} is {str(found)[:40]!r}; give text or a whole number"
                )
            return found
    return number
