"""Anything a caller may hold -> an upright 8-bit RGB image.

What is special:
- Images are turned upright (EXIF) and transparency is laid over white. The published code does neither;
  `do_exif_transpose=False, background_color=None` gives its behavior.
- What cannot be used is refused with an error that says what was wrong and what to do. Sizes are looked at before
  anything is decoded, downloads are bounded, and only common formats are opened: Pillow's others include readers that
  start programs (EPS) or take minutes for a few bytes.
"""

import base64
import os
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .configuration_minicpmv import MiniCPMVError


class ImageInputError(MiniCPMVError):
    """An image that cannot be used: the message names what was given, what is accepted and what to do."""


# Here, not where it is raised: transformers 4 runs a module once more when an Auto class loads it, and then its errors
# are no longer those that the processor names. No Auto class loads this module.
class FramePackingError(MiniCPMVError):
    """`temporal_ids` that do not describe the images they came with."""


# HEIF where pillow-heif is installed and registered, AVIF where Pillow was built with it.
IMAGE_FORMATS = tuple(
    ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "MPO", "PPM", "DIB", "ICO", "TGA", "QOI", "AVIF", "HEIF"]
)
FETCH_TIMEOUT = 30  # seconds without a sign of the server
FETCH_SECONDS = 120  # for the whole of a download
FETCH_BYTES = 64 * 2**20

# What Pillow's decoders raise on damaged data.
_PROGRAM_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
DECODE_ERRORS = (OSError, EOFError, struct.error, zlib.error, Image.DecompressionBombError, *_PROGRAM_ERRORS)
# A lazy Pillow image may stand in a batch twice, and its decoder is not safe under threads.
_DECODE_LOCK = threading.Lock()
_ACCEPTED = "a Pillow image, a path, a data: or http(s) URL, bytes, a numpy array or a torch tensor"
_DAMAGED = "give a complete file that is not damaged"
_TOO_LARGE = "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS for a source you trust"


def load_image(
    image: Any,
    input_data_format: str | None = None,
    do_exif_transpose: bool = True,
    background_color: tuple[int, int, int] | None = (255, 255, 255),
) -> Image.Image:
    """Turn `image` into an 8-bit RGB Pillow image.

    Args:
        image: Pillow image of any mode; path; `data:` URL; `http(s)` URL; the bytes of a file; `{"bytes", "path"}` (a
            image that the library datasets has not decoded); numpy array `(H, W)`, `(H, W, C)` or, where it cannot be
            mistaken, `(C, H, W)`; torch tensor `(H, W)`, `(C, H, W)` or, where it cannot be mistaken, `(H, W, C)`. C is
            1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA). Values are uint8, uint16 (0..65535), bool, or floating
            point in [0, 1].
        input_data_format: "channels_first" or "channels_last" for arrays and tensors whose shape leaves a doubt.
        do_exif_transpose, background_color: as in `ImageSettings`.

    16-bit and floating-point grays are scaled to 8 bits. Of an image with several frames the current one is read.
    Raises ImageInputError, also for a file of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(image, Mapping) and image.keys() & {"bytes", "path"}:
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, np.ndarray):
        image = _array_to_pil(image, input_data_format, channels_last=True)
    elif hasattr(image, "detach"):  # a tensor, in an environment that has torch
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # numpy has no bfloat16
        image = _array_to_pil(image.numpy(), input_data_format, channels_last=False)
    elif not isinstance(image, Image.Image):
        image = _open(image)
    name = f"image of {image.width} x {image.height} pixels"
    if image.width < 1 or image.height < 1:
        raise ImageInputError(f"{name}: it is empty; give one of at least 1 x 1")
    with _explained(name):
        with _DECODE_LOCK:
            image.load()
        return _to_rgb(_turn_upright(image) if do_exif_transpose else image, background_color)


def _open(source: Any) -> Image.Image:
    file: Any
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        name, file = source, BytesIO(_fetch(source))
    elif isinstance(source, str) and source.startswith("data:"):
        name, file = "data: URL", BytesIO(_decode_data_url(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, file = f"{len(source)} bytes", BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name, file = repr(os.fspath(source)[:200]), source
        if not os.path.isfile(source):  # a named pipe would be waited for
            what = "not a file" if os.path.exists(source) else "no such file"
            raise ImageInputError(f"{name}: {what}; give {_ACCEPTED}")
    else:
        raise ImageInputError(f"an image cannot be of type {type(source).__name__}; give {_ACCEPTED}")
    with _explained(name), open_formats(file) as image:
        check_pixels(name, image)
        image.load()
        return image


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what Pillow raises on the image called `name` into an ImageInputError that says what to do."""
    try:
        yield
    except ImageInputError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageInputError(f"{name}: {error}; {_TOO_LARGE}") from error
    except UnidentifiedImageError as error:
        what = f"not an image in a format that is read here ({', '.join(IMAGE_FORMATS)}), perhaps a page of text"
        raise ImageInputError(f"{name}: {what}; give {_ACCEPTED}") from error
    except DECODE_ERRORS as error:
        raise ImageInputError(f"{name}: cannot be decoded ({error}); {_DAMAGED}") from error


def open_formats(file: Any) -> Image.Image:
    """`PIL.Image.open` for IMAGE_FORMATS alone."""
    Image.init()
    return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])


def check_pixels(name: str, image: Image.Image) -> None:
    """Raises ImageInputError for an opened image with more than PIL.Image.MAX_IMAGE_PIXELS, from where Pillow warns."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageInputError(f"{name}: {image.width} x {image.height} pixels, more than {limit}; {_TOO_LARGE}")


def _fetch(address: str) -> bytes:
    # Some servers refuse Python's own name.
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (compatible; MiniCPM-V)"})
    end = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT) as answer:
            while piece := answer.read1(2**16):
                data += piece
                if len(data) > FETCH_BYTES or time.monotonic() > end:
                    limits = f"more than {FETCH_BYTES} bytes or {FETCH_SECONDS} seconds"
                    raise ImageInputError(f"{address}: {limits}; download it and give the file")
    except (OSError, HTTPException, UnicodeError) as error:
        raise ImageInputError(f"{address}: cannot be fetched ({error}); download it and give the file") from error
    return bytes(data)


def _decode_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageInputError(f"data URL {url[:40]!r} has no comma; expected data:image/...;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise ImageInputError(f"data URL {url[:40]!r}... is not valid base64: {error}; encode it again") from error


def _array_to_pil(array: np.ndarray, input_data_format: str | None, channels_last: bool) -> Image.Image:
    shape = tuple(array.shape)
    if input_data_format not in (None, "channels_first", "channels_last"):
        remedy = "give 'channels_first' or 'channels_last'"
        raise ImageInputError(f"input_data_format={input_data_format!r} is unknown; {remedy}")
    if array.ndim == 3:
        if input_data_format is not None:
            channels_last = input_data_format == "channels_last"
        elif not 1 <= shape[-1 if channels_last else 0] <= 4:
            channels_last = not channels_last
        if not channels_last:
            array = np.moveaxis(array, 0, -1)
    if 0 in shape or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] > 4):
        raise ImageInputError(
            f"array of shape {shape} is not one image; give (height, width) or, with 1 to 4 channels, (height, width, "
            "channels) or (channels, height, width), none of them empty; several images as a list"
        )
    array = _to_uint8(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale bool, uint16 (0..65535) and floating-point ([0, 1]) values to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # also true for NaN; the margin is for resampled images
            raise ImageInputError(f"floating-point values from {low:g} to {high:g} must lie in [0, 1]; divide them")
        return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    raise ImageInputError(f"dtype {array.dtype} is not supported; convert to uint8, or floating point in [0, 1]")


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if is_turned else image  # which would copy it
    except DECODE_ERRORS:  # unreadable metadata says nothing about the pixels
        return image


def _to_rgb(image: Image.Image, background_color: tuple[int, int, int] | None) -> Image.Image:
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if image.mode == "RGB" and not has_alpha:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # I is what Pillow's readers give for some 16-bit grays; convert() would clip both to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            found = f"values from {values.min()} to {values.max()}"
            raise ImageInputError(f"32-bit image has {found}; mode I is read as 0..65535: scale it")
        return Image.fromarray(_to_uint8(values.astype(np.uint16))).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if background_color is None or not has_alpha:
        return image.convert("RGB")
    # Pillow has no direct way from premultiplied gray to RGBA
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*background_color, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")
