"""Attach the published weights (17.4 GB) to a folder that holds this repository.

    minicpmv fetch [FOLDER] [--revision SHA]        download, check, move into place
    minicpmv fetch FOLDER --check-only              check what is there

Only *.safetensors files and their index are downloaded: no code, no pickles. Every tensor's name and shape is compared
with `checkpoint_shapes.json`, and every file with the SHA-256 that the Hub names for the commit, before a file reaches the
folder: it holds all of the weights or none. Commit and digests are written beside them, for later checks.
A download that was cut off goes on where it stopped when the command is run again.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # the HTTP library's own base class: requests, httpx or httpx2, by version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from minicpmv.checkpoint import PUBLISHED
from minicpmv.errors import MiniCPMVError
from minicpmv.files import file_digest, write_whole


INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
RECORD = "fetched_weights.json"  # where the weights came from
STAGING = ".minicpmv-fetch"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
BYTES_PER_PARAMETER = 2  # the checkpoint is stored in bfloat16

Shapes = Mapping[str, Sequence[int]]


class FetchError(MiniCPMVError):
    """The weights could not be attached; the message says why and what to do."""


class DamagedFilesError(FetchError):
    """Files of the checkpoint are missing, cut off, altered or unreadable: `files` names them."""

    def __init__(self, folder: Path, files: Iterable[str], reason: str):
        self.files = sorted(files)
        super().__init__(f"{folder}: {reason}: {_some(self.files)}; run `minicpmv fetch` again")


class TensorMismatchError(FetchError):
    """Tensors are not those of MiniCPM-V 4.5: `missing`, `unexpected` (names), `wrong_shape` (name -> found, expected)."""

    def __init__(self, folder: Path, missing: Iterable[str], unexpected: Iterable[str], wrong_shape: Mapping):
        self.missing, self.unexpected, self.wrong_shape = sorted(missing), sorted(unexpected), dict(wrong_shape)
        shapes = [f"{name} is {found}, not {expected}" for name, (found, expected) in sorted(wrong_shape.items())]
        parts = [
            f"{len(items)} {kind} ({_some(items)})"
            for kind, items in (("missing", self.missing), ("unexpected", self.unexpected), ("of wrong shape", shapes))
            if items
        ]
        super().__init__(
            f"{folder}: the tensors are not those of MiniCPM-V 4.5: {', '.join(parts)}; "
            f"check --repo and --revision, the published weights are in {PUBLISHED}"
        )


@dataclass(frozen=True)
class Source:
    """Where weights came from, and what their files' bytes are."""

    repository: str
    commit: str
    sha256: dict[str, str]  # by file name


@dataclass(frozen=True)
class Weights:
    """A checkpoint that was checked: names and shapes always, the bytes where `source` is known."""

    parameters: int
    source: Source | None


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def published_shapes() -> dict[str, list[int]]:
    """`{tensor name: shape}` of the published checkpoint, 849 tensors."""
    return json.loads(Path(__file__).with_name("checkpoint_shapes.json").read_text(encoding="utf-8"))


def read_weight_map(folder: Path) -> dict[str, str]:
    """`{tensor name: file name}` as the index says; empty for a checkpoint of one file.

    Raises:
        DamagedFilesError: there is neither, or the index is not one.
    """
    if not (folder / INDEX).is_file():
        if (folder / SINGLE_FILE).is_file():
            return {}
        raise DamagedFilesError(folder, [INDEX], "no checkpoint here, for lack of")
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map does not lead to names of files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFilesError(folder, [INDEX], "not a safetensors index") from error
    if not all(map(FILE_NAME.fullmatch, weight_map.values())):
        raise DamagedFilesError(folder, [INDEX], "the index names files outside its folder")
    return weight_map


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """`{tensor name: shape}` of the checkpoint in `folder`, from the headers of its safetensors files alone.

    Raises:
        DamagedFilesError: a file is missing, cut off, or lacks a tensor that the index promises.
    """
    weight_map = read_weight_map(folder)
    files = sorted(set(weight_map.values())) or [SINGLE_FILE]
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise DamagedFilesError(folder, absent, "missing files")

    shapes, home = {}, {}
    for file in files:
        try:
            with safe_open(folder / file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a file of tensors cannot be iterated itself)
                    shapes[name], home[name] = tensors.get_slice(name).get_shape(), file
        except SafetensorError as error:  # a header that does not fit the file's length is the sign of a cut-off file
            raise DamagedFilesError(folder, [file], f"unreadable or cut off ({error})") from error
    astray = {file for name, file in weight_map.items() if name in home and home[name] != file}
    if astray:
        raise DamagedFilesError(folder, astray, "files that lack tensors which the index puts there")
    return shapes


def check_checkpoint(folder: str | Path, expected: Shapes | None = None) -> Weights:
    """Compare the checkpoint in `folder` with the published names and shapes, and with the digests recorded by `fetch`.

    Raises:
        DamagedFilesError: files are missing or damaged.
        TensorMismatchError: it is another model.
    """
    folder = Path(folder)
    parameters = _check_shapes(folder, expected)
    source = read_source(folder)
    if source is not None:
        _check_digests(folder, source)
    return Weights(parameters, source)


def _check_shapes(folder: Path, expected: Shapes | None) -> int:
    """The number of parameters."""
    expected = published_shapes() if expected is None else expected
    found = read_shapes(folder)
    wrong_shape = {
        name: (found[name], expected[name]) for name in found.keys() & expected if found[name] != expected[name]
    }
    if found.keys() != expected.keys() or wrong_shape:
        raise TensorMismatchError(folder, expected.keys() - found, found.keys() - expected, wrong_shape)
    return sum(map(math.prod, found.values()))


def read_source(folder: Path) -> Source | None:
    """What `fetch` recorded; None where it did not bring the weights.

    Raises:
        DamagedFilesError: the record is not one.
    """
    if not (folder / RECORD).is_file():
        return None
    try:
        source = Source(**json.loads((folder / RECORD).read_bytes()))
        if not all(isinstance(part, str) for part in (source.repository, source.commit, *source.sha256.values())):
            raise TypeError("names and digests are text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFilesError(folder, [RECORD], "not a record of fetched weights") from error
    return source


def _check_digests(folder: Path, source: Source) -> None:
    """Raises:
    DamagedFilesError: the bytes of a file are not those of the commit.
    """
    altered = [
        file
        for file, digest in source.sha256.items()
        if not (folder / file).is_file() or file_digest(folder / file) != digest
    ]
    if altered:
        raise DamagedFilesError(folder, altered, f"not the bytes of {source.repository} at {source.commit}")


def fetch(
    folder: str | Path = ".", repo: str = PUBLISHED, revision: str | None = None, expected: Shapes | None = None
) -> Weights:
    """Download the weights of `repo` into `folder`.

    Args:
        folder: holds the repository's config.json and code; the weights go beside them.
        revision: commit, tag or branch of `repo`; the commit that it leads to is recorded.
        expected: `{tensor name: shape}`; the published ones by default.

    Raises:
        FetchError: they are not there, damaged or another model's. What was downloaded stays in FOLDER/.minicpmv-fetch
            for the next try.
    """
    folder = Path(folder)
    expected = published_shapes() if expected is None else expected
    if not (folder / "config.json").is_file():
        raise FetchError(f"{folder} has no config.json; give the folder of a clone of this repository")
    try:
        with FileLock(folder / f"{STAGING}.lock", timeout=0):
            return _fetch(folder, repo, revision, expected)
    except Timeout as error:
        raise FetchError(f"another minicpmv fetch is at work in {folder}; wait until it has ended") from error


def _fetch(folder: Path, repo: str, revision: str | None, expected: Shapes) -> Weights:
    if (folder / INDEX).is_file():
        try:
            return check_checkpoint(folder, expected)
        except DamagedFilesError:
            pass  # what is missing is fetched below

    _refuse_foreign_weights(folder)
    source = _find(repo, revision)
    staging = folder / STAGING / f"{repo.replace('/', '--')}@{source.commit}"
    _check_disk_space(folder, staging, expected)
    _download(source, staging)
    parameters = _check_download(staging, source, expected)
    _move_into_place(staging, folder, source)
    shutil.rmtree(staging.parent)
    return Weights(parameters, source)


def _refuse_foreign_weights(folder: Path) -> None:
    """transformers would read a model.safetensors that lies beside the shards instead of them."""
    foreign = sorted(file.name for file in folder.glob("*.safetensors") if not SHARD.fullmatch(file.name))
    if foreign:
        raise FetchError(f"{folder} holds other weights: {_some(foreign)}; move them away or choose another folder")


def _check_disk_space(folder: Path, staging: Path, expected: Shapes) -> None:
    size = BYTES_PER_PARAMETER * sum(map(math.prod, expected.values()))
    missing = size - sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FetchError(
            f"the weights need another {missing / 1e9:.1f} GB and {folder.resolve()} has {free / 1e9:.1f} GB free; "
            "free some space or choose a folder on another disk"
        )


def _find(repo: str, revision: str | None) -> Source:
    """The commit that a revision leads to, with the digests of its weights."""
    with _hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    weights = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    return Source(repo, str(info.sha), {file.rfilename: file.lfs.sha256 for file in weights if file.lfs})


def _download(source: Source, staging: Path) -> None:
    staging.mkdir(parents=True, exist_ok=True)
    with _hub_errors(source.repository, source.commit):
        snapshot_download(
            source.repository, revision=source.commit, local_dir=staging, allow_patterns=["*.safetensors", INDEX]
        )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Errors of the Hub and of the way to it, as FetchError with the remedy."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise FetchError(f"{repo} has no revision {revision!r}; see its list of commits on the Hub") from error
    except RepositoryNotFoundError as error:
        raise FetchError(f"no repository {repo!r} on the Hub, or it needs a login: `hf auth login`") from error
    except HFValidationError as error:
        raise FetchError(f"{repo!r} is not the name of a Hub repository, such as {PUBLISHED}") from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FetchError(
            f"the download of {repo} stopped ({reason}); check the network, the disk and that HF_HUB_OFFLINE is not "
            "set, then run the same command again: it goes on where it stopped"
        ) from error


def _check_download(staging: Path, source: Source, expected: Shapes) -> int:
    """The number of parameters."""
    try:
        parameters = _check_shapes(staging, expected)
        unknown = sorted({*read_weight_map(staging).values()} - source.sha256.keys())
        if unknown:
            raise FetchError(f"the Hub names no digest of {_some(unknown)}, so {source.repository} cannot be checked")
        _check_digests(staging, source)
    except DamagedFilesError as error:
        for file in error.files:  # so that the next run fetches them anew
            (staging / file).unlink(missing_ok=True)
        raise
    except TensorMismatchError:
        shutil.rmtree(staging)
        raise
    return parameters


def _move_into_place(staging: Path, folder: Path, source: Source) -> None:
    """Hard links, the index last: cut off half-way, the next run finds the download whole and links again."""
    write_whole(folder / RECORD, json.dumps(asdict(source), indent=2) + "\n")
    for file in [*sorted(staging.glob("*.safetensors")), *staging.glob(INDEX)]:
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:  # a file system without hard links
            os.replace(file, target)
