"""Images and videos of a row -> addresses in a request.

A file stays where it is for an engine that reads this machine's files, and travels as a data URL to any other.
"""

import base64
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from minicpmv.errors import MiniCPMVError


DEFAULT_TYPES = {"image": "image/jpeg", "video": "video/mp4"}


class MediaError(MiniCPMVError):
    """An image, video or document of a row that cannot be used."""


@dataclass(frozen=True)
class Media:
    """How the files of one row get into its requests.

    Args:
        folder: where relative paths begin.
        as_files: whether the engine reads files itself.
        max_megabytes: most of a file that travels.
    """

    folder: Path
    as_files: bool = False
    max_megabytes: float = 64

    def url(self, value: Any, kind: str) -> str:
        """The address of an image or a video.

        Args:
            value: an address (http, https, data, file), a path, bytes, or, as in columns of `datasets`, a mapping with
                `bytes` or `path`.
            kind: `"image"` or `"video"`.

        Raises:
            MediaError: it is none of them, there is no such file, or it is too large.
        """
        if isinstance(value, str) and value[:5].lower() in ("http:", "https", "data:"):
            return value
        if isinstance(source := self.source(value), bytes):
            return self._data_url(source, DEFAULT_TYPES[kind], f"{len(source)} bytes")
        if self.as_files:
            return source.as_uri()
        size = source.stat().st_size
        self._check(size, source)
        guessed = mimetypes.guess_type(source.name)[0] or ""
        return self._data_url(
            source.read_bytes(), guessed if guessed.startswith(kind) else DEFAULT_TYPES[kind], source
        )

    def source(self, value: Any) -> Path | bytes:
        """The path, absolute, or the bytes of an image, video or document.

        Raises:
            MediaError: as `url`; an address other than `file:` is no source.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise MediaError(f"{str(value)[:80]!r} is neither an address, a path nor bytes")
        if value[:5].lower() == "file:":
            value = url2pathname(urlsplit(value).path)
        elif "://" in value[:20] or value[:5].lower() == "data:":
            raise MediaError(f"{value[:80]!r} is not a file of this machine")
        path = (self.folder / value).absolute()
        if not path.is_file():
            raise MediaError(f"{value[:200]}: no such file")
        return path

    def _data_url(self, data: bytes, type: str, name: Any) -> str:
        self._check(len(data), name)
        return f"data:{type};base64,{base64.b64encode(data).decode()}"

    def _check(self, size, name):
        if size > self.max_megabytes * 1e6:
            raise MediaError(
                f"{name} has {size / 1e6:.1f} MB; at most {self.max_megabytes:g} MB (--max-megabytes) are sent"
            )
