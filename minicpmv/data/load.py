"""Conversations from files, from the Hub, or from a dataset that is already there.

What is special:
- JSON is read row by row, without the one schema for all rows that `datasets` would want: a column may hold text in one row
  and a mapping in the next. The formats are those of `minicpmv.data.formats`, told apart row by row.
- A bad row (no conversation, a missing file, marks without images, ...) is an error with its index and reason, or is left
  out, logged and counted. No other row takes its place.
- Images are not decoded here but in the collator, so a row is small and nothing is compressed twice; their headers are
  looked at, so that most broken files come to light before the training.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec
from PIL import Image

from minicpmv.data.formats import CONVERSATION_COLUMNS, MEDIA_COLUMNS, BadRowError, DataError, conversation_row
from minicpmv.drawn.stream import SyntheticData, is_description, synthetic_dataset


logger = logging.getLogger(__name__)

JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
CONVERSATIONS = ("messages", "prompt", "chosen", "rejected")
MESSAGES = [
    {
        "role": datasets.Value("string"),
        "content": [
            {
                "type": datasets.Value("string"),
                "text": datasets.Value("string"),
                "ref": datasets.Value("string"),
                "image": datasets.Image(decode=False),
                "video": datasets.Value("string"),
            }
        ],
    }
]
TEXT_COLUMNS = {name: datasets.Value("string") for name in ("id", "origin", "train_on")}


def load_conversations(
    source: Any,
    *,
    split: str | None = None,
    image_folder: str | os.PathLike | None = None,
    streaming: bool = False,
    on_bad_row: Literal["raise", "skip"] = "raise",
) -> datasets.Dataset | datasets.IterableDataset:
    """Conversation rows (see [`minicpmv.data.formats`]) of any source, for training or evaluation.

    Args:
        source: a JSON file (a list of rows) or JSONL file (one row a line), a list of such files, a `datasets` dataset,
            a folder or Hub name that `datasets` loads, or a YAML file that describes synthetic rows
            ([`minicpmv.drawn.stream`]), which are always a stream.
        split: the split of a dataset, such as "train" or "train[:100]"; not needed when there is only one.
        image_folder: where relative paths begin; for JSON files the folder of the file when None.
        streaming: read while training instead of before. A list of JSONL files is shared out to data loader workers.
        on_bad_row: "raise", or "skip": leave bad rows out; each is logged with its reason and the count so far.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` for a stream. Its columns are those of the conversation
        (`messages`; `prompt`, `chosen`, `rejected`; or `prompt`), what else the rows have, and `origin`: file and
        index of the row. A stream in several workers counts the rows of each worker, those of JSON files excepted.

    Raises:
        BadRowError: with the index of the row and the reason.
        DataError: the source cannot be read as a whole: no such file or split, no usable row, columns at odds.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; choose 'raise' or 'skip'")
    if is_description(source):
        return synthetic_dataset(SyntheticData.load(source))
    files = _json_files(source)
    if files and split is not None:
        raise DataError(f"split={split!r} was given, but JSON files have no splits; give the file of the split")
    if files and streaming:
        options = {"files": files, "image_folder": image_folder, "on_bad_row": on_bad_row}
        return datasets.IterableDataset.from_generator(_read_files, gen_kwargs=options)
    if files:
        return as_dataset(list(_read_files(files, image_folder, on_bad_row)))
    dataset = _load_dataset(source, split, streaming)
    name = source if isinstance(source, str) else dataset.info.dataset_name or "dataset"
    return _convert(dataset, name, image_folder, on_bad_row)


def some_conversations(source: str | None, count: int) -> list[dict[str, Any]]:
    """The first `count` conversations of a source of [`load_conversations`]; None: drawn ones.

    Raises:
        DataError: there are fewer, or they cannot be read.
    """
    rows = (
        load_conversations(source)
        if source
        else synthetic_dataset(SyntheticData("validation", samples=count, shards=1))
    )
    found = list(islice(rows, count))
    if len(found) < count:
        raise DataError(
            f"{source} has {len(found)} conversations, and {count} are wanted: give more, or ask for fewer"
        )
    return found


def read_conversations_file(
    path: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    on_bad_row: Literal["raise", "skip"] = "raise",
) -> Iterator[dict[str, Any]]:
    """The conversation rows of one JSON or JSONL file, one after the other. Arguments and errors: [`load_conversations`]."""
    folder = Path(path).parent if image_folder is None else image_folder
    kept = skipped = 0
    columns = None
    for index, row in _read_json(path):
        try:
            row = _good_row(row, Path(path).name, index, folder, columns)
        except BadRowError as error:
            if on_bad_row == "raise":
                raise
            skipped += 1
            logger.warning("%s. The row is left out (%d so far).", error, skipped)
            continue
        kept, columns = kept + 1, columns or _conversation_columns(row)
        yield row
    if not kept:
        raise DataError(f"{path} has no usable row; {skipped} bad ones were left out")
    if skipped:
        logger.warning("%s: %d of %d rows were left out.", path, skipped, kept + skipped)


# ---- one row ----


def _good_row(row, name, index, folder, columns=None):
    """A row in the form of conversations, its files looked at, with its origin. `columns`: what other rows have."""
    try:
        row = conversation_row(_parse(row) if isinstance(row, bytes) else row, folder)
        if columns and columns != _conversation_columns(row):
            raise BadRowError(
                f"the row has {_conversation_columns(row)}, those before it {columns}; use a file for each"
            )
        for message in chain.from_iterable(row[column] for column in _conversation_columns(row)):
            for part in message["content"]:
                _check_file(part)
    except ValueError as error:
        raise BadRowError(f"{name}, row {index}: {error}", index) from error
    return row | {"origin": f"{name}[{index}]"}


def _parse(line):
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadRowError(f"not valid JSON: {error}; a file is a list of rows, or has one row a line") from error


def _conversation_columns(row):
    return tuple(name for name in CONVERSATIONS if name in row)


def _check_file(part):
    """Look at the header of an image, and whether a video is there. What has to be fetched from a file system of
    `fsspec` (hf://, zip://, ...) is fetched; http addresses are left to the processor."""
    if part["type"] == "video" and not os.path.isfile(part["video"]):
        raise BadRowError(f"there is no video {part['video']!r}; relative paths begin at image_folder")
    if part["type"] != "image" or not isinstance(part["image"], Mapping):
        return
    image, path = part["image"], part["image"]["path"]
    try:
        if image["bytes"] is None and "://" in path:
            if path.startswith(("http://", "https://")):
                return
            with fsspec.open(path, "rb") as file:
                image["bytes"] = file.read()
        with Image.open(path if image["bytes"] is None else BytesIO(image["bytes"])):
            pass
    except FileNotFoundError as error:
        raise BadRowError(f"there is no image {path!r}; relative paths begin at image_folder") from error
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError) as error:
        raise BadRowError(f"the image {path or 'in bytes'} cannot be read: {error}") from error


# ---- JSON files ----


def _json_files(source):
    """The JSON files that `source` names, or none."""
    names = source if isinstance(source, (list, tuple)) else [source]
    if not all(isinstance(name, (str, os.PathLike)) for name in names):
        return []
    files = [os.fspath(name) for name in names if Path(name).suffix in JSON_SUFFIXES]
    if files and len(files) < len(names):
        others = [str(name) for name in names if os.fspath(name) not in files]
        raise DataError(f"a list of sources has JSON files only, not {others}")
    for file in files:
        if not os.path.isfile(file):
            raise DataError(f"there is no file {file}")
    return files


def _read_files(files, image_folder, on_bad_row):
    for file in files:
        yield from read_conversations_file(file, image_folder=image_folder, on_bad_row=on_bad_row)


def _read_json(path):
    """(index, row) of a JSON list, (index, line) of a JSONL file; lines are parsed later, each with its own errors."""
    with open(path, "rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        if not is_list:
            yield from enumerate(line for line in file if line.strip())
            return
        try:
            rows = json.loads(file.read())
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
    yield from enumerate(rows)


def as_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Conversation rows as a Dataset. The types of columns that are not ours are inferred."""
    kinds = {_conversation_columns(row) for row in rows}
    if len(kinds) > 1:
        raise DataError(f"the files hold rows with {sorted(kinds)}; load each kind by itself")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}
    features = {}
    for name, values in columns.items():
        if name in CONVERSATIONS:
            features[name] = MESSAGES
            continue
        try:
            features[name] = TEXT_COLUMNS.get(name) or datasets.Dataset.from_dict({name: values}).features[name]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the column {name!r} holds values of different types: {error}. Make them alike, or remove the column"
            ) from error
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# ---- datasets ----


def _load_dataset(source, split, streaming):
    if isinstance(source, (str, os.PathLike)):
        is_saved = any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))
        if is_saved:
            source = datasets.load_from_disk(source)
        else:
            try:
                source = datasets.load_dataset(os.fspath(source), split=split, streaming=streaming)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise DataError(f"{source} cannot be loaded: {error}") from error
            split = None
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split is None and len(source) == 1:
            (split,) = source
        if split not in source:
            raise DataError(f"split={split!r} is none of the dataset's: {', '.join(source)}; choose one")
        source, split = source[split], None
    if not isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        raise DataError(
            f"a source is a JSON file, a folder or Hub name, or a dataset of the library datasets, not {type(source).__name__}"
        )
    if split is not None:
        raise DataError(f"split={split!r} was given, but the source is one dataset; choose its split before")
    return source.to_iterable_dataset() if streaming and isinstance(source, datasets.Dataset) else source


def _convert(dataset, name, folder, on_bad_row):
    """All rows of a dataset in the form of conversations. Images stay undecoded, in their own compression."""
    is_stream = isinstance(dataset, datasets.IterableDataset)
    stream = dataset if is_stream else dataset.to_iterable_dataset()
    stream = stream.decode(False) if stream.features else stream
    columns = _first_columns(stream, name, folder, on_bad_row)
    others = [column for column in _column_names(stream) if column not in CONVERSATION_COLUMNS | MEDIA_COLUMNS.keys()]
    others += ["train_on"] * ("completion" in _column_names(stream) and "train_on" not in others)
    names = [*columns, *(other for other in others if other != "origin"), "origin"]
    skipped = []
    arguments = {"columns": columns, "names": names, "name": name, "folder": folder, "skipped": skipped}
    options = {
        "batched": True,
        "with_indices": True,
        "remove_columns": _column_names(stream),
        "fn_kwargs": arguments | {"on_bad_row": on_bad_row},
    }
    if is_stream:
        return stream.map(_convert_batch, batch_size=1, **options)
    features = {column: MESSAGES if column in columns else TEXT_COLUMNS.get(column) for column in names}
    features = {column: feature or dataset.features[column] for column, feature in features.items()}
    # As Arrow tables: else images would be decoded here, and compressed again. Never from the cache: what it holds
    # would outlive changes of files and of this code.
    converted = dataset.with_format("arrow").map(
        _convert_batch, batch_size=100, features=datasets.Features(features), load_from_cache_file=False, **options
    )
    if skipped:
        logger.warning("%s: %d of %d rows were left out.", name, len(skipped), len(dataset))
    return converted.with_format(None)


def _convert_batch(batch, indices, columns, names, name, folder, on_bad_row, skipped):
    rows, good = batch.to_pylist() if hasattr(batch, "to_pylist") else _as_rows(batch), []
    for index, row in zip(indices, rows, strict=True):
        try:
            good.append(_good_row(row, name, index, folder, columns))
        except BadRowError as error:
            if on_bad_row == "raise":
                raise
            skipped.append(index)
            logger.warning("%s. The row is left out (%d so far).", error, len(skipped))
    return {column: [row.get(column) for row in good] for column in names}


def _first_columns(stream, name, folder, on_bad_row):
    for index, row in enumerate(stream):
        try:
            return _conversation_columns(_good_row(row, name, index, folder))
        except BadRowError:
            if on_bad_row == "raise":
                raise
    raise DataError(f"{name} has no usable row")


def _column_names(stream):
    return stream.column_names or list(next(iter(stream)))


def _as_rows(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
