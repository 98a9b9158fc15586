"""Anything a caller may hold -> an upright 8-bit RGB picture.

What is special here:
- Pictures are turned upright (EXIF) and transparency is laid over white. The published code does neither;
  `do_exif_transpose=False, background_color=None` gives its behaviour.
- Broken, truncated, oversized and empty pictures are refused with an error that says what was wrong and what to do.
"""

from __future__ import annotations

import base64
import binascii
import struct
import threading
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image as load_image_from_url

from .configuration_minicpmv import MiniCPMVError


class ImageInputError(MiniCPMVError):
    """A picture that cannot be used: the message names what was given, what is accepted and what to do."""


_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# What Pillow's decoders raise on damaged data.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# A lazy Pillow picture may stand in a batch twice, and its decoder is not safe under threads.
_DECODE_LOCK = threading.Lock()
FETCH_TIMEOUT = 30  # seconds without a sign of the server
_ACCEPTED = "a Pillow image, a path, a data: or http(s) URL, bytes, a numpy array or a torch tensor"


def load_image(
    image: Any,
    input_data_format: str | None = None,
    do_exif_transpose: bool = True,
    background_color: tuple[int, int, int] | None = (255, 255, 255),
) -> Image.Image:
    """Turn `image` into an 8-bit RGB Pillow image.

    Args:
        image: Pillow image of any mode; path (str or pathlib.Path); `data:` URL; `http(s)` URL (fetched by
            transformers, which drops alpha); the bytes of a file; `{"bytes", "path"}` (a picture that the library
            datasets has not decoded); numpy array `(H, W)`, `(H, W, C)` or, where it
            cannot be mistaken, `(C, H, W)`; torch tensor `(H, W)`, `(C, H, W)` or, where it cannot be mistaken,
            `(H, W, C)`. C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA). Values are uint8, uint16 (0..65535),
            bool, or floating point in [0, 1].
        input_data_format: "channels_first" or "channels_last" for arrays and tensors whose shape leaves a doubt.
        do_exif_transpose: turn the picture upright as its EXIF orientation says.
        background_color: RGB colour under transparent pixels; None drops the alpha channel.

    16-bit and floating-point greys are scaled to 8 bits. Of a picture with several frames the current one is read.

    Raises:
        ImageInputError: wrong type, shape, dtype or range, empty, missing, broken, truncated or oversized picture.
    """
    if isinstance(image, Mapping) and image.keys() & {"bytes", "path"}:
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, np.ndarray):
        image = _array_to_pil(image, input_data_format, channels_last=True)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # numpy has no bfloat16
        image = _array_to_pil(image.numpy(), input_data_format, channels_last=False)
    elif not isinstance(image, Image.Image):
        image = _open_image(image)
    if image.width < 1 or image.height < 1:
        raise ImageInputError(
            f"picture of {image.width} x {image.height} pixels is empty; both sides must be at least 1"
        )
    try:
        with _DECODE_LOCK:
            image.load()
    except _DECODE_ERRORS as error:
        raise ImageInputError(
            f"picture of {image.width} x {image.height} pixels ({image.format}) cannot be decoded ({error}); "
            "give a complete file that is not damaged"
        ) from error
    if do_exif_transpose:
        image = _turn_upright(image)
    return _to_rgb(image, background_color)


def _open_image(source: Any) -> Image.Image:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        name, opener = source, _fetch
    elif isinstance(source, str) and source.startswith("data:"):
        name, source, opener = "data: URL", BytesIO(_decode_data_url(source)), _open_file
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, source, opener = f"{len(source)} bytes", BytesIO(source), _open_file
    elif isinstance(source, (str, Path)):
        name, opener = repr(str(source)[:200]), _open_file
    else:
        raise ImageInputError(f"a picture cannot be of type {type(source).__name__}; give {_ACCEPTED}")
    try:
        return opener(source)
    except ImageInputError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageInputError(
            f"{name}: {error} (limit: twice PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}); "
            "scale the picture down, or raise that limit for a source you trust"
        ) from error
    except FileNotFoundError as error:
        raise ImageInputError(f"{name}: no such file; give {_ACCEPTED}") from error
    except UnidentifiedImageError as error:
        raise ImageInputError(f"{name}: not a picture in a format Pillow reads; give {_ACCEPTED}") from error
    except _DECODE_ERRORS as error:
        raise ImageInputError(
            f"{name}: cannot be read as a picture ({error}); give a complete file that is not damaged"
        ) from error


def _fetch(address: str) -> Image.Image:
    try:
        return load_image_from_url(address, timeout=FETCH_TIMEOUT)
    except Image.DecompressionBombError:
        raise
    except UnidentifiedImageError as error:
        raise ImageInputError(
            f"{address}: cannot be used: what this address answers is not a picture that Pillow reads, perhaps a page that "
            "says what is wrong; open it in a browser, or download the picture and give the file"
        ) from error
    except Exception as error:  # of the HTTP library, which differs between versions of transformers
        raise ImageInputError(f"{address}: cannot be fetched ({error}); download it and give the file") from error


def _open_file(file: str | Path | BytesIO) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def _decode_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageInputError(f"data URL {url[:40]!r} has no comma; expected data:image/...;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except binascii.Error as error:
        raise ImageInputError(f"data URL {url[:40]!r}... is not valid base64: {error}; encode it again") from error


def _array_to_pil(array: np.ndarray, input_data_format: str | None, channels_last: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        if input_data_format is not None:
            channels_last = _is_channels_last(input_data_format)
        elif not 1 <= shape[-1 if channels_last else 0] <= 4:
            channels_last = not channels_last
        if not channels_last:
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[-1] <= 4):
        raise ImageInputError(
            f"array of shape {tuple(shape)} is not one picture; give (height, width), (height, width, channels) or "
            "(channels, height, width) with 1 to 4 channels, set input_data_format if the axes are in doubt, and pass "
            "several pictures as a list"
        )
    if 0 in array.shape:
        raise ImageInputError(f"array of shape {tuple(shape)} is empty; both sides must be at least 1")
    array = _to_uint8(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _is_channels_last(input_data_format: str) -> bool:
    # transformers' ChannelDimension is an enum of these values
    name = getattr(input_data_format, "value", input_data_format)
    if name in ("channels_last", "last"):
        return True
    if name in ("channels_first", "first"):
        return False
    raise ImageInputError(f"input_data_format={name!r} is unknown; give 'channels_first' or 'channels_last'")


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
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # also true for NaN; the margin is for resampled pictures
            raise ImageInputError(
                f"floating-point picture has values from {low:g} to {high:g}; they must lie in [0, 1]: "
                "divide by the largest possible value, or convert to uint8"
            )
        return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    raise ImageInputError(
        f"pictures of dtype {array.dtype} are not supported; convert to uint8 (0..255) or floating point in [0, 1]"
    )


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, struct.error):  # unreadable metadata says nothing about the pixels
        return image
    method = _UPRIGHT.get(orientation)
    if method is None:
        return image
    image = image.transpose(method)
    for name in _ORIENTATION_SOURCES:  # else whoever loads the result again would turn it again
        image.info.pop(name, None)
    return image


def _to_rgb(image: Image.Image, background_color: tuple[int, int, int] | None) -> Image.Image:
    has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
    if image.mode == "RGB" and not has_alpha:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # I is what Pillow's readers give for some 16-bit greys; convert() would clip both to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageInputError(
                f"32-bit picture has values from {values.min()} to {values.max()}; mode I is read as 0..65535: "
                "scale it, or convert it to uint8"
            )
        return Image.fromarray(_to_uint8(values.astype(np.uint16))).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if background_color is None or not has_alpha:
        return image.convert("RGB")
    # Pillow has no direct way from premultiplied grey to RGBA
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*background_color, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")
