"""Images and videos as a user names them: what can be refused before a model is loaded, and what a session is given."""

import mimetypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError


# Formats that Pillow decodes itself, without a program beside it.
CHECKED_FORMATS = {"BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"}


class MediaError(MiniCPMVError):
    """An image or video that is not there, or cannot be read."""


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def is_file(source: str) -> bool:
    source = os.path.expanduser(source)
    return os.path.exists(source) and not os.path.isdir(source)


def looks_like_media(name: str) -> bool:
    """Whether a name ends as those of images and videos do."""
    return (mimetypes.guess_type(name)[0] or "").startswith(("image/", "video/"))


def check_media(sources: Iterable[str], hint: str = "") -> None:
    """Refuse files that are not there, or that are damaged images, before anything expensive happens.

    Raises:
        MediaError: names the first.
    """
    for source in sources:
        if is_address(source):
            continue
        if not is_file(source):
            raise MediaError(f"{source}: no such file; give an image, a video, or the address of an image{hint}")
        kind = mimetypes.guess_type(source)[0] or ""
        if kind == "application/pdf":
            raise MediaError(f"{source} is a PDF: minicpmv read {source} -q QUESTION reads documents")
        # What no suffix tells is the processor's to judge; a named pipe would be read here for nothing.
        if kind and not kind.startswith(("video/", "audio/")) and os.path.isfile(os.path.expanduser(source)):
            check_image(source)


def check_image(source: str) -> None:
    """Refuse a damaged image; in doubt leave it to the processor.

    Raises:
        MediaError: Pillow does not know it, or it is cut off.
    """
    from PIL import Image

    try:
        with Image.open(os.path.expanduser(source)) as image:
            if image.format in CHECKED_FORMATS:
                image.draft("RGB", (64, 64))  # a JPEG is read whole, but not computed whole
                image.load()
    except Image.DecompressionBombError:
        pass  # the processor says how many pixels are too many
    except OSError as error:
        raise MediaError(
            f"{source} is not an image that can be read ({error}); give a file that is complete"
        ) from error


def source_of(name: str) -> str | Path:
    """What a user named: an address, or a file, whose ~ is the home folder."""
    return name if is_address(name) else Path(name).expanduser()


def media_part(
    model: Any, processor: Any, source: str | Path | bytes, max_slice_nums: int | None = None, kind: str | None = None
) -> Any:
    """A part of a message; an image is encoded already, and a video known to be readable.

    Args:
        kind: "image" or "video"; told by the suffix if it is not given.

    Raises:
        MediaError: it is not there, or the video cannot be read.
    """
    if isinstance(source, str) and not is_address(source):
        check_media([source])
        source = source_of(source)
    if (kind or processor.kind_of(str(source))) != "video":
        return model.encode_images(source, processor, max_slice_nums)
    from minicpmv.apps.clips import duration_of

    try:
        duration_of(processor, source)  # a damaged video is refused here, not with the question
    except OSError as error:
        raise MediaError(f"the video cannot be read: {error}") from error
    return {"type": "video", "video": source}
