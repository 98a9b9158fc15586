"""Pictures to pixel slices for MiniCPM-V 4.5.

What is special here:
- Slicing keeps a picture's own proportions (LLaVA-UHD, arXiv 2403.11703): one small source view of the whole, and up
  to `max_slice_nums` equal slices of an enlarged view. A small picture is one enlarged view.
- A slice is not padded: it is any multiple of the patch size, stored as a strip `[3, patch, patch * patches]`.
- Frames of a video may share one visual unit (`pack_frames`): the 3D resampler turns up to six frames into 64 tokens.
- Pictures are turned upright (EXIF) and transparency is laid over white. The published code does neither;
  `do_exif_transpose=False, background_color=None` gives its behaviour.

Reading order: geometry (pure functions) -> loading -> packing -> the image processor.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import math
import numbers
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image as load_image_from_url
from transformers.processing_utils import ImagesKwargs


class ImageInputError(ValueError):
    """A picture that cannot be used: the message names what was given, what is accepted and what to do."""


class FramePackingError(ValueError):
    """`temporal_ids` that do not describe the pictures they came with."""


# ----------------------------------------------------------------------------------------------------
# Geometry. Sizes are (width, height) in pixels; grids are (columns, rows).


@dataclass(frozen=True)
class SliceLayout:
    """How one picture is cut: every size is (width, height) in pixels, `grid` is (columns, rows).

    `grid`, `refined` and `slice` are None when the picture is not sliced. `refined` is `grid` times `slice`.
    """

    grid: tuple[int, int] | None
    source: tuple[int, int]
    refined: tuple[int, int] | None
    slice: tuple[int, int] | None

    @property
    def num_slices(self) -> int:
        """Number of visual units: the source view and each slice."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


def _nearest_multiple(length: float, step: int) -> int:
    # Python's round (half to even), as in the published preprocessing
    return max(round(length / step) * step, step)


def best_resize(
    size: tuple[float, float], scale_resolution: int = 448, patch_size: int = 14, upscale: bool = False
) -> tuple[int, int]:
    """Size nearest to an area of `scale_resolution ** 2` that keeps the proportions and is whole in patches.

    Args:
        size: (width, height) in pixels; cell sizes may be fractions.
        scale_resolution: side in pixels of the square with the wanted area.
        patch_size: both sides become multiples of it, and at least one patch.
        upscale: also enlarge a picture whose area is smaller; otherwise it keeps its size up to rounding.

    Source: LLaVA-UHD (arXiv 2403.11703).
    """
    width, height = size
    if upscale or width * height > scale_resolution * scale_resolution:
        ratio = width / height
        height = int(scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest_multiple(width, patch_size), _nearest_multiple(height, patch_size)


def slice_grid(size: tuple[int, int], max_slice_nums: int = 9, scale_resolution: int = 448) -> tuple[int, int] | None:
    """(columns, rows) whose proportions are nearest to the picture's, or None when it is not sliced.

    The ideal number of slices is the picture's area in squares of `scale_resolution`, at most `max_slice_nums`; grids
    of one slice more or fewer compete too, by the distance of the logarithms of the aspect ratios.

    Source: LLaVA-UHD (arXiv 2403.11703).
    """
    width, height = size
    ideal = min(math.ceil(width * height / (scale_resolution * scale_resolution)), max_slice_nums)
    if ideal <= 1:
        return None
    aspect = math.log(width / height)
    best, least_error = (1, 1), math.inf
    for number in (ideal - 1, ideal, ideal + 1):
        if number == 1 or number > max_slice_nums:
            continue
        for columns in range(1, number + 1):
            if number % columns:
                continue
            error = abs(aspect - math.log(columns / (number // columns)))
            if error < least_error:
                best, least_error = (columns, number // columns), error
    return best


def slice_layout(
    size: tuple[int, int], max_slice_nums: int = 9, scale_resolution: int = 448, patch_size: int = 14
) -> SliceLayout:
    """Sizes of the source view, the refined view and its slices for a picture of `size` (width, height).

    `max_slice_nums` 1 means no slicing. Raises ImageInputError for an empty size.

    Source: LLaVA-UHD (arXiv 2403.11703); constants of the MiniCPM-V 4.5 model card.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ImageInputError(f"picture of {width} x {height} pixels is empty; both sides must be at least 1")
    grid = slice_grid(size, max_slice_nums, scale_resolution)
    if grid is None:
        source = best_resize(size, scale_resolution, patch_size, upscale=True)
        return SliceLayout(grid=None, source=source, refined=None, slice=None)
    columns, rows = grid
    cell = (_nearest_multiple(width, columns) / columns, _nearest_multiple(height, rows) / rows)
    slice_width, slice_height = best_resize(cell, scale_resolution, patch_size, upscale=True)
    return SliceLayout(
        grid=grid,
        source=best_resize(size, scale_resolution, patch_size, upscale=False),
        refined=(slice_width * columns, slice_height * rows),
        slice=(slice_width, slice_height),
    )


# ----------------------------------------------------------------------------------------------------
# Loading: anything a caller may hold -> an upright 8-bit RGB picture.

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
            transformers, which drops alpha); the bytes of a file; numpy array `(H, W)`, `(H, W, C)` or, where it
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
        name, opener = source, load_image_from_url
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
    if array.ndim not in (2, 3) or array.ndim == 3 and not 1 <= array.shape[-1] <= 4:
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
    return image if method is None else image.transpose(method)


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


# ----------------------------------------------------------------------------------------------------
# Slices and frame packing.


@dataclass(frozen=True)
class SlicedImage:
    """One picture ready for the vision tower.

    Attributes:
        image_size: (width, height) of the upright picture, before resizing.
        grid: (columns, rows), or None when the picture is not sliced.
        pixel_values: float32 tensors `(3, P, P * patches)`: the source view, then the slices row by row.
        tgt_sizes: (rows, columns) of patches, one for each tensor.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int] | None
    pixel_values: list[torch.Tensor]
    tgt_sizes: list[tuple[int, int]]


def pack_frames(
    frames: Sequence[SlicedImage], temporal_ids: Iterable[Iterable[int]]
) -> tuple[list[torch.Tensor], list[tuple[int, int]], list[list[int]]]:
    """Order the slices of `frames` by visual unit.

    Args:
        frames: pictures and frames of one sample, in order.
        temporal_ids: groups of frames that share a unit, one id (tenths of a second) a frame; a still is `[-1]`.

    Returns:
        `(pixel_values, tgt_sizes, unit_temporal_ids)`. A group of frames with grid (columns, rows) yields
        `1 + columns * rows` units: the source views of all its frames, then each slice position across the frames.
        `unit_temporal_ids` has one list of ids a unit; the first two lists have one entry a frame of a unit.

    Raises:
        FramePackingError: the ids do not cover the frames, a group mixes sizes or grids, or an id is not allowed.

    Source: MiniCPM-V 4.5 (arXiv 2509.18154), 3D resampler.
    """
    groups = _check_groups(temporal_ids)
    number_of_ids = sum(map(len, groups))
    if number_of_ids != len(frames):
        raise FramePackingError(
            f"temporal_ids hold {number_of_ids} ids, but there are {len(frames)} pictures; "
            "give one id for each frame, and a group [-1] for each still picture"
        )
    pixel_values, tgt_sizes, unit_temporal_ids = [], [], []
    start = 0
    for group in groups:
        members = frames[start : start + len(group)]
        start += len(group)
        first = members[0]
        for frame in members[1:]:
            if (frame.grid, frame.tgt_sizes) != (first.grid, first.tgt_sizes):
                raise FramePackingError(
                    f"frames of group {group} have different shapes: size {first.image_size} with grid {first.grid}, "
                    f"size {frame.image_size} with grid {frame.grid}; "
                    "resize the frames to one size, or put them into groups of their own"
                )
        for position in range(len(first.pixel_values)):
            pixel_values.extend(frame.pixel_values[position] for frame in members)
            tgt_sizes.extend(frame.tgt_sizes[position] for frame in members)
            unit_temporal_ids.append(list(group))
    return pixel_values, tgt_sizes, unit_temporal_ids


def _check_groups(temporal_ids: Iterable[Iterable[int]]) -> list[list[int]]:
    groups = []
    for group in temporal_ids:
        group = group.tolist() if hasattr(group, "tolist") else group
        if not isinstance(group, (list, tuple)):
            raise FramePackingError(
                f"temporal_ids must be a list of groups such as [[0, 1, 2], [3]]; {group!r} is no group"
            )
        if not all(isinstance(number, numbers.Integral) for number in group):
            raise FramePackingError(f"temporal_ids of group {group!r} must be integers (tenths of a second)")
        group = [int(number) for number in group]
        if not group or min(group) < 0 and group != [-1]:
            raise FramePackingError(
                f"group {group!r} of temporal_ids is not allowed; ids are 0 or more, and a still picture is [-1]"
            )
        groups.append(group)
    return groups


# ----------------------------------------------------------------------------------------------------
# The processor.


class MiniCPMVImagesKwargs(ImagesKwargs, total=False):
    """Keyword arguments of `MiniCPMVImageProcessor.preprocess` beyond those of transformers."""

    max_slice_nums: int | None
    temporal_ids: list | tuple | None


class MiniCPMVBatchFeature(BatchFeature):
    """BatchFeature whose `to()` reaches the tensors inside nested lists."""

    def to(self, *args, **kwargs) -> MiniCPMVBatchFeature:
        """Move all tensors to a device and cast the floating-point ones, as `torch.Tensor.to`; returns self."""
        device = kwargs.get("device")
        if device is None and args and not isinstance(args[0], torch.dtype):
            device = args[0]
        non_blocking = kwargs.get("non_blocking", False)

        def move(value):
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    return value.to(*args, **kwargs)
                return value if device is None else value.to(device=device, non_blocking=non_blocking)
            if isinstance(value, (list, tuple)):
                return type(value)(move(item) for item in value)
            return value

        self.data = {key: move(value) for key, value in self.data.items()}
        return self


# Pictures that are decoded at a time and share one block of memory.
_PICTURES_PER_BLOCK = 16

# Names under which other code reads or saves a setting -> its name here.
_SETTING_ALIASES = {
    "image_mean": "norm_mean",
    "mean": "norm_mean",
    "image_std": "norm_std",
    "std": "norm_std",
    "im_start_token": "im_start",
    "im_end_token": "im_end",
    "slice_start_token": "slice_start",
    "slice_end_token": "slice_end",
    "unk_token": "unk",
}


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Slices pictures and turns them into patch strips for MiniCPM-V.

    Args:
        max_slice_nums: most slices beside the source view; 1 never slices.
        scale_resolution: side in pixels of the square whose area one slice has.
        patch_size: side of a vision patch in pixels.
        image_feature_size: tokens of one visual unit (`query_num` of the model).
        use_image_id: number the pictures of a prompt with `<image_id>K</image_id>`.
        slice_mode: False never slices.
        im_start, im_end, slice_start, slice_end, unk, im_id_start, im_id_end: control tokens of the placeholders.
        norm_mean, norm_std: one value for each of R, G, B, on the scale 0..1.
        version: version of the model.
        do_exif_transpose: turn pictures upright as their EXIF orientation says.
        background_color: RGB colour under transparent pixels; None drops the alpha channel.

    Raises:
        ValueError: a setting outside its range.

    Source: LLaVA-UHD (arXiv 2403.11703); MiniCPM-V 4.5 model card.
    """

    model_input_names = ["pixel_values", "image_sizes", "tgt_sizes", "temporal_ids"]
    valid_kwargs = MiniCPMVImagesKwargs
    background_color = (255, 255, 255)  # transformers saves None only for settings with another class default

    def __init__(
        self,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        image_feature_size: int = 64,
        use_image_id: bool = True,
        slice_mode: bool = True,
        im_start: str = "<image>",
        im_end: str = "</image>",
        slice_start: str = "<slice>",
        slice_end: str = "</slice>",
        unk: str = "<unk>",
        im_id_start: str = "<image_id>",
        im_id_end: str = "</image_id>",
        norm_mean: Sequence[float] = (0.5, 0.5, 0.5),
        norm_std: Sequence[float] = (0.5, 0.5, 0.5),
        version: float = 4.5,
        do_exif_transpose: bool = True,
        background_color: Sequence[int] | None = (255, 255, 255),
        **kwargs,
    ):
        super().__init__(**{key: value for key, value in kwargs.items() if key not in _SETTING_ALIASES})
        self.max_slice_nums = _positive_int("max_slice_nums", max_slice_nums)
        self.scale_resolution = _positive_int("scale_resolution", scale_resolution)
        self.patch_size = _positive_int("patch_size", patch_size)
        self.image_feature_size = _positive_int("image_feature_size", image_feature_size)
        if patch_size > scale_resolution:
            raise ValueError(
                f"patch_size={patch_size} is larger than scale_resolution={scale_resolution}; a slice holds no patch"
            )
        self.use_image_id = use_image_id
        self.slice_mode = slice_mode
        self.im_start = kwargs.get("im_start_token", im_start)
        self.im_end = kwargs.get("im_end_token", im_end)
        self.slice_start = kwargs.get("slice_start_token", slice_start)
        self.slice_end = kwargs.get("slice_end_token", slice_end)
        self.unk = kwargs.get("unk_token", unk)
        self.im_id_start = im_id_start
        self.im_id_end = im_id_end
        self.norm_mean = _three_numbers("norm_mean", kwargs.get("image_mean", kwargs.get("mean", norm_mean)))
        self.norm_std = _three_numbers("norm_std", kwargs.get("image_std", kwargs.get("std", norm_std)))
        if min(self.norm_std) <= 0:
            raise ValueError(f"norm_std={self.norm_std} must be greater than 0 in every channel")
        self.version = version
        self.do_exif_transpose = do_exif_transpose
        self.background_color = background_color
        if background_color is not None:
            self.background_color = [int(value) for value in _three_numbers("background_color", background_color)]
            if min(self.background_color) < 0 or max(self.background_color) > 255:
                raise ValueError(f"background_color={self.background_color} must lie in 0..255 in every channel")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Build from saved settings; keyword arguments override them and pass the same checks."""
        # transformers sets overrides as attributes after construction, past the checks of __init__
        names = {*inspect.signature(cls.__init__).parameters, *_SETTING_ALIASES} - {"self", "kwargs"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
        canonical = {_SETTING_ALIASES.get(key, key): value for key, value in image_processor_dict.items()}
        canonical.update({_SETTING_ALIASES.get(key, key): value for key, value in overrides.items()})
        return super().from_dict(canonical, **kwargs)

    # Names under which other code reads the settings.
    im_start_token = property(attrgetter("im_start"))
    im_end_token = property(attrgetter("im_end"))
    slice_start_token = property(attrgetter("slice_start"))
    slice_end_token = property(attrgetter("slice_end"))
    unk_token = property(attrgetter("unk"))
    image_mean = mean = property(attrgetter("norm_mean"))
    image_std = std = property(attrgetter("norm_std"))

    def get_slice_layout(self, image_size: Sequence[int], max_slice_nums: int | None = None) -> SliceLayout:
        """Layout of a picture of `image_size` (width, height; numbers or a tensor) under this processor's settings."""
        width, height = (int(side) for side in image_size)
        limit = self.max_slice_nums if max_slice_nums is None else _positive_int("max_slice_nums", max_slice_nums)
        return slice_layout((width, height), limit if self.slice_mode else 1, self.scale_resolution, self.patch_size)

    def get_sliced_grid(self, image_size: Sequence[int], max_slice_nums: int | None = None) -> tuple[int, int] | None:
        """(columns, rows) of the slices of a picture of `image_size` (width, height); None when it is not sliced."""
        return self.get_slice_layout(image_size, max_slice_nums).grid

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Number of visual units of a picture (transformers' name and argument order: height first)."""
        return self.get_slice_layout((width, height), (images_kwargs or {}).get("max_slice_nums")).num_slices

    def get_slice_image_placeholder(
        self,
        image_size: Sequence[int],
        image_idx: int = 0,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
    ) -> str:
        """Prompt text that stands for a picture: the source unit, then rows of slice units with "\\n" between rows.

        Args:
            image_size: (width, height) of the picture in pixels.
            image_idx: number K in `<image_id>K</image_id>`, which counts the pictures of a sample from 0.
            max_slice_nums, use_image_id: this processor's settings when None.
        """
        grid = self.get_sliced_grid(image_size, max_slice_nums)
        tokens = self.unk * self.image_feature_size
        text = self.im_start + tokens + self.im_end
        if self.use_image_id if use_image_id is None else use_image_id:
            text = f"{self.im_id_start}{image_idx}{self.im_id_end}{text}"
        if grid is not None:
            columns, rows = grid
            text += "\n".join([(self.slice_start + tokens + self.slice_end) * columns] * rows)
        return text

    def slice_image(
        self,
        image: Image.Image,
        max_slice_nums: int | None = None,
        scale_resolution: int | None = None,
        patch_size: int | None = None,
        never_split: bool = False,
    ) -> tuple[Image.Image, list[list[Image.Image]], tuple[int, int] | None]:
        """Cut `image` into Pillow images: `(source view, rows of slices, (columns, rows) or None)`."""
        layout = slice_layout(
            image.size,
            1 if never_split or not self.slice_mode else max_slice_nums or self.max_slice_nums,
            scale_resolution or self.scale_resolution,
            patch_size or self.patch_size,
        )
        source = image.resize(layout.source, Image.Resampling.BICUBIC)
        if layout.grid is None:
            return source, [], None
        refined = image.resize(layout.refined, Image.Resampling.BICUBIC)
        (columns, rows), (width, height) = layout.grid, layout.slice
        boxes = [
            [(x * width, y * height, (x + 1) * width, (y + 1) * height) for x in range(columns)] for y in range(rows)
        ]
        return source, [[refined.crop(box) for box in row] for row in boxes], layout.grid

    def reshape_by_patch(self, image: torch.Tensor) -> torch.Tensor:
        """`(3, height, width)` -> `(3, P, P * patches)`: patches row by row, laid side by side."""
        channels, height, width = image.shape
        size = self.patch_size
        patches = image.reshape(channels, height // size, size, width // size, size)
        return patches.permute(0, 2, 1, 3, 4).reshape(channels, size, -1)

    def slice_to_patches(
        self, image: Any, max_slice_nums: int | None = None, input_data_format: str | None = None
    ) -> SlicedImage:
        """Load, resize, cut and normalise one picture (anything `load_image` takes).

        Raises ImageInputError for a picture that cannot be used.
        """
        return self.slice_all_to_patches([image], max_slice_nums, input_data_format)[0]

    def slice_all_to_patches(
        self, images: Sequence[Any], max_slice_nums: int | None = None, input_data_format: str | None = None
    ) -> list[SlicedImage]:
        """`slice_to_patches` of several pictures, on at most `torch.get_num_threads()` threads.

        The tensors of a call share memory, by up to 16 pictures: clone one to store it alone.
        """
        sliced = []
        for start in range(0, len(images), _PICTURES_PER_BLOCK):
            chunk = _map_threaded(
                lambda image: load_image(image, input_data_format, self.do_exif_transpose, self.background_color),
                images[start : start + _PICTURES_PER_BLOCK],
            )
            layouts = [self.get_slice_layout(image.size, max_slice_nums) for image in chunk]
            sliced += self._slice_chunk(chunk, layouts)
        return sliced

    def _slice_chunk(self, images: list[Image.Image], layouts: list[SliceLayout]) -> list[SlicedImage]:
        slice_sizes = [[x.source] + [x.slice] * (x.num_slices - 1) for x in layouts]
        lengths = [3 * width * height for sizes in slice_sizes for width, height in sizes]
        # One block: fresh memory costs as much as the arithmetic, and numpy asks for huge pages from 4 MiB on.
        block = np.empty(sum(lengths), np.float32)
        strips = iter(np.split(block, np.cumsum(lengths)[:-1]))
        views, sliced = [], []
        for image, layout, sizes in zip(images, layouts, slice_sizes, strict=True):
            own = [next(strips).reshape(3, self.patch_size, -1) for _ in sizes]
            views.append((image, layout.source, layout.source, own[:1]))
            if layout.grid is not None:
                views.append((image, layout.refined, layout.slice, own[1:]))
            tgt_sizes = [(height // self.patch_size, width // self.patch_size) for width, height in sizes]
            sliced.append(SlicedImage(image.size, layout.grid, [torch.from_numpy(strip) for strip in own], tgt_sizes))
        _map_threaded(lambda view: self._fill_strips(*view), views)
        return sliced

    def _fill_strips(
        self, image: Image.Image, view_size: tuple[int, int], slice_size: tuple[int, int], strips: list[np.ndarray]
    ) -> None:
        # resize to view_size, cut row by row into slice_size, write the patches of each cut to a strip
        size = self.patch_size
        width, height = slice_size
        bands = [np.asarray(band) for band in image.resize(view_size, Image.Resampling.BICUBIC).split()]  # 3 x [H, W]
        corners = [(x, y) for y in range(0, view_size[1], height) for x in range(0, view_size[0], width)]
        for (left, top), strip in zip(corners, strips, strict=True):
            for band, out, mean, std in zip(bands, strip, self.norm_mean, self.norm_std, strict=True):
                rows = band[top : top + height, left : left + width].reshape(height // size, size, width)
                # out: [P, rows * columns * P]; numpy, because torch's threads stall on busy cores and gain nothing
                out.reshape(size, height // size, width)[...] = rows.transpose(1, 0, 2)
                out *= np.float32(1 / (255 * std))
                out -= np.float32(mean / std)

    def preprocess(
        self,
        images: Any,
        do_pad: bool | None = None,
        max_slice_nums: int | None = None,
        temporal_ids: list | None = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **kwargs,
    ) -> MiniCPMVBatchFeature:
        """Preprocess a picture, the pictures of one sample (list), or those of a batch (list of lists).

        Args:
            images: anything `load_image` takes, or lists of it; `[]` is one sample without pictures.
            do_pad: accepted for other code; slices are never padded.
            max_slice_nums: for this call; the processor's own when None.
            temporal_ids: for one sample a list of groups such as `[[0, 1, 2], [3, 4, 5], [-1]]`, for a batch one such
                list (or None) a sample. None: every picture is a still. See `pack_frames`.
            return_tensors: None or "pt" give torch tensors, "np" numpy arrays; in nested lists either way, since
                slices differ in size.
            input_data_format: "channels_first" or "channels_last" for arrays and tensors.

        Returns:
            One entry a sample in each of: `pixel_values`, list of float32 `(3, P, P * patches)`; `image_sizes`, list
            of (width, height); `tgt_sizes`, int64 `(slices, 2)` of (rows, columns) in patches; `temporal_ids`, list of
            units, each a list of ids, `[-1]` for a still.

        Raises:
            ImageInputError, FramePackingError: pictures or ids that cannot be used.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; give None, 'pt' or 'np'")
        samples = _as_samples(images)
        all_temporal_ids = _as_sample_ids(temporal_ids, len(samples))
        convert = (lambda tensor: tensor.numpy()) if return_tensors == "np" else (lambda tensor: tensor)
        data: dict[str, list] = {"pixel_values": [], "image_sizes": [], "tgt_sizes": [], "temporal_ids": []}
        sliced = iter(self.slice_all_to_patches(list(chain(*samples)), max_slice_nums, input_data_format))
        for pictures, groups in zip(samples, all_temporal_ids, strict=True):
            frames = list(islice(sliced, len(pictures)))
            groups = [[-1]] * len(frames) if groups is None else groups
            pixel_values, tgt_sizes, unit_temporal_ids = pack_frames(frames, groups)
            data["pixel_values"].append([convert(strip) for strip in pixel_values])
            data["image_sizes"].append([frame.image_size for frame in frames])
            data["tgt_sizes"].append(convert(torch.tensor(tgt_sizes, dtype=torch.int64).reshape(-1, 2)))
            data["temporal_ids"].append(unit_temporal_ids)
        return MiniCPMVBatchFeature(data)


def _map_threaded(function: Callable, items: Sequence) -> list:
    # Pillow and numpy work outside the GIL; torch's limit keeps data-loader workers to one thread each
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def _as_samples(images: Any) -> list[list]:
    if not isinstance(images, (list, tuple)):
        return [[images]]
    nested = [isinstance(entry, (list, tuple)) for entry in images]
    if images and all(nested):
        return [list(sample) for sample in images]
    if any(nested):
        raise ImageInputError(
            "images mix pictures and lists of pictures; give one list for a sample, or one list a sample for a batch"
        )
    return [list(images)]


def _as_sample_ids(temporal_ids: Any, number_of_samples: int) -> list:
    """One entry a sample: a list of groups, or None for stills."""
    if temporal_ids is None:
        return [None] * number_of_samples
    entries = temporal_ids.tolist() if hasattr(temporal_ids, "tolist") else list(temporal_ids)
    entries = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in entries]
    if not any(entry is None or _holds_groups(entry) for entry in entries):
        # groups of one sample, unless every entry is a sample without pictures
        entries = entries if entries and all(entry == [] for entry in entries) else [entries]
    if len(entries) != number_of_samples:
        raise FramePackingError(
            f"temporal_ids describe {len(entries)} samples, but images have {number_of_samples}; "
            "give one list of groups for each sample"
        )
    return entries


def _holds_groups(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and any(
        isinstance(group, (list, tuple)) or getattr(group, "ndim", 0) > 0 for group in entry
    )


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def _three_numbers(name: str, values: Any) -> list[float]:
    try:
        numbers_ = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r} must be 3 numbers, for R, G and B") from error
    if len(numbers_) != 3 or not all(map(math.isfinite, numbers_)):
        raise ValueError(f"{name}={values!r} must be 3 finite numbers, for R, G and B")
    return numbers_
