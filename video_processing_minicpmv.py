"""Video for MiniCPM-V 4.5: which frames are looked at, when they were shown, and how they share visual tokens.

What is special:
- Frames are packed. Up to six neighboring frames form a *group*, and a group costs 64 tokens, as an image does. Each
  frame carries a temporal id: the time at which it is shown, in tenths of a second.
- The sampling recipe is the published one, number for number, float truncation included. It differs in what the
  recipe leaves open: at least one frame, and never the same frame twice.
- Only the frames that were chosen are decoded into images, and each is sliced before the next ones come.
"""

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_processing_utils import BaseVideoProcessor  # at the top level a dummy without torchvision

from .compat_minicpmv import NestedBatchFeature
from .configuration_minicpmv import check_whole, did_you_mean
from .image_loading_minicpmv import ImageInputError  # noqa: F401  # transformers 4 copies only the files named here
from .image_processing_minicpmv import MiniCPMVImageProcessor, visual_features
from .video_decoding_minicpmv import FrameSamplingError, VideoInputError, flatten_videos, open_video


MAX_PACKING = 6  # frames in a group the resampler was trained on
FRAME_SELECTIONS = ("uniform", "keyframes")


@dataclass(frozen=True)
class VideoOptions:
    """How a video is looked at: settings that a call may change. Raises FrameSamplingError for one out of range."""

    fps: float = 3  # frames per second to look at
    max_num_frames: int = 180  # groups (of 64 tokens) before frames are packed more tightly
    max_num_packing: int = 3  # most frames in a group, 1 to 6; with 6 a frame of 448 x 448 costs a 96th of its patches
    force_packing: int | None = None  # frames in a group, at most max_num_packing, whatever the recipe says
    num_frames: int | None = None  # a number of frames instead of a rate; a shorter video gives all it has
    time_scale: float = 0.1  # seconds that one step of a temporal id means; the model was trained with 0.1
    # "uniform" takes the centers of equal time bins; "keyframes" as many frames with the same packing, but those that
    # differ most from the frame before them (cuts first). It decodes the whole video once, at a small size.
    frame_selection: str = "uniform"
    do_sample_frames: bool = True  # False keeps every frame (the caller has chosen them)
    max_slice_nums: int = 1  # slices a frame may be cut into; 1 keeps a frame whole
    use_image_id: bool = False  # whether groups get `<image_id>` numbers in the prompt
    start: float | None = None  # seconds of a part, which is sampled as if it had been cut out first
    end: float | None = None

    def __post_init__(self) -> None:
        check = partial(check_whole, error=FrameSamplingError)
        check("max_num_frames", self.max_num_frames, hint="the published value is 180")
        check("max_num_packing", self.max_num_packing, most=MAX_PACKING, hint="the published value is 3")
        check("max_slice_nums", self.max_slice_nums, hint="1 keeps a frame whole")
        if self.force_packing is not None:
            check("force_packing", self.force_packing, most=MAX_PACKING, hint="frames in a group")
        if self.num_frames is not None:
            hint = "max_num_frames x max_num_packing; raise one of them, or ask for fewer"
            check("num_frames", self.num_frames, most=self.max_num_frames * self.max_num_packing, hint=hint)
        for name, least in (("fps", 1e-6), ("time_scale", 1e-3)):
            if not _is_number(getattr(self, name), least):
                raise FrameSamplingError(f"{name}={getattr(self, name)!r} must be a positive number, at least {least}")
        for name in ("start", "end"):
            if getattr(self, name) not in (None, math.inf) and not _is_number(getattr(self, name), 0):
                raise FrameSamplingError(f"{name}={getattr(self, name)!r} must be 0 or more seconds")
        if self.frame_selection not in FRAME_SELECTIONS:
            raise FrameSamplingError(f"frame_selection={self.frame_selection!r} is none of {FRAME_SELECTIONS}")
        if self.end is not None and (self.start or 0) >= self.end:
            raise FrameSamplingError(f"start={self.start} must lie before end={self.end} (seconds)")


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and least <= float(value) < math.inf


# --- which frames: pure functions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FramePlan:
    """The frames to look at: `indices` in time order, `packing` frames to a group."""

    indices: tuple[int, ...]
    packing: int


def plan_frames(total_num_frames: int, native_fps: float, options: VideoOptions | None = None) -> FramePlan:
    """Choose frames at the centers of equal bins, and the packing that makes them fit: `max_num_frames` groups, exceeded
    by the fraction of a second that the recipe does not count.

    Of the options, `fps`, `num_frames`, `max_num_frames`, `max_num_packing` and `force_packing` count. Raises
    FrameSamplingError for a video without frames or rate.

    Source: the video recipe of the MiniCPM-V 4.5 model card. Where it would give no frame, or a frame twice (the video
    is slower than `fps`), every frame of the video is taken once.
    """
    _check_video(total_num_frames, native_fps)
    options = options or VideoOptions()
    fps, max_num_frames, num_frames = options.fps, options.max_num_frames, options.num_frames
    duration = total_num_frames / native_fps
    if num_frames is not None:
        count, packing = num_frames, math.ceil(min(num_frames, total_num_frames) / max_num_frames)
    elif fps * int(duration) <= max_num_frames:
        native_rate = round(native_fps) or native_fps  # below half a frame a second the recipe rounds to zero
        # The recipe bounds seconds by a number of frames here; with fps below 1 this thins out long videos.
        count, packing = round(min(fps, native_rate) * min(max_num_frames, duration)), 1
    else:
        count, packing = round(duration * fps), math.ceil(duration * fps / max_num_frames)
        if packing > options.max_num_packing:
            count, packing = max_num_frames * options.max_num_packing, options.max_num_packing
    if count > total_num_frames:
        count = total_num_frames
        packing = min(packing, math.ceil(count / max_num_frames))
    count = max(count, 1)
    if options.force_packing is not None:
        packing = min(options.force_packing, options.max_num_packing)
    gap = total_num_frames / count
    return FramePlan(tuple(int(i * gap + gap / 2) for i in range(count)), packing)


def _check_video(total_num_frames: int, native_fps: Any) -> float:
    if total_num_frames < 1:
        raise FrameSamplingError(f"the video has {total_num_frames} frames; at least 1 is needed")
    if not _is_number(native_fps, 1e-6):
        remedy = 'give the true one as video_metadata={"fps": ...}'
        raise FrameSamplingError(f"the video's frame rate is {native_fps!r}, not a positive number; {remedy}")
    return float(native_fps)


def temporal_ids_at(seconds: np.ndarray, time_scale: float = 0.1, duration: float | None = None) -> list[int]:
    """Temporal ids of frames shown at `seconds`: the nearest multiple of `time_scale`, divided by it and truncated.

    `duration` bounds them, as the published recipe does: without it a video's last frame may get the id of its end.
    The division is done in floating point and loses one in 6 % of the cases (43 * 0.1 / 0.1 is 42.99...). The model
    was trained and published with these numbers, so they stay. Half-way times go to the earlier multiple.
    """
    below = np.maximum(np.floor(seconds / time_scale).astype(np.int64), 0)
    above = below + 1
    if duration is not None:
        last = max(math.ceil(duration / time_scale) - 1, 0)
        below, above = np.minimum(below, last), np.minimum(above, last)
    nearer_above = np.abs(above * time_scale - seconds) < np.abs(seconds - below * time_scale)
    nearest = np.where(nearer_above, above, below) * time_scale
    return (nearest / time_scale).astype(np.int32).tolist()


def keyframe_indices(thumbnails: Iterator[np.ndarray], plan: FramePlan) -> tuple[int, ...]:
    """As many frames as `plan` has, those that differ most from the frame before them, in time order.

    `thumbnails` are all frames of the video as small uint8 images, one after the other. The first frame starts the
    first shot and always counts. Differences are mean levels (of 256) without fraction, so that the noise of a codec
    does not decide; among equals the frames of `plan` come first, so that a still video is looked at evenly.
    """
    changes, previous = [], None
    for thumbnail in thumbnails:
        thumbnail = thumbnail.astype(np.int16)
        changes.append(256 if previous is None else int(np.abs(thumbnail - previous).mean()))
        previous = thumbnail
    planned = set(plan.indices)
    ranking = sorted(range(len(changes)), key=lambda i: (-changes[i], i not in planned, i))
    return tuple(sorted(ranking[: len(plan.indices)]))


def part_of_video(clock: np.ndarray, duration: float, start: float | None, end: float | None) -> tuple[int, int]:
    """(first, stop) of the frames shown from `start` to `end` seconds; at least the frame on screen at `start`."""
    start, end = start or 0.0, math.inf if end is None else end
    duration = max(duration, float(clock[-1]))
    if start >= duration:
        raise FrameSamplingError(f"start={start} lies past the end of the video, which lasts {duration:.3f} seconds")
    first, stop = (int(i) for i in np.searchsorted(clock, (start - 1e-6, end - 1e-6)))
    if first >= stop:
        first = max(int(np.searchsorted(clock, start + 1e-6)) - 1, 0)
        stop = first + 1
    return first, stop


# --- the processor ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoReport:
    """What was taken from a video. Names are those of transformers' VideoMetadata, then what packing adds."""

    total_num_frames: int  # of the whole video
    fps: float  # native
    duration: float  # seconds, of the whole video
    video_backend: str
    frames_indices: list[int]  # in the whole video
    timestamps: list[float]  # seconds from the beginning of the whole video
    packing: int
    num_groups: int
    variable_frame_rate: bool
    width: int
    height: int
    num_tokens: int  # visual tokens the language model reads


@dataclass(frozen=True)
class SampledVideo:
    """Chosen frames in time order, their temporal ids in groups, and the report."""

    frames: list  # images of `sample_video`, `SlicedImage`s of `slice_video`
    temporal_ids: list[list[int]]
    metadata: VideoReport


def metadata_of_each(videos: Sequence, given: Mapping | Sequence[Mapping | None] | None) -> list[Mapping | None]:
    """`video_metadata` as a list with one for each video."""
    metadata = [given] * len(videos) if given is None or isinstance(given, Mapping) else list(given)
    if len(metadata) != len(videos):
        raise VideoInputError(f"{len(metadata)} video_metadata for {len(videos)} videos; give one for each")
    return metadata


class MiniCPMVVideoProcessor(BaseVideoProcessor):
    """Samples, decodes and slices videos for MiniCPM-V 4.5.

    Its settings are those of `VideoOptions`, each of which can also be given to a single call, and those of
    `MiniCPMVImageProcessor`, which slices the frames (`image_processor`).

    Frame lists, folders and arrays have no clock: give `video_metadata={"fps": ...}`; without it they count as frames
    sampled at `fps`, and all are kept up to `max_num_frames * max_num_packing`. Where a video's rate varies, frames are
    chosen evenly by number, and their ids come from the real time stamps.
    """

    model_input_names = ["pixel_values", "image_sizes", "tgt_sizes", "temporal_ids"]
    option_names = tuple(field.name for field in fields(VideoOptions))

    def __init__(self, **settings: Any):
        # Not the parent's, which prepares resizing by torchvision.
        if auto_map := settings.pop("auto_map", None):
            self.auto_map = auto_map
        options = VideoOptions(**{name: settings.pop(name) for name in self.option_names if name in settings})
        for name, value in asdict(options).items():
            setattr(self, name, value)
        shared = {"max_slice_nums": options.max_slice_nums, "use_image_id": options.use_image_id}
        self.image_processor = MiniCPMVImageProcessor.from_dict(settings | shared)

    def options(self, **changes: Any) -> VideoOptions:
        """This processor's options with those of one call over them; None means the processor's own.

        Raises TypeError for an unknown option, FrameSamplingError for one outside its range.
        """
        for name in changes.keys() - self.option_names:
            hint = did_you_mean(name, self.option_names)
            raise TypeError(f"unknown video option {name!r}.{hint} All: {', '.join(self.option_names)}")
        own = {name: getattr(self, name) for name in self.option_names}
        return VideoOptions(**own | {name: value for name, value in changes.items() if value is not None})

    def sample_video(self, video: Any, video_metadata: Mapping | None = None, **options: Any) -> SampledVideo:
        """Choose and decode the frames of one video.

        Args:
            video: a path, bytes or open file of a video, GIF, APNG or animated WebP; a folder of frames (natural
                order); a list of frames; an array or tensor (frames, height, width, 3) or (frames, 3, height, width).
            video_metadata: `{"fps": ...}`, the clock of a list of frames.
            options: see `options`, which also says what they raise.

        Raises VideoInputError and ImageInputError for a video, or a frame of a list or folder, that cannot be used.
        """
        frames, groups, report = self._sample(video, video_metadata, self.options(**options))
        return SampledVideo(list(frames), groups, report)

    def slice_video(self, video: Any, video_metadata: Mapping | None = None, **options: Any) -> SampledVideo:
        """`sample_video`, with each frame sliced as soon as it is decoded."""
        settings = self.options(**options)
        frames, groups, report = self._sample(video, video_metadata, settings)
        sliced = self.image_processor.slice_all_to_patches(frames, settings.max_slice_nums)
        return SampledVideo(sliced, groups, report)

    def preprocess(  # type: ignore[override]
        self,
        videos: Any,
        video_metadata: Mapping | Sequence[Mapping | None] | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        **options: Any,
    ) -> NestedBatchFeature:
        """Sample, decode and slice videos.

        Args:
            videos: one video (see `sample_video`), a list of videos, or one list of videos per conversation.
            video_metadata: of every video, or a list with one (or None) for each.
            return_metadata: adds `video_metadata`, one `VideoReport` per video.
            return_tensors: None or "pt" give torch tensors, "np" numpy arrays, in nested lists either way.

        Returns what `MiniCPMVImageProcessor.preprocess` does, one entry a video; raises as `sample_video`.
        """
        videos = flatten_videos(videos)
        pairs = zip(videos, metadata_of_each(videos, video_metadata), strict=True)
        sliced = [self.slice_video(video, metadata, **options) for video, metadata in pairs]
        features = visual_features([(video.frames, video.temporal_ids) for video in sliced], return_tensors)
        if return_metadata:
            features["video_metadata"] = [video.metadata for video in sliced]
        return features

    def get_video_placeholder(self, image_size: Sequence[int], num_groups: int, **options: Any) -> str:
        """Prompt text that stands for a video with frames of `image_size` (width, height): a line for each group."""
        settings = self.options(**options)
        placeholder = self.image_processor.get_slice_image_placeholder
        limit, use_image_id = settings.max_slice_nums, settings.use_image_id
        return "\n".join(placeholder(image_size, group, limit, use_image_id) for group in range(num_groups))

    def _sample(
        self, video: Any, video_metadata: Mapping | None, options: VideoOptions
    ) -> tuple[Iterable[Image.Image], list[list[int]], VideoReport]:
        """The chosen frames (decoded as they are asked for, but for the first), their groups of ids, and the report."""
        source = open_video(video, self.image_processor.load_image)
        count = source.num_frames
        num_frames, native_fps = options.num_frames, (video_metadata or {}).get("fps")
        times = source.times if native_fps is None else None
        if native_fps is None and source.native_fps is None:  # frames without a clock: taken as sampled already
            limit = options.max_num_frames * options.max_num_packing
            native_fps, num_frames = options.fps, num_frames or min(count, limit)
        native_fps = _check_video(count, source.native_fps if native_fps is None else native_fps)

        clock = np.arange(count) / native_fps  # seconds
        # Within half a frame the rate is constant, and the ids are those of the published recipe.
        shown = clock if times is None else times - times[0]
        variable = bool(np.abs(shown - clock).max() > 0.5 / native_fps)
        if variable:
            clock = shown
        first, stop = part_of_video(clock, count / native_fps, options.start, options.end)
        if not options.do_sample_frames:
            num_frames = stop - first
        plan = plan_frames(stop - first, native_fps, replace(options, num_frames=num_frames))
        if options.frame_selection == "keyframes":
            plan = replace(plan, indices=keyframe_indices(source.thumbnails(first, stop), plan))
        indices = [first + index for index in plan.indices]
        if variable:
            ids = temporal_ids_at(clock[indices] - clock[first], options.time_scale)
        else:
            seconds = np.array(plan.indices) / native_fps
            ids = temporal_ids_at(seconds, options.time_scale, (stop - first) / native_fps)
        groups = [ids[i : i + plan.packing] for i in range(0, len(ids), plan.packing)]  # the last may be short

        def decode() -> Iterator[Image.Image]:
            try:
                yield from source.frames(indices)
            finally:
                source.close()

        frames = decode()
        shown_first = next(frames)
        units = self.image_processor.get_slice_layout(shown_first.size, options.max_slice_nums).num_slices
        report = VideoReport(
            total_num_frames=count,
            fps=native_fps,
            duration=count / native_fps,
            video_backend=source.decoder,
            frames_indices=indices,
            timestamps=clock[indices].tolist(),
            packing=plan.packing,
            num_groups=len(groups),
            variable_frame_rate=variable,
            width=shown_first.width,
            height=shown_first.height,
            num_tokens=len(groups) * units * self.image_processor.image_feature_size,
        )
        return chain([shown_first], frames), groups, report

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved settings: its own, or an image processor's, which do not say how frames are sliced and numbered."""
        settings = {name: v for name, v in video_processor_dict.items() if name != "video_processor_type"}
        if settings.pop("image_processor_type", None) or "max_num_packing" not in settings:
            settings = {name: v for name, v in settings.items() if name not in ("max_slice_nums", "use_image_id")}
        is_wanted = kwargs.pop("return_unused_kwargs", False)
        known = {*cls.option_names, *MiniCPMVImageProcessor.setting_names}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        video_processor = cls(**settings | overrides)
        return (video_processor, kwargs) if is_wanted else video_processor

    def to_dict(self) -> dict[str, Any]:
        # No "video_processor_type": without torchvision, transformers 4 fails on it.
        own = {name: value for name, value in vars(self).items() if name != "image_processor" and value is not None}
        images = self.image_processor.to_dict()
        images.pop("image_processor_type", None)
        return deepcopy(images | own)
