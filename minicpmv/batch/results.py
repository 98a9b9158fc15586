"""The output of a batch: one row for each id, whatever happens in between.

What is special:
- Rows are appended to a file of JSON lines as they come; a line that a kill cut is dropped, so a run that starts again
  knows exactly which ids are done.
- A Parquet file cannot grow: its rows gather in JSON lines beside it, and it appears whole at the end.
- Two runs do not write into one output.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minicpmv.errors import MiniCPMVError, require
from minicpmv.files import check_writable, drop_torn_line


JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_ROWS = 10_000  # of a row group
COUNTS = ("prompt_tokens", "completion_tokens", "pages")


class OutputError(MiniCPMVError):
    """The output of a batch cannot be used: the message says why and what to do."""


class Results:
    """The rows that are there, and room for more. A context manager.

    Args:
        path: a `.jsonl` or `.parquet` file.
        retry_errors: forget the rows with an error, so that they are asked again.

    Raises:
        OutputError: it is of another kind, another run writes to it, or what is there is no output of a batch.
        UnwritableFileError: it cannot be written.
        MissingPackageError: a Parquet file, and pyarrow is not installed.
    """

    def __init__(self, path: Path, retry_errors: bool = False) -> None:
        self.path, self.is_parquet = path, path.suffix.lower() == ".parquet"
        if not self.is_parquet and path.suffix.lower() not in JSON_SUFFIXES:
            raise OutputError(f"{path}: the output is a .jsonl or a .parquet file")
        if self.is_parquet:
            require("batch", "pyarrow")
        self._lines = path.with_name(path.name + ".rows.jsonl") if self.is_parquet else path
        check_writable(self._lines)
        self._opened = ExitStack()
        lock = FileLock(path.with_name(path.name + ".lock"))
        try:
            self._opened.enter_context(lock.acquire(timeout=0))
        except Timeout as error:
            raise OutputError(f"another run writes to {path}; wait for it, or give another output") from error
        self._opened.callback(Path(lock.lock_file).unlink, missing_ok=True)
        try:
            self.ids = self._gather(retry_errors)
            self._file = self._opened.enter_context(self._lines.open("ab"))
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, which outlives this process from now on."""
        self._file.write(_line(row))
        self._file.flush()

    def finish(self) -> None:
        """Call when every row is there: a Parquet file is made of them."""
        if not self.is_parquet:
            return
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        draft = self.path.with_name(self.path.name + ".draft")
        rows = list(_rows(self._lines)) if self._lines.stat().st_size < 1 << 20 else None
        names = list(dict.fromkeys(name for row in rows or _rows(self._lines) for name in row))
        whole = {
            name
            for name in ("id", "custom_id")
            if name in names and all(isinstance(row.get(name), int) for row in rows or _rows(self._lines))
        }
        schema = pa.schema([(name, pa.int64() if name in whole or name in COUNTS else pa.string()) for name in names])
        with ParquetWriter(draft, schema) as writer:
            group: list[dict[str, Any]] = []
            for row in rows or _rows(self._lines):
                group.append({name: _cell(row.get(name), schema.field(name).type == pa.int64()) for name in names})
                if len(group) == PARQUET_ROWS:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group = []
            writer.write_table(pa.Table.from_pylist(group, schema))
        os.replace(draft, self.path)
        self._file.close()
        self._lines.unlink()

    def _gather(self, retry_errors):
        """Ids of the rows that are there, all of them as JSON lines, without those to be asked again."""
        if self._lines.exists():
            drop_torn_line(self._lines)
            rows = _rows(self._lines)
        elif self.is_parquet and self.path.exists():
            rows = _parquet_rows(self.path)
        else:
            return []
        ids = []
        kept = self._lines.with_name(self._lines.name + ".draft") if retry_errors or not self._lines.exists() else None
        with ExitStack() as opened:
            file = opened.enter_context(kept.open("wb")) if kept else None
            for row in rows:
                if retry_errors and row.get("error") is not None:
                    continue
                ids.append(_id(row, self.path))
                if file:
                    file.write(_line(row))
        if kept:
            os.replace(kept, self._lines)
        return ids


def _id(row, path):
    found = row.get("custom_id", row.get("id"))
    if found is None or "error" not in row:
        raise OutputError(f"{path} is there, and is no output of a batch: give another output, or delete it")
    return str(found)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise OutputError(
                    f"{path}, line {number} is not JSON ({error}): delete the line, or the file"
                ) from error
            if not isinstance(row, dict):
                raise OutputError(f"{path}, line {number} is no row: delete the line, or the file")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise OutputError(f"{path} cannot be read as Parquet ({error}): delete it") from error


def _cell(value: Any, is_whole: bool) -> Any:
    """A value as a Parquet file holds it: nested ones as JSON."""
    if value is None or isinstance(value, str) or is_whole:
        return value
    return json.dumps(value, ensure_ascii=False)
