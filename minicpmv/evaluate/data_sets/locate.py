"""Where data files lie: in a folder that the user names, in VLMEvalKit's, in our own cache, or in the Hub's."""

import os
from pathlib import Path

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.data_sets.catalog import DataSet, hub_repositories, squeezed


class MissingDataError(MiniCPMVError):
    """A data set, or a file of it, is not on this machine: the message says where was looked, and how to get it."""


def cache_folder() -> Path:
    """Where `minicpmv evaluate get` puts files unless it is told otherwise: $LMUData, or a folder in the user's cache."""
    if given := os.environ.get("LMUData"):  # noqa: SIM112 (VLMEvalKit's name)
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minicpmv" / "data"


def places(data_set: DataSet, folder: Path | None) -> list[Path]:
    """The folders in which the data set's files may lie, in the order in which they are tried.

    `folder` alone, where one is given; a data set of several files lies in a subfolder of it, or in itself where it has
    the data set's name.
    """
    roots = [folder] if folder else list(dict.fromkeys([cache_folder(), Path("~/LMUData").expanduser()]))
    found = [root / data_set.folder if data_set.folder else root for root in roots]
    if folder and data_set.folder and squeezed(folder.resolve().name) in map(squeezed, (data_set.id, data_set.folder)):
        found.append(folder)
    if not folder:
        found += hub_snapshots(data_set)
    return found


def hub_snapshots(data_set: DataSet) -> list[Path]:
    """Folders of the Hub's own cache that hold files of the data set."""
    from huggingface_hub import try_to_load_from_cache

    snapshots = []
    for repository in hub_repositories(data_set):
        file = try_to_load_from_cache(repository, data_set.annotation, repo_type="dataset")
        if isinstance(file, str):
            snapshots.append(Path(file.removesuffix(data_set.annotation)))
    return snapshots


def find(data_set: DataSet, folder: Path | None = None) -> Path:
    """The folder that holds the data set's rows.

    Raises:
        MissingDataError: none does.
    """
    tried = places(data_set, folder)
    for place in tried:
        if (place / data_set.annotation).is_file():
            return place
    note = f" ({data_set.note})" if data_set.note else ""
    looked = ", ".join(str(place / data_set.annotation) for place in tried)
    target = f" --data {folder}" if folder else ""
    raise MissingDataError(
        f"{data_set.id} is not here (looked for {looked}): `minicpmv evaluate get {data_set.id}{target}` fetches it{note}, "
        "and --data DIR names another folder"
    )
