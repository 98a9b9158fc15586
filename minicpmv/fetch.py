"""Attach the published weights (17.4 GB) to a folder that holds this repository.

    minicpmv fetch [FOLDER] [--revision SHA]        download, check, move into place
    minicpmv fetch FOLDER --check-only              check what is there

Only *.safetensors files and their index are downloaded: no code, no pickles. Every tensor's name and shape is compared
with `checkpoint_shapes.json` before a file reaches the folder, so a folder holds all of the weights or none.
A download that was cut off goes on where it stopped when the command is run again.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HTTPError,  # the HTTP library's own base class: requests, httpx or httpx2, by version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from minicpmv.errors import MiniCPMVError


PUBLISHED_REPO = "openbmb/MiniCPM-V-4_5"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
BYTES_PER_PARAMETER = 2  # the checkpoint is stored in bfloat16


class FetchError(MiniCPMVError):
    """The weights could not be attached; the message says why and what to do."""


class DamagedFilesError(FetchError):
    """Files of the checkpoint are missing, cut off or unreadable: `files` names them."""

    def __init__(self, folder, files, reason):
        self.files = sorted(files)
        super().__init__(f"{folder}: {reason}: {_some(self.files)}; run `minicpmv fetch` again")


class TensorMismatchError(FetchError):
    """Tensors are not those of MiniCPM-V 4.5: `missing`, `unexpected` (names), `wrong_shape` (name -> found, expected)."""

    def __init__(self, folder, missing, unexpected, wrong_shape):
        self.missing, self.unexpected, self.wrong_shape = sorted(missing), sorted(unexpected), wrong_shape
        shapes = [f"{name} is {found}, not {expected}" for name, (found, expected) in sorted(wrong_shape.items())]
        parts = [
            f"{len(items)} {kind} ({_some(items)})"
            for kind, items in (("missing", self.missing), ("unexpected", self.unexpected), ("of wrong shape", shapes))
            if items
        ]
        super().__init__(
            f"{folder}: the tensors are not those of MiniCPM-V 4.5: {', '.join(parts)}; "
            f"check --repo and --revision, the published weights are in {PUBLISHED_REPO}"
        )


def _some(names, limit=3):
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def published_shapes():
    """`{tensor name: shape}` of the published checkpoint, 849 tensors."""
    return json.loads(Path(__file__).with_name("checkpoint_shapes.json").read_text(encoding="utf-8"))


def read_shapes(folder):
    """`{tensor name: shape}` of the checkpoint in `folder`, from the headers of its safetensors files alone.

    Raises DamagedFilesError when a file is missing, cut off, or lacks a tensor that the index promises.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFilesError(folder, [INDEX], "not a safetensors index") from error
        if any(Path(file).name != file or not file.endswith(".safetensors") for file in weight_map.values()):
            raise DamagedFilesError(folder, [INDEX], "the index names files outside its folder")
    elif (folder / SINGLE_FILE).is_file():
        weight_map = {}
    else:
        raise DamagedFilesError(folder, [INDEX], "no checkpoint here, for lack of")

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


def check_checkpoint(folder, expected=None):
    """Compare the checkpoint in `folder` with the published names and shapes; returns the number of parameters.

    Raises DamagedFilesError or TensorMismatchError.
    """
    expected = published_shapes() if expected is None else expected
    found = read_shapes(folder)
    wrong_shape = {
        name: (found[name], expected[name]) for name in found.keys() & expected if found[name] != expected[name]
    }
    if found.keys() != expected.keys() or wrong_shape:
        raise TensorMismatchError(folder, expected.keys() - found, found.keys() - expected, wrong_shape)
    return sum(map(math.prod, found.values()))


def fetch(folder=".", repo=PUBLISHED_REPO, revision=None, expected=None):
    """Download the weights of `repo` into `folder`; returns the number of parameters.

    Args:
        folder: holds the repository's config.json and code; the weights go beside them.
        revision: commit, tag or branch of `repo`.
        expected: `{tensor name: shape}`; the published ones by default.

    Raises FetchError. What was downloaded stays in FOLDER/.minicpmv-fetch for the next try.
    """
    folder = Path(folder)
    expected = published_shapes() if expected is None else expected
    if not (folder / "config.json").is_file():
        raise FetchError(f"{folder} has no config.json; give the folder of a clone of this repository")
    if (folder / INDEX).is_file():
        try:
            return check_checkpoint(folder, expected)
        except DamagedFilesError:
            pass  # what is missing is fetched below

    staging = folder / ".minicpmv-fetch" / f"{repo.replace('/', '--')}@{revision or 'main'}".replace("/", "-")
    _refuse_foreign_weights(folder)
    _check_disk_space(folder, staging, expected)
    _download(repo, revision, staging)
    parameters = _check_download(staging, expected)
    _move_into_place(staging, folder)
    shutil.rmtree(staging.parent)
    return parameters


def _refuse_foreign_weights(folder):
    """transformers would read a model.safetensors that lies beside the shards instead of them."""
    foreign = sorted(file.name for file in folder.glob("*.safetensors") if not SHARD.fullmatch(file.name))
    if foreign:
        raise FetchError(f"{folder} holds other weights: {_some(foreign)}; move them away or choose another folder")


def _check_disk_space(folder, staging, expected):
    size = BYTES_PER_PARAMETER * sum(map(math.prod, expected.values()))
    missing = size - sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FetchError(
            f"the weights need another {missing / 1e9:.1f} GB and {folder.resolve()} has {free / 1e9:.1f} GB free; "
            "free some space or choose a folder on another disk"
        )


def _download(repo, revision, staging):
    staging.mkdir(parents=True, exist_ok=True)
    try:
        snapshot_download(repo, revision=revision, local_dir=staging, allow_patterns=["*.safetensors", INDEX])
    except RevisionNotFoundError as error:
        raise FetchError(f"{repo} has no revision {revision!r}; see its list of commits on the Hub") from error
    except RepositoryNotFoundError as error:
        raise FetchError(f"no repository {repo!r} on the Hub, or it needs a login: `hf auth login`") from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FetchError(
            f"the download of {repo} stopped ({reason}); check the network, the disk and that HF_HUB_OFFLINE is not "
            "set, then run the same command again: it goes on where it stopped"
        ) from error


def _check_download(staging, expected):
    try:
        return check_checkpoint(staging, expected)
    except DamagedFilesError as error:
        for file in error.files:  # so that the next run fetches them anew
            (staging / file).unlink(missing_ok=True)
        raise
    except TensorMismatchError:
        shutil.rmtree(staging)
        raise


def _move_into_place(staging, folder):
    """Hard links, the index last: cut off half-way, the next run finds the download whole and links again."""
    for file in [*sorted(staging.glob("*.safetensors")), *staging.glob(INDEX)]:
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:  # a file system without hard links
            os.replace(file, target)
