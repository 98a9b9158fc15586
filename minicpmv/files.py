"""Files that runs write: whole or not at all, and JSON lines that outlive a kill; and what tells two files apart."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError


class DamagedFileError(MiniCPMVError):
    """A file that a run wrote cannot be read: the message names the file, the line, and what to do."""


class UnwritableFileError(MiniCPMVError):
    """A file cannot be written where it should go."""


def file_digest(path: Path, method: str = "sha256") -> str:
    """The digest of a file's bytes in hexadecimal digits, a block at a time. `method` is a name that hashlib knows."""
    digest = hashlib.new(method, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that fills it. Makes its folder.

    Raises:
        UnwritableFileError: names it, and what the system says.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise UnwritableFileError(f"{path} cannot be written ({error.strerror}): choose another place") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedFileError: it is not one.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not JSON ({error}): delete it, or put back a copy") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is JSON, but not an object: delete it, or put back a copy")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line.

    Raises:
        DamagedFileError: names the line that is not one.
    """
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(
                f"{path}, line {number} is not JSON ({error}): delete the line, or the file"
            ) from error
        if not isinstance(entry, dict):
            raise DamagedFileError(f"{path}, line {number} is not a JSON object: delete the line, or the file")
        entries.append(entry)
    return entries


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
