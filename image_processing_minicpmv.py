"""Images to pixel slices for MiniCPM-V 4.5.

What is special:
- Slicing keeps an image's own proportions (LLaVA-UHD, arXiv 2403.11703): one small source view of the whole, and up
  to `max_slice_nums` equal slices of an enlarged view. A small image is one enlarged view.
- A slice is not padded: it is any multiple of the patch size, stored as a strip `[3, patch, patch * patches]`.
- Frames of a video may share one visual unit (`pack_frames`): the 3D resampler turns up to six frames into 64 tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain, islice
from operator import attrgetter
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torch_available

from .compat_minicpmv import NestedBatchFeature
from .configuration_minicpmv import MiniCPMVError, check_whole, shorten
from .image_loading_minicpmv import FramePackingError, ImageInputError, load_image


if is_torch_available():
    import torch
as_tensor = torch.from_numpy if is_torch_available() else np.asarray  # without torch, arrays stand for tensors


# ---- Geometry, as in LLaVA-UHD (arXiv 2403.11703) with the constants of the MiniCPM-V 4.5 model card.
# Sizes are (width, height) in pixels; grids are (columns, rows).


@dataclass(frozen=True)
class SliceLayout:
    """How one image is cut."""

    source: tuple[int, int]  # size of the view of the whole
    grid: tuple[int, int] | None = None  # with the sizes below, None when the image is not sliced
    refined: tuple[int, int] | None = None  # the enlarged view that is cut: `grid` times `slice`
    slice: tuple[int, int] | None = None

    @property
    def num_slices(self) -> int:
        """Number of visual units: the source view and each slice."""
        return len(self.sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of the source view and each slice, row by row."""
        slices = [] if self.grid is None or self.slice is None else [self.slice] * (self.grid[0] * self.grid[1])
        return [self.source, *slices]


def _nearest_multiple(length: float, step: int) -> int:
    # Python's round (half to even), as in the published preprocessing
    return max(round(length / step) * step, step)


def best_resize(
    size: tuple[float, float], scale_resolution: int = 448, patch_size: int = 14, upscale: bool = False
) -> tuple[int, int]:
    """Size nearest to an area of `scale_resolution ** 2` that keeps the proportions and is whole in patches (at least one).

    A smaller `size` keeps itself up to rounding, unless `upscale` enlarges it. Cells of a grid may be fractions.
    """
    width, height = size
    if upscale or width * height > scale_resolution * scale_resolution:
        ratio = width / height
        height = int(scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest_multiple(width, patch_size), _nearest_multiple(height, patch_size)


def slice_grid(size: tuple[int, int], max_slice_nums: int = 9, scale_resolution: int = 448) -> tuple[int, int] | None:
    """(columns, rows) whose proportions are nearest to the image's, or None when it is not sliced.

    The ideal number of slices is the image's area in squares of `scale_resolution`, at most `max_slice_nums`; grids of
    one slice more or fewer compete too, by the logarithms of their aspect ratios, and the first of equal ones wins.
    """
    width, height = size
    ideal = min(math.ceil(width * height / (scale_resolution * scale_resolution)), max_slice_nums)
    if ideal <= 1:
        return None
    grids = [
        (columns, number // columns)
        for number in (ideal - 1, ideal, ideal + 1)
        for columns in range(1, number + 1)
        if 1 < number <= max_slice_nums and number % columns == 0
    ]
    return min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))


def slice_layout(
    size: tuple[int, int], max_slice_nums: int = 9, scale_resolution: int = 448, patch_size: int = 14
) -> SliceLayout:
    """How an image of `size` is cut; `max_slice_nums` 1 means not at all. Raises ImageInputError for an empty size."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageInputError(f"image of {width} x {height} pixels is empty; both sides must be at least 1")
    grid = slice_grid(size, max_slice_nums, scale_resolution)
    if grid is None:
        return SliceLayout(best_resize(size, scale_resolution, patch_size, upscale=True))
    columns, rows = grid
    cell = (_nearest_multiple(width, columns) / columns, _nearest_multiple(height, rows) / rows)
    slice_width, slice_height = best_resize(cell, scale_resolution, patch_size, upscale=True)
    refined = (slice_width * columns, slice_height * rows)
    return SliceLayout(best_resize(size, scale_resolution, patch_size), grid, refined, (slice_width, slice_height))


def resize_bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's bicubic resize to `size` (width, height), the horizontal pass first, as the published pixels have it.

    Pillow 13 takes the vertical pass first where that is faster, which rounds otherwise; it has no choice where each
    call changes one side.
    """
    if image.height - size[1] > max(0, 2 * (image.width - size[0])):
        image = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return image.resize(size, Image.Resampling.BICUBIC)


# ---- Slices and frame packing.


@dataclass(frozen=True)
class SlicedImage:
    """One image ready for the vision tower."""

    image_size: tuple[int, int]  # of the upright image, before resizing
    grid: tuple[int, int] | None  # None when the image is not sliced
    pixel_values: "list[torch.Tensor]"  # float32 [3, P, P * patches]: the source view, then the slices row by row
    tgt_sizes: list[tuple[int, int]]  # (rows, columns) of patches, one for each tensor
    image: Any = None  # what it was made of, where a model keeps features instead of pixels (`model.encode_images`)


def pack_frames(
    frames: Sequence[SlicedImage], groups: Sequence[list[int]]
) -> "tuple[list[torch.Tensor], list[tuple[int, int]], list[list[int]]]":
    """Order the slices of one sample's images and frames by visual unit.

    `groups` (of [`read_groups`]) tells by their ids the frames that share a unit. A group with grid (columns, rows)
    yields `1 + columns * rows` units: the source views of all its frames, then each slice position across the frames.

    Returns `(pixel_values, tgt_sizes, unit_temporal_ids)`: one entry a frame of a unit in the first two, one list of
    ids a unit in the last. Raises FramePackingError for a group that mixes sizes or grids.

    Source: MiniCPM-V 4.5 (arXiv 2509.18154), 3D resampler.
    """
    pixel_values, tgt_sizes = list[Any](), list[tuple[int, int]]()
    unit_temporal_ids, rest = [], iter(frames)
    for group in groups:
        members = list(islice(rest, len(group)))
        first = members[0]
        for frame in members[1:]:
            if (frame.grid, frame.tgt_sizes) != (first.grid, first.tgt_sizes):
                raise FramePackingError(
                    f"frames of group {group} have different shapes ({first.image_size} in grid {first.grid}, "
                    f"{frame.image_size} in grid {frame.grid}); resize them to one size, or group them otherwise"
                )
        for position in range(len(first.pixel_values)):
            pixel_values.extend(frame.pixel_values[position] for frame in members)
            tgt_sizes.extend(frame.tgt_sizes[position] for frame in members)
            unit_temporal_ids.append(list(group))
    return pixel_values, tgt_sizes, unit_temporal_ids


def read_groups(temporal_ids: Any, counts: Sequence[int]) -> list[list[list[int]]]:
    """The groups of frames of each sample, checked against its number of images (`counts`).

    `temporal_ids` has for each sample a list of groups such as `[[0, 1, 2], [3, 4, 5], [-1]]`, or None where all are
    stills; for one sample its groups may stand alone. Tensors and arrays may stand for lists. Raises FramePackingError
    where the ids do not cover the images, or are not allowed.
    """
    samples = _as_lists(temporal_ids)
    if samples is None:
        samples = [None] * len(counts)
    elif len(counts) == 1 and not (isinstance(samples, list) and len(samples) == 1 and _are_groups(samples[0])):
        samples = [samples]
    if not isinstance(samples, list) or len(samples) != len(counts):
        found = shorten(samples)
        raise FramePackingError(f"temporal_ids={found} must hold a list of groups for each of {len(counts)} samples")
    samples = [[[-1]] * count if groups is None else groups for groups, count in zip(samples, counts, strict=True)]
    for groups, count in zip(samples, counts, strict=True):
        if not _are_groups(groups):
            raise FramePackingError(f"temporal_ids={shorten(groups)} is no list of groups such as [[0, 1, 2], [3]]")
        for group in groups:
            if not all(isinstance(number, int) for number in group):
                raise FramePackingError(f"temporal_ids of group {group} must be whole numbers (tenths of a second)")
            if not group or (min(group) < 0 and group != [-1]):
                raise FramePackingError(f"temporal_ids of group {group} must be 0 or more; a still image is [-1]")
        if (number := sum(map(len, groups))) != count:
            counted = f"{number} ids, but there are {count} images"
            raise FramePackingError(f"temporal_ids hold {counted}; give one for each frame, and [-1] for each still")
    return samples


def _as_lists(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _are_groups(sample: Any) -> bool:
    return sample is None or (isinstance(sample, list) and all(isinstance(group, list) for group in sample))


def pad_visual_inputs(rows: Sequence[Mapping[str, Any]]) -> "dict[str, torch.Tensor]":
    """The visual inputs of single samples as tensors with one entry a sample, for trainers that insist on them.

    `rows` are samples as the image processor returns them; all stills may lack `temporal_ids`. Returns `pixel_values`
    [B, slices, 3, P, W] and `tgt_sizes` [B, slices, 2], padded with zeros; where frames are packed also `temporal_ids`
    [B, units, frames], padded with -2. Nothing when no sample has a slice.
    """
    slices = [pixels for row in rows for pixels in row["pixel_values"]]
    if not slices:
        return {}
    most, width = max(len(row["pixel_values"]) for row in rows), max(pixels.shape[2] for pixels in slices)
    pixel_values = np.zeros((len(rows), most, *slices[0].shape[:2], width), np.float32)
    tgt_sizes = np.zeros((len(rows), most, 2), np.int64)
    units = [row.get("temporal_ids") or [[-1]] * len(row["pixel_values"]) for row in rows]
    temporal_ids = np.full((len(rows), max(map(len, units)), max(len(unit) for row in units for unit in row)), -2)
    for place, row in enumerate(rows):
        for number, (pixels, size) in enumerate(zip(row["pixel_values"], row["tgt_sizes"], strict=True)):
            pixel_values[place, number, :, :, : pixels.shape[2]] = pixels
            tgt_sizes[place, number] = size
        for number, unit in enumerate(units[place]):
            temporal_ids[place, number, : len(unit)] = unit
    batch = {"pixel_values": as_tensor(pixel_values), "tgt_sizes": as_tensor(tgt_sizes)}
    is_packed = any(unit != [-1] for row in units for unit in row)
    return batch | {"temporal_ids": as_tensor(temporal_ids)} if is_packed else batch


# ---- The processor.


@dataclass(frozen=True)
class ImageOptions:
    """Options of a call that concern images; None means the processor's own setting."""

    max_slice_nums: int | None = None  # most slices besides the source view; 1 never slices
    use_image_id: bool | None = None  # number the images of a prompt
    input_data_format: str | None = None  # "channels_first" or "channels_last", for arrays and tensors


_IMAGES_PER_BLOCK = 16  # which are decoded at a time and share memory

# Names under which vLLM and the configurations of other processors know a setting -> its name here.
_SETTING_ALIASES = {"image_mean": "norm_mean", "mean": "norm_mean", "image_std": "norm_std", "std": "norm_std"} | {
    f"{name}_token": name for name in ("im_start", "im_end", "slice_start", "slice_end", "unk")
}


@dataclass
class ImageSettings:
    """Settings of `MiniCPMVImageProcessor`, which has them as attributes. Raises MiniCPMVError for one out of range."""

    max_slice_nums: int = 9  # most slices besides the source view; 1 never slices
    scale_resolution: int = 448  # side in pixels of the square whose area one slice has
    patch_size: int = 14  # side of a vision patch in pixels
    image_feature_size: int = 64  # tokens of one visual unit (`query_num` of the model)
    use_image_id: bool = True  # number the images of a prompt with `<image_id>K</image_id>`
    slice_mode: bool = True  # False never slices
    im_start: str = "<image>"  # control tokens of the placeholders
    im_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    unk: str = "<unk>"
    im_id_start: str = "<image_id>"
    im_id_end: str = "</image_id>"
    norm_mean: Sequence[float] = (0.5, 0.5, 0.5)  # of R, G, B, on the scale 0..1
    norm_std: Sequence[float] = (0.5, 0.5, 0.5)
    version: float = 4.5  # of the model
    do_exif_transpose: bool = True  # turn images upright as their EXIF orientation says
    background_color: Sequence[int] | None = (255, 255, 255)  # under transparent pixels; None drops the alpha channel

    def __post_init__(self) -> None:
        for name in ("max_slice_nums", "scale_resolution", "patch_size", "image_feature_size"):
            setattr(self, name, check_whole(name, getattr(self, name)))
        if self.patch_size > self.scale_resolution:
            raise MiniCPMVError(f"patch_size={self.patch_size} exceeds scale_resolution={self.scale_resolution}")
        self.norm_mean = _three_numbers("norm_mean", self.norm_mean, -math.inf, math.inf)
        self.norm_std = _three_numbers("norm_std", self.norm_std, 1e-6, math.inf)
        if self.background_color is not None:
            values = _three_numbers("background_color", self.background_color, 0, 255)
            self.background_color = [int(value) for value in values]


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Slices images and turns them into patch strips for MiniCPM-V. Its settings are those of `ImageSettings`."""

    model_input_names = ["pixel_values", "image_sizes", "tgt_sizes", "temporal_ids"]
    setting_names = {field.name for field in fields(ImageSettings)} | _SETTING_ALIASES.keys()
    background_color = (255, 255, 255)  # transformers saves None only for settings with another class default

    def __init__(self, **settings: Any):
        settings = {_SETTING_ALIASES.get(name, name): value for name, value in settings.items()}
        own = {name: settings.pop(name) for name in self.setting_names & settings.keys()}
        super().__init__(**settings)
        for name, value in vars(ImageSettings(**own)).items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved settings; keyword arguments override them and pass the same checks."""
        # transformers sets overrides as attributes after construction, past the checks
        overrides = {name: kwargs.pop(name) for name in cls.setting_names & kwargs.keys()}
        return super().from_dict(image_processor_dict | overrides, **kwargs)

    def get_slice_layout(self, image_size: Sequence[int], max_slice_nums: int | None = None) -> SliceLayout:
        """`slice_layout` of an image of `image_size` (numbers or a tensor) under this processor's settings."""
        width, height = (int(side) for side in image_size)
        limit = self.max_slice_nums if max_slice_nums is None else check_whole("max_slice_nums", max_slice_nums)
        return slice_layout((width, height), limit if self.slice_mode else 1, self.scale_resolution, self.patch_size)

    def get_sliced_grid(self, image_size: Sequence[int], max_slice_nums: int | None = None) -> tuple[int, int] | None:
        """Grid of the slices of an image of `image_size`; None when it is not sliced."""
        return self.get_slice_layout(image_size, max_slice_nums).grid

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Number of visual units of an image (transformers' name and argument order: height first)."""
        return self.get_slice_layout((width, height), (images_kwargs or {}).get("max_slice_nums")).num_slices

    def get_slice_image_placeholder(
        self,
        image_size: Sequence[int],  # (width, height), also as a tensor
        image_idx: int = 0,  # number of the image in its sample
        max_slice_nums: int | None = None,  # None: this processor's setting, as for the next
        use_image_id: bool | None = None,
    ) -> str:
        """Prompt text that stands for an image: the source unit, then rows of slice units with "\\n" between rows."""
        grid = self.get_sliced_grid(image_size, max_slice_nums)
        tokens = self.unk * self.image_feature_size
        text = self.im_start + tokens + self.im_end
        if self.use_image_id if use_image_id is None else use_image_id:
            text = f"{self.im_id_start}{image_idx}{self.im_id_end}{text}"
        if grid is not None:
            columns, rows = grid
            text += "\n".join([(self.slice_start + tokens + self.slice_end) * columns] * rows)
        return text

    def load_image(self, image: Any, input_data_format: str | None = None) -> Image.Image:
        """`load_image` under this processor's settings."""
        return load_image(image, input_data_format, self.do_exif_transpose, self.background_color)

    def slice_all_to_patches(
        self, images: Iterable[Any], max_slice_nums: int | None = None, input_data_format: str | None = None
    ) -> list[SlicedImage]:
        """Load, resize, cut and normalize images (anything `load_image` takes, which also says what it raises).

        They are taken 16 at a time, on at most `torch.get_num_threads()` threads. The tensors of a call share memory, by
        up to 16 images: clone one to store it alone.
        """
        images, sliced = iter(images), []
        # Nothing here holds a block of images while the next one is decoded.
        while block := self._slice_block(list(islice(images, _IMAGES_PER_BLOCK)), max_slice_nums, input_data_format):
            sliced += block
        return sliced

    def _slice_block(self, given: list, limit: int | None, input_data_format: str | None) -> list[SlicedImage]:
        images = _map_threaded(lambda image: self.load_image(image, input_data_format), given)
        layouts = [self.get_slice_layout(image.size, limit) for image in images]
        slice_sizes = [layout.sizes for layout in layouts]
        lengths = [3 * width * height for sizes in slice_sizes for width, height in sizes]
        # One block: fresh memory costs as much as the arithmetic, and numpy asks for huge pages from 4 MiB on.
        block = np.empty(sum(lengths), np.float32)
        strips = iter(np.split(block, np.cumsum(lengths)[:-1]))
        views, sliced = [], []
        for image, layout, sizes in zip(images, layouts, slice_sizes, strict=True):
            own = [next(strips).reshape(3, self.patch_size, -1) for _ in sizes]
            views.append((image, layout.source, layout.source, own[:1]))
            if layout.refined is not None and layout.slice is not None:
                views.append((image, layout.refined, layout.slice, own[1:]))
            tgt_sizes = [(height // self.patch_size, width // self.patch_size) for width, height in sizes]
            sliced.append(SlicedImage(image.size, layout.grid, [as_tensor(strip) for strip in own], tgt_sizes))
        _map_threaded(lambda view: self._fill_strips(*view), views)
        return sliced

    def _fill_strips(
        self, image: Image.Image, view_size: tuple[int, int], slice_size: tuple[int, int], strips: list[np.ndarray]
    ) -> None:
        # resize to view_size, cut row by row into slice_size, write the patches of each cut to a strip
        size = self.patch_size
        width, height = slice_size
        bands = [np.asarray(band) for band in resize_bicubic(image, view_size).split()]  # 3 x [H, W]
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
    ) -> NestedBatchFeature:
        """Preprocess an image, the images of one sample (list), or those of a batch (list of lists).

        Args:
            images: anything `load_image` takes, or lists of it; `[]` is one sample without images.
            do_pad, kwargs: accepted from vLLM, LLaMA-Factory and others; slices are never padded.
            max_slice_nums, input_data_format: see `ImageOptions`.
            temporal_ids: see [`read_groups`].
            return_tensors: None or "pt" give torch tensors, "np" numpy arrays, in nested lists: slices differ in size.

        Returns:
            One entry a sample of `pixel_values` (slices [3, P, P * patches], float32), `image_sizes` (width, height),
            `tgt_sizes` [slices, 2] (rows, columns in patches) and `temporal_ids` (a list a unit, `[-1]` for a still).

        Raises ImageInputError and FramePackingError for images and ids that cannot be used.
        """
        samples = as_samples(images)
        groups = read_groups(temporal_ids, [len(sample) for sample in samples])
        sliced = iter(self.slice_all_to_patches(chain(*samples), max_slice_nums, input_data_format))
        packed = [(list(islice(sliced, len(sample))), ids) for sample, ids in zip(samples, groups, strict=True)]
        return visual_features(packed, return_tensors)


for _alias, _name in _SETTING_ALIASES.items():
    setattr(MiniCPMVImageProcessor, _alias, property(attrgetter(_name)))


def visual_features(
    samples: Iterable[tuple[list[SlicedImage], list[list[int]]]], return_tensors: str | None = None
) -> NestedBatchFeature:
    """What both processors return, of the images or frames of each sample and their groups."""
    if return_tensors not in (None, "pt", "np"):
        raise MiniCPMVError(f"return_tensors={return_tensors!r} is not supported; give None, 'pt' or 'np'")
    convert = np.asarray if return_tensors == "np" else (lambda tensor: tensor)
    data: dict[str, list] = {"pixel_values": [], "image_sizes": [], "tgt_sizes": [], "temporal_ids": []}
    for frames, groups in samples:
        pixel_values, tgt_sizes, unit_temporal_ids = pack_frames(frames, groups)
        data["pixel_values"].append([convert(strip) for strip in pixel_values])
        data["image_sizes"].append([frame.image_size for frame in frames])
        data["tgt_sizes"].append(convert(as_tensor(np.array(tgt_sizes, np.int64).reshape(-1, 2))))
        data["temporal_ids"].append(unit_temporal_ids)
    return NestedBatchFeature(data)


def _map_threaded(function: Callable, items: Sequence) -> list:
    # Pillow and numpy work outside the GIL; torch's limit keeps data-loader workers to one thread each
    workers = min(torch.get_num_threads() if is_torch_available() else 4, len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def as_samples(images: Any) -> list[list]:
    """One list a sample of an image, the images of one sample, or a list of images (or None) for each sample.

    An array of several images ([N, H, W, C]: so vLLM gives videos) counts as its images.
    """
    if not isinstance(images, (list, tuple)):
        return [_unstacked([images])]
    nested = [entry is None or isinstance(entry, (list, tuple)) for entry in images]
    if images and all(nested):
        return [_unstacked(sample or []) for sample in images]
    if any(nested):
        raise ImageInputError("images= mixes images with lists of images; give one list, or one list a sample")
    return [_unstacked(images)]


def _unstacked(images: Sequence) -> list:
    return list(chain.from_iterable(entry if getattr(entry, "ndim", 0) == 4 else [entry] for entry in images))


def _three_numbers(name: str, values: Any, least: float, most: float) -> list[float]:
    try:
        three = [float(value) for value in values]
    except (TypeError, ValueError):
        three = []
    if len(three) != 3 or not all(math.isfinite(value) and least <= value <= most for value in three):
        raise MiniCPMVError(f"{name}={values!r} must be 3 numbers from {least} to {most}, for R, G and B")
    return three
