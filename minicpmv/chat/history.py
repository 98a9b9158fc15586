"""Histories on disk: `history.json` beside images and videos, never a pickle.

What is special:
- A file is named by its content, and so belongs to a history only if its name is that of its content: whatever else a
  `history.json` names is neither read nor deleted.
- The folder is a whole history at any time: images are there before `history.json` names them, and readers and writers take turns.
- Conversations are private: nobody but the owner can read what is saved.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from minicpmv.errors import MiniCPMVError


try:
    import fcntl
except ImportError:  # Windows, where they do not
    fcntl = None  # type: ignore[assignment]


HISTORY_FILE = "history.json"
FORMAT = 1  # of that file
ROLES = ("system", "user", "assistant", "tool")


class HistoryError(MiniCPMVError):
    """A folder is not a saved history, or stands where one should be saved."""


def save_history(messages: list[dict], folder: str | os.PathLike, processor) -> None:
    """Save messages: `history.json`, images as PNG, videos as they are. An older history in `folder` is replaced; other
    files there stay.

    Args:
        processor: of the model; it tells images from videos, and reads images.

    Raises:
        HistoryError: `folder` holds something else, or a video cannot be saved.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise HistoryError(f"{str(folder)!r} is a file. Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-"
    ) as new:  # readable by its owner only
        stored = [_stored_message(message, Path(new), processor) for message in messages]
        text = json.dumps({"format": FORMAT, "messages": stored}, ensure_ascii=False, indent=2)
        (Path(new) / HISTORY_FILE).write_text(text + "\n", encoding="utf-8")
        for file in Path(new).iterdir():
            file.chmod(0o600)
        if not folder.exists():
            try:
                Path(new).rename(folder)
                return
            except OSError:  # somebody else was faster
                pass
        with _alone_in(folder):
            _replace(folder, Path(new))


def _replace(folder: Path, new: Path) -> None:
    """Put the files of `new` in the place of the history in `folder`."""
    if (folder / HISTORY_FILE).exists():
        older = {name for message in _stored_messages(folder) for name in _names(message)}
    else:
        older = {file.name for file in folder.iterdir()}
        if not all(_is_ours(folder / name) for name in older):
            raise HistoryError(f"{str(folder)!r} exists and is no saved history. Choose another folder.")
    kept = {file.name for file in new.iterdir()}
    for name in kept - {HISTORY_FILE}:
        if not _is_ours(folder / name):
            os.replace(new / name, folder / name)
    os.replace(new / HISTORY_FILE, folder / HISTORY_FILE)
    for name in older - kept:
        if _is_ours(folder / name):
            (folder / name).unlink()


def load_history(folder: str | os.PathLike) -> list[dict]:
    """The messages of a saved history. Images and videos come as bytes: what happens to the folder does not matter to
    whoever goes on from here.

    Raises:
        HistoryError: the folder holds no history, or one that names files which are not its own.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HistoryError(f"{str(folder)!r} holds no saved history: there is no such folder.")
    with _alone_in(folder):
        return [_loaded_message(message, folder) for message in _stored_messages(folder)]


# ---- messages to files ----


def _stored_message(message: Mapping, folder: Path, processor) -> dict:
    """A message as JSON; its images and videos are written to `folder`."""
    stored = {name: value for name, value in message.items() if name != "content"}
    content = message.get("content")
    if content is None or isinstance(content, str):
        return stored | {"content": content}
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        kind, value = processor.read_part(part)
        parts.append({"type": kind, kind: value if kind == "text" else _store(kind, value, folder, processor)})
        if isinstance(part, Mapping) and "ref" in part:
            parts[-1]["ref"] = part["ref"]
    return stored | {"content": parts}


def _store(kind: str, value: Any, folder: Path, processor) -> Any:
    """Write an image or video; returns its file name, or the list of the names of its frames."""
    if kind == "image":
        image = processor.load_image(getattr(value, "image", value))  # what `model.encode_images` was given
        return _named_by_content(folder, ".png", image.save)
    if isinstance(value, (str, os.PathLike)) and Path(value).is_file():
        return _named_by_content(folder, Path(value).suffix, lambda file: shutil.copyfile(value, file))
    if isinstance(value, (bytes, bytearray)):
        return _named_by_content(folder, ".video", lambda file: file.write_bytes(value))
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 4:
        return [_store("image", frame, folder, processor) for frame in value]
    raise HistoryError(f"A video given as {type(value).__name__} cannot be saved: give a path, bytes or frames.")


def _named_by_content(folder: Path, suffix: str, write: Callable[[Path], Any]) -> str:
    file = folder / f"new{suffix}"
    write(file)
    name = _digest(file) + suffix
    os.replace(file, folder / name)
    return name


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _is_ours(file: Path) -> bool:
    """Whether a file is named by its content, as this module names files."""
    return file.is_file() and not file.is_symlink() and file.name == _digest(file) + file.suffix


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else reads or writes the folder."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ---- files to messages ----


def _stored_messages(folder: Path) -> list[dict]:
    """The messages of a saved history, as JSON."""
    try:
        stored = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HistoryError(f"{str(folder)!r} holds no saved history ({error}).") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("messages"), list):
        raise HistoryError(f"{HISTORY_FILE} in {str(folder)!r} is not a history of format {FORMAT}.")
    for message in stored["messages"]:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not _is_content(message.get("content"))
        ):
            raise HistoryError(
                f"{HISTORY_FILE} in {str(folder)!r} holds something that is no saved message: {message!r:.80}."
            )
    return stored["messages"]


def _is_content(content: Any) -> bool:
    return content is None or isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    """Whether a part is as `save_history` writes it; every other form that a message may have could name a file."""
    if not isinstance(part, dict) or part.get("type") not in ("text", "image", "video"):
        return False
    kind, value = part["type"], part.get(part["type"])
    if not part.keys() <= {"type", kind, "ref"} or not isinstance(part.get("ref", ""), str):
        return False
    is_frames = kind == "video" and isinstance(value, list) and all(isinstance(name, str) for name in value)
    return isinstance(value, str) or is_frames


def _names(message: dict) -> list[str]:
    """The files that a message names."""
    names: list[str] = []
    for part in message["content"] if isinstance(message.get("content"), list) else []:
        if part["type"] != "text":
            value = part[part["type"]]
            names += value if isinstance(value, list) else [value]
    return names


def _loaded_message(message: dict, folder: Path) -> dict:
    for name in _names(message):
        if Path(name).name != name or not _is_ours(folder / name):
            raise HistoryError(f"{HISTORY_FILE} names {name!r}, which is no file of the history in {str(folder)!r}.")
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        kind = part["type"]
        if kind != "text" and isinstance(part[kind], list):
            part = part | {kind: [_frame(folder / name) for name in part[kind]]}
        elif kind != "text":
            part = part | {kind: (folder / part[kind]).read_bytes()}
        parts.append(part)
    return message | {"content": parts}


def _frame(file: Path) -> Image.Image:
    with Image.open(file, formats=["PNG"]) as image:
        return image.convert("RGB")
