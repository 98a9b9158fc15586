"""Fetch the test classes of the installed transformers, once.

They are in its source distribution only, not in the wheel. pip downloads that, so an index or a mirror that is set up for
pip serves here too; `tests/` is unpacked as the package `transformers_tests`, and the rest is thrown away.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).parents[3] / ".cache"
PACKAGE = "transformers_tests"  # in the source distribution `tests`, a name that this repository has as well


class MixinsNotFetchedError(RuntimeError):
    """The source distribution of transformers could not be had; the message says why and what to do."""


def fetch(cache=CACHE):
    """The folder, to put on `sys.path`, that holds the package `transformers_tests` of the installed version."""
    release = f"transformers-{version('transformers')}"
    target = Path(cache) / release
    if not target.is_dir():
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            unpacked = Path(work) / "unpacked"
            _unpack_tests(_download(release, Path(work)), unpacked / PACKAGE)
            try:
                unpacked.rename(target)
            except OSError:  # another test process was faster
                if not target.is_dir():
                    raise
    return target


def _download(release, folder):
    # --no-binary for this one package: what pip wants for reading its metadata (setuptools) may well be a wheel.
    command = ["-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), release.replace("-", "==")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    archives = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise MixinsNotFetchedError(
            f"pip could not download the source distribution of {release}, which holds the test classes:\n"
            f"{done.stderr.strip()}\nConnect to a package index, or run the other tests with "
            "`pytest tests --ignore tests/model/conformance`."
        )
    return archives[0]


def _unpack_tests(archive, target):
    """Write the Python files of `<release>/tests/` in `archive` to `target`, as a package."""
    with tarfile.open(archive) as source:
        for member in source:
            parts = Path(member.name).parts[1:]
            if member.isfile() and parts[:1] == ("tests",) and member.name.endswith(".py"):
                path = target.joinpath(*parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    shutil.copyfileobj(source.extractfile(member), file)
    if not (target / "test_modeling_common.py").is_file():
        raise MixinsNotFetchedError(
            f"{archive.name} has no tests/test_modeling_common.py; its layout is unknown here."
        )
    (target / "__init__.py").touch()


if __name__ == "__main__":
    print(fetch())
