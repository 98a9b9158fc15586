"""Fetches the files of a data set: asked for, told beforehand, resumed, checked.

What is special:
- `plan` asks the sources for names and sizes and fetches nothing; `fetch` brings what the plan lists;
- a file grows as NAME.part and takes its name when its length and its digest are right: an interruption leaves only
  the .part, and the next run goes on at its end (HTTP range);
- files of the Hub are checked by the SHA-256 that it states, others by the MD5 that the reference harness knows;
- archives are unpacked and removed; a small NAME.unpacked stays in their place, so they are not fetched again.
"""

import fnmatch
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import quote, urlsplit

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.data_sets.catalog import HUB, DataSet, HubFiles, RemoteFile
from minicpmv.files import file_digest


BLOCK = 1 << 20
TIMEOUT = 60  # seconds without a byte
ARCHIVE_PART = re.compile(r"(?P<archive>.+\.tar)\.part\.\w+")
UNPACKED = ".unpacked"
LOG_IN = "log in with `hf auth login`"


class DownloadError(MiniCPMVError):
    """A file could not be fetched: the message names it, says why, and what to do."""


class InterruptedDownloadError(DownloadError):
    """A connection ended before the file did."""


@dataclass(frozen=True)
class Download:
    """One file to fetch.

    path: where it goes; size: in bytes, None where the source does not say; digest: "md5:..." or "sha256:...", or None;
    gate: what to do where the source does not hand it out.
    """

    path: Path
    url: str
    size: int | None
    digest: str | None
    gate: str | None = None

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    @property
    def is_here(self) -> bool:
        return self.path.is_file() or self.path.with_name(self.path.name + UNPACKED).is_file()

    @property
    def missing(self) -> int | None:
        """Bytes still to fetch."""
        if self.size is None:
            return None
        return max(0, self.size - _length(self.part))


def plan(data_set: DataSet, root: Path) -> list[Download]:
    """All files of a data set, whether they are here or not; asks their sources for names and sizes.

    Args:
        root: the data folder; a data set of several files gets a subfolder.

    Raises:
        DownloadError: a source cannot be reached, does not have the files, or does not hand them out.
    """
    folder = root / data_set.folder
    found = []
    for source in data_set.sources:
        if isinstance(source, HubFiles):
            found += _hub_files(source, folder, data_set)
        else:
            found.append(_remote_file(source, folder, data_set))
    return found


def _remote_file(source: RemoteFile, folder: Path, data_set: DataSet) -> Download:
    url = source.url.replace(HUB, _hub_address(), 1) if source.url.startswith(HUB) else source.url
    digest = f"md5:{source.md5}" if source.md5 else None
    file = Download(folder / source.path, url, None, digest, data_set.gate)
    return file if file.is_here else replace(file, size=remote_size(url, data_set.gate))


def _hub_files(source: HubFiles, folder: Path, data_set: DataSet) -> list[Download]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        info = HfApi(endpoint=_hub_address()).dataset_info(source.repository, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{data_set.id}: the Hub does not show {source.repository} to you, or it is gone: {data_set.gate or LOG_IN}"
        ) from error
    except (HTTPError, OSError) as error:
        raise DownloadError(_unreachable(data_set.id, source.repository, error)) from error
    files = [
        Download(
            folder / PurePosixPath(file.rfilename),
            f"{_hub_address()}/datasets/{source.repository}/resolve/{info.sha}/{quote(file.rfilename)}",
            file.size,
            f"sha256:{file.lfs.sha256}" if file.lfs else None,
            data_set.gate,
        )
        for file in info.siblings or ()
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in source.patterns)
        and ".." not in PurePosixPath(file.rfilename).parts
    ]
    for pattern in source.patterns:
        if not any(fnmatch.fnmatch(file.rfilename, pattern) for file in info.siblings or ()):
            raise DownloadError(
                f"{data_set.id}: {source.repository} has no {pattern} any more: fetch its files by hand, and name their "
                "folder with --data"
            )
    return files


def _hub_address() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT.rstrip("/")


def _unreachable(what: str, where: str, error: BaseException) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{what}: {where} cannot be reached ({reason}): check the network and proxy, and run the same command again: it "
        "goes on where it stopped"
    )


def remote_size(url: str, gate: str | None = None) -> int | None:
    """Bytes of the file at `url`, or None where the server does not say.

    Raises:
        DownloadError: it is not there, or the server cannot be reached.
    """
    with _opened(urllib.request.Request(url, method="HEAD"), url, gate) as response:
        length = response.headers.get("Content-Length")
    return int(length) if length else None


@contextmanager
def _opened(request: urllib.request.Request, name: str, gate: str | None) -> Iterator[HTTPResponse]:
    if urlsplit(request.full_url).hostname == urlsplit(_hub_address()).hostname:
        from huggingface_hub import get_token

        if token := get_token():  # not passed on to where the Hub redirects
            request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise DownloadError(f"{name} is not handed out to you ({error.code}): {gate or LOG_IN}") from error
        raise DownloadError(
            f"{name}: the server answers {error.code} {error.reason}: if the file has moved, fetch it by hand and name "
            "its folder with --data"
        ) from error
    except (OSError, HTTPException) as error:
        raise DownloadError(_unreachable(name, urlsplit(request.full_url).hostname or "", error)) from error
    with response:
        yield response


def fetch(files: Sequence[Download], seen: Callable[[int], None] = lambda count: None) -> None:
    """Bring the files of a plan that are not here, and unpack archives.

    Args:
        seen: is told of bytes as they come.

    Raises:
        DownloadError: what was fetched so far stays, for the next run.
    """
    wanted = [file for file in files if not file.is_here]
    if wanted:
        _check_disk_space(wanted)
    for file in wanted:
        _fetch_patiently(file, seen)
    _unpack([file.path for file in files if file.path.is_file()])


def _check_disk_space(files: Sequence[Download]) -> None:
    folder = files[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    missing, free = sum(file.missing or 0 for file in files), shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadError(
            f"the files need another {in_units(missing)} and {folder} has {in_units(free)} free: free some space, or "
            "choose a folder on another disk with --data"
        )


def in_units(size: int | None) -> str:
    """A size for people."""
    if size is None:
        return "unknown size"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _fetch_patiently(file: Download, seen: Callable[[int], None]) -> None:
    """Go on after an interruption, as long as each try brings something."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        before = _length(file.part)
        try:
            return _fetch(file, seen)
        except InterruptedDownloadError:
            if file.size is None or _length(file.part) <= before:
                raise


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch(file: Download, seen: Callable[[int], None]) -> None:
    here = _length(file.part)
    if file.size is None or here > file.size:  # nobody can say where it ends; or it is of another file
        file.part.unlink(missing_ok=True)
        here = 0
    if file.size is None or here < file.size:
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={here}-"} if here else {})
        with _opened(request, file.path.name, file.gate) as response:
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {here}-")
            length = response.headers.get("Content-Length")
            whole = (int(length) if length else 0) + (here if resumed else 0) if length else file.size
            with file.part.open("ab" if resumed else "wb") as part:
                for block in _blocks(response):
                    part.write(block)
                    seen(len(block))
        if whole is not None and _length(file.part) != whole:
            raise InterruptedDownloadError(
                f"{file.path.name}: the connection ended after {_length(file.part)} of {whole} bytes: run the same "
                "command again, it goes on there"
            )
    _check_digest(file)
    file.part.replace(file.path)


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """What comes, until it ends in one way or another."""
    try:
        while block := response.read(BLOCK):
            yield block
    except (ConnectionError, TimeoutError, HTTPException):
        return  # the length tells


def _check_digest(file: Download) -> None:
    if file.digest is None:
        return
    method, _, expected = file.digest.partition(":")
    if (found := file_digest(file.part, method)) != expected:
        file.part.unlink()
        raise DownloadError(
            f"{file.path.name}: its {method.upper()} is {found}, not {expected}: it was damaged on the way or "
            "has changed at its source; run the command again, and if that does not help the figures of this file are not "
            "those that were published"
        )


def _unpack(files: Sequence[Path]) -> None:
    """Unpack zip files, tar files and tar files in parts, each into the folder in which it lies."""
    parts: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix == ".zip":
            _unpack_one([file], lambda source, folder: zipfile.ZipFile(source).extractall(folder))
        elif file.suffix == ".tar":
            _unpack_one([file], _untar)
        elif match := ARCHIVE_PART.fullmatch(file.name):
            parts.setdefault(file.with_name(match["archive"]), []).append(file)
    for archive in parts:
        _unpack_one(sorted(parts[archive]), _untar)


def _untar(source: IO[bytes], folder: Path) -> None:
    with tarfile.open(fileobj=source, mode="r|") as archive:
        archive.extractall(folder, filter="data")


def _unpack_one(files: Sequence[Path], unpack: Callable[[IO[bytes], Path], None]) -> None:
    try:
        if len(files) == 1:
            with files[0].open("rb") as source:
                unpack(source, files[0].parent)
        else:
            unpack(_Joined(files), files[0].parent)  # type: ignore[arg-type]
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DownloadError(
            f"{files[0]} cannot be unpacked ({error}): check the disk, or delete it and run the same command again"
        ) from error
    for file in files:
        file.with_name(file.name + UNPACKED).touch()
        file.unlink()


class _Joined:
    """Files one after the other, to be read as one."""

    def __init__(self, files: Sequence[Path]):
        self.files, self.open = list(files), files[0].open("rb")

    def read(self, size: int) -> bytes:
        found = self.open.read(size)
        while len(found) < size and len(self.files) > 1:
            self.open.close()
            self.files.pop(0)
            self.open = self.files[0].open("rb")
            found += self.open.read(size - len(found))
        return found
