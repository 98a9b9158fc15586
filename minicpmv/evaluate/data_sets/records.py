"""Records of data files, read one at a time: TSVs with images inside, JSON, JSON lines, Parquet.

What is special:
- a table of gigabytes is read once, to note where its rows begin; a row is read again when it is asked for, so memory
  holds one row and its images, whatever the file's size;
- what pandas reads as missing ("", "NA", "None", "nan", ...) is left out of a record: the reference harness reads its
  tables with pandas, and such options and hints do not reach its prompts;
- a row that cannot be used is an error that names file, row and reason, before anything is asked about it.
"""

import ast
import base64
import binascii
import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError


Record = dict[str, Any]

IMAGE = "image"  # the column of images: files in base64; a list[bytes] in a record
REFERENCE_LENGTH = 64  # an image of at most so many characters is the `index` of the row that holds it
# What pandas.read_csv takes for a missing value.
MISSING = frozenset(
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")  # noqa: SIM905
)
BUFFER = 1 << 20  # bytes that are read at once
FIELD_LIMIT = 1 << 30  # characters of one field: far more than any image has


class BrokenRecordError(MiniCPMVError):
    """A row of a data file cannot be used: the message names the file, the row, and what is wrong with it."""

    def __init__(self, path: Path, row: int | str, what: str):
        place = f"row {row}" if isinstance(row, int) else row
        super().__init__(f"{path}, {place}: {what}; fetch the file anew, or take the row out of it")


class Records(Sequence[Record]):
    """The rows of one or several files, in their order, counted from 0 (and from 1 in messages).

    `files` they come from; `digest` is the MD5 of these files' bytes.
    """

    files: list[Path]
    digest: str

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.files[0]} has {len(self)} rows, not {index + 1}")
        return self.read(index % len(self))

    def read(self, index: int) -> Record:
        raise NotImplementedError

    def without_images(self) -> Iterator[Record]:
        """All records, without the images that lie in the file itself: the quick way to look for some of them."""
        return iter(self)


class Table(Records):
    """A tab-separated file with a header, as VLMEvalKit's are; fields may be quoted and hold line breaks.

    Args:
        columns: those that it must have.
        lists: columns that hold a Python list, or a value that stands for a list of one.
        objects: columns that hold JSON.

    Raises:
        BrokenRecordError: it lacks a column, a row has more or fewer fields than the header, or is no UTF-8.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] = (),
        lists: Sequence[str] = (),
        objects: Sequence[str] = (),
    ):
        self.files, self.lists, self.objects = [path], lists, objects
        self.header: list[str] = []
        self.offsets: list[int] = []  # where each row begins, in bytes
        self.homes: dict[str, int] = {}  # `index` -> number of the row that holds an image
        digest = hashlib.md5(usedforsecurity=False)
        for offset, fields in self._scan(digest.update):
            if not self.header:
                self.header = fields
                if absent := [name for name in columns if name not in fields]:
                    raise BrokenRecordError(path, "header", f"no column {', '.join(absent)} among {', '.join(fields)}")
                continue
            cells = self._cells(fields, len(self.offsets))
            if len(cells.get(IMAGE, "")) > REFERENCE_LENGTH:
                self.homes[cells.get("index", "")] = len(self.offsets)
            self.offsets.append(offset)
        self.digest = digest.hexdigest()
        if not self.offsets:
            raise BrokenRecordError(path, "header", "there are no rows below it")

    def _scan(self, seen: Callable[[bytes], None], start: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Each row's fields, and the byte at which it begins; from the row that begins at `start`."""
        position = start
        csv.field_size_limit(FIELD_LIMIT)
        with self.files[0].open("rb", buffering=BUFFER) as file:
            file.seek(start)

            def lines() -> Iterator[str]:
                nonlocal position
                for line in file:
                    position += len(line)
                    seen(line)
                    yield line.decode("utf-8-sig" if position == len(line) else "utf-8")

            rest = lines()
            while True:
                begin = position
                try:
                    line = next(rest, None)
                    if line is None:
                        return
                    if '"' in line or "\r" in line:
                        fields = next(csv.reader(chain([line], rest), delimiter="\t"))
                    else:  # most rows, and several times as fast
                        fields = line.rstrip("\n").split("\t")
                except (csv.Error, UnicodeDecodeError) as error:
                    raise BrokenRecordError(self.files[0], len(self.offsets) + 1, f"not a row ({error})") from error
                if fields and fields != [""]:
                    yield begin, fields

    def _cells(self, fields: list[str], index: int) -> dict[str, str]:
        if len(fields) != len(self.header):
            what = f"{len(fields)} fields, but the header has {len(self.header)}"
            raise BrokenRecordError(self.files[0], index + 1, what)
        return {name: cell for name, cell in zip(self.header, fields, strict=True) if cell not in MISSING}

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Record]:
        return (self._record(cells, index) for index, cells in self._all_cells())

    def read(self, index: int) -> Record:
        return self._record(self._cells_at(index), index)

    def without_images(self) -> Iterator[Record]:
        for index, cells in self._all_cells():
            cells.pop(IMAGE, None)
            yield self._record(cells, index)

    def _all_cells(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (_, fields) in enumerate(self._scan(lambda line: None, self.offsets[0])):
            yield index, self._cells(fields, index)

    def _cells_at(self, index: int) -> dict[str, str]:
        _, fields = next(self._scan(lambda line: None, self.offsets[index]))
        return self._cells(fields, index)

    def _record(self, cells: dict[str, str], index: int) -> Record:
        record: Record = dict(cells)
        for name in self.lists:
            if name in cells:
                record[name] = as_list(cells[name])
        for name in self.objects:
            if name in cells:
                try:
                    record[name] = json.loads(cells[name])
                except (ValueError, RecursionError) as error:
                    raise BrokenRecordError(self.files[0], index + 1, f"{name} is not JSON ({error})") from error
        if IMAGE in cells:
            record[IMAGE] = [self._image(str(part), index) for part in as_list(cells[IMAGE])]
        return record

    def _image(self, text: str, index: int) -> bytes:
        if len(text) <= REFERENCE_LENGTH:
            if text not in self.homes:
                what = f"its image is that of row {text!r}, which is not there or holds none"
                raise BrokenRecordError(self.files[0], index + 1, what)
            text = str(as_list(self._cells_at(self.homes[text])[IMAGE])[0])
        return decode_base64(text, self.files[0], index + 1)


def decode_base64(text: str, path: Path, row: int) -> bytes:
    """Raises:
    BrokenRecordError: it is not base64.
    """
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise BrokenRecordError(path, row, f"its image is not base64 ({error})") from error


def as_list(text: str) -> list[Any]:
    """A list that is written as in Python; anything else is a list of one."""
    if text.startswith("[") and text.endswith("]"):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(value, list):
            return value
    return [text]


class KeptRecords(Records):
    """Records that are small enough to be kept: those of JSON and Parquet files, whose images and videos lie beside them.

    Raises:
        BrokenRecordError: one lacks a field.
    """

    def __init__(self, files: list[Path], records: list[Record], fields: Sequence[str]):
        self.files, self.records = files, records
        digest = hashlib.md5(usedforsecurity=False)
        for file in files:
            digest.update(file.read_bytes())
        self.digest = digest.hexdigest()
        for number, record in enumerate(records, start=1):
            if absent := [name for name in fields if name not in record]:
                raise BrokenRecordError(files[0], number, f"no {', '.join(absent)}")

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        return dict(self.records[index])


class JsonLines(Records):
    """A JSON object in each line, with its image inside; read again when asked for, as a table is.

    Raises:
        BrokenRecordError: a line is not one, or lacks a field.
    """

    def __init__(self, path: Path, fields: Sequence[str]):
        self.files = [path]
        self.offsets: list[int] = []
        digest, position = hashlib.md5(usedforsecurity=False), 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    record = parse_object(line, path, len(self.offsets) + 1)
                    if absent := [name for name in fields if name not in record]:
                        raise BrokenRecordError(path, len(self.offsets) + 1, f"no {', '.join(absent)}")
                    self.offsets.append(position)
                position += len(line)
                digest.update(line)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> Record:
        with self.files[0].open("rb") as file:
            file.seek(self.offsets[index])
            record = parse_object(file.readline(), self.files[0], index + 1)
        if IMAGE in record:
            record[IMAGE] = [decode_base64(record[IMAGE], self.files[0], index + 1)]
        return record


def parse_object(line: bytes, path: Path, number: int) -> Record:
    """Raises:
    BrokenRecordError: the line is not a JSON object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BrokenRecordError(path, number, f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise BrokenRecordError(path, number, "JSON, but not an object")
    return record


def read_json_lines(path: Path) -> list[Record]:
    """Raises:
    BrokenRecordError: names the line that is not a JSON object.
    """
    lines = path.read_bytes().splitlines()
    return [parse_object(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def read_json_list(path: Path) -> list[Record]:
    """Raises:
    BrokenRecordError: the file is not a list of JSON objects.
    """
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenRecordError(path, "the whole file", f"not JSON ({error})") from error
    if not isinstance(records, list):
        raise BrokenRecordError(path, "the whole file", "not a list of rows")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise BrokenRecordError(path, number, "not a JSON object")
    return records


def read_parquet(path: Path) -> list[Record]:
    """Raises:
    BrokenRecordError: the file is not Parquet, or cut off.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BrokenRecordError(path, "the whole file", f"not Parquet ({error})") from error
