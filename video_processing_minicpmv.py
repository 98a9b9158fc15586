"""Video for MiniCPM-V 4.5: which frames are looked at, when they were shown, and how they share visual tokens.

What is special:
- Frames are packed. Up to six neighbouring frames form a *group*, and a group costs 64 tokens, as a picture does. Each
  frame carries a temporal id: the time at which it is shown, in tenths of a second.
- The sampling recipe is the published one, number for number, float truncation included. It differs in what the
  recipe leaves open: at least one frame, and never the same frame twice.
- Only the frames that were chosen are decoded into pictures, and each is sliced before the next ones come.
- The settings are the image processor's, except that a frame is not sliced and has no image id unless asked.
"""

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .configuration_minicpmv import MiniCPMVError
from .image_processing_minicpmv import MiniCPMVBatchFeature, MiniCPMVImageProcessor, pack_frames
from .video_decoding_minicpmv import DECODERS, VideoInputError, flatten_videos, open_video


MAX_PACKING = 6  # frames in a group the resampler was trained on
FRAME_SELECTIONS = ("uniform", "keyframes")


class FrameSamplingError(MiniCPMVError):
    """A sampling option lies outside its range, or asks for a part of the video that is not there."""


# --- which frames: pure functions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FramePlan:
    """The frames to look at: `indices` in time order, `packing` frames to a group."""

    indices: tuple[int, ...]
    packing: int

    @property
    def num_groups(self) -> int:
        return math.ceil(len(self.indices) / self.packing)


def plan_frames(
    total_num_frames: int,
    native_fps: float,
    *,
    fps: float = 3,
    max_num_frames: int = 180,
    max_num_packing: int = 3,
    force_packing: int | None = None,
    num_frames: int | None = None,
) -> FramePlan:
    """Choose frames at the centres of equal bins, and the packing that makes them fit.

    Args:
        total_num_frames: frames the clip has.
        native_fps: frames per second of the clip.
        fps: frames per second to look at.
        max_num_frames: groups a clip may have before frames are packed. It is exceeded by the fraction of a second
            that the recipe does not count.
        max_num_packing: most frames in a group, 1 to 6.
        force_packing: frames in a group whatever the length; no more than `max_num_packing` are used.
        num_frames: this many frames in all, instead of a rate; the packing is then the least that fits.

    Raises:
        FrameSamplingError: an option outside its range.

    Source: the video recipe of the MiniCPM-V 4.5 model card. Where it would give no frame, or a frame twice (the clip
    is slower than `fps`), every frame of the clip is taken once.
    """
    _check_plan_options(total_num_frames, native_fps, fps, max_num_frames, max_num_packing, force_packing, num_frames)
    duration = total_num_frames / native_fps
    if num_frames is not None:
        count, packing = num_frames, math.ceil(min(num_frames, total_num_frames) / max_num_frames)
    elif fps * int(duration) <= max_num_frames:
        native_rate = round(native_fps) or native_fps  # below half a frame a second the recipe rounds to zero
        # The recipe bounds seconds by a number of frames here; with fps below 1 this thins out long clips.
        count, packing = round(min(fps, native_rate) * min(max_num_frames, duration)), 1
    else:
        count, packing = round(duration * fps), math.ceil(duration * fps / max_num_frames)
        if packing > max_num_packing:
            count, packing = max_num_frames * max_num_packing, max_num_packing
    if count > total_num_frames:
        count = total_num_frames
        packing = min(packing, math.ceil(count / max_num_frames))
    count = max(count, 1)
    if force_packing is not None:
        packing = min(force_packing, max_num_packing)
    gap = total_num_frames / count
    return FramePlan(tuple(int(i * gap + gap / 2) for i in range(count)), packing)


def temporal_ids_of(
    indices: Sequence[int], native_fps: float, time_scale: float = 0.1, total_num_frames: int | None = None
) -> list[int]:
    """Temporal ids of frames of a clip with a constant rate: the time of each in units of `time_scale` seconds.

    `total_num_frames` bounds the ids to the clip, as the published recipe does: without it the last frame of a clip
    may get the id of its end. The ids never decrease where `indices` do not.
    """
    duration = None if total_num_frames is None else total_num_frames / native_fps
    return temporal_ids_at(np.asarray(indices, dtype=np.float64) / native_fps, time_scale, duration)


def temporal_ids_at(seconds: Sequence[float], time_scale: float = 0.1, duration: float | None = None) -> list[int]:
    """Temporal ids of frames shown at `seconds`: the nearest multiple of `time_scale`, divided by it and truncated.

    The division is done in floating point and loses one in 6 % of the cases (43 * 0.1 / 0.1 is 42.99...). The model
    was trained and published with these numbers, so they stay. Half-way times go to the earlier multiple.
    """
    seconds = np.asarray(seconds, dtype=np.float64)
    below = np.maximum(np.floor(seconds / time_scale).astype(np.int64), 0)
    above = below + 1
    if duration is not None:
        last = max(math.ceil(duration / time_scale) - 1, 0)
        below, above = np.minimum(below, last), np.minimum(above, last)
    nearer_above = np.abs(above * time_scale - seconds) < np.abs(seconds - below * time_scale)
    nearest = np.where(nearer_above, above, below) * time_scale
    return (nearest / time_scale).astype(np.int32).tolist()


def group_temporal_ids(temporal_ids: Sequence[int], packing: int) -> list[list[int]]:
    """Cut the ids of all frames into groups of `packing`; the last group may be short."""
    return [list(temporal_ids[i : i + packing]) for i in range(0, len(temporal_ids), packing)]


def keyframe_indices(thumbnails: Iterator[np.ndarray], plan: FramePlan) -> tuple[int, ...]:
    """As many frames as `plan` has, those that differ most from the frame before them, in time order.

    `thumbnails` are all frames of the clip as small uint8 pictures, one after the other. The first frame starts the
    first shot and always counts. Differences are mean levels (of 256) without fraction, so that the noise of a codec
    does not decide; among equals the frames of `plan` come first, so that a still clip is looked at evenly.
    """
    changes, previous = [], None
    for thumbnail in thumbnails:
        thumbnail = thumbnail.astype(np.int16)
        changes.append(256 if previous is None else int(np.abs(thumbnail - previous).mean()))
        previous = thumbnail
    planned = set(plan.indices)
    ranking = sorted(range(len(changes)), key=lambda i: (-changes[i], i not in planned, i))
    return tuple(sorted(ranking[: len(plan.indices)]))


def _check_plan_options(
    total_num_frames, native_fps, fps, max_num_frames, max_num_packing, force_packing, num_frames
) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise FrameSamplingError(f"fps={fps} must be a positive number of frames per second, e.g. 3")
    if total_num_frames < 1:
        raise FrameSamplingError(f"the clip has {total_num_frames} frames; at least 1 is needed")
    if not (math.isfinite(native_fps) and native_fps > 0):
        raise FrameSamplingError(
            f"the clip's frame rate is {native_fps}, not a positive number; "
            'give the true one as video_metadata={"fps": ...}'
        )
    if max_num_frames < 1:
        raise FrameSamplingError(f"max_num_frames={max_num_frames} must be at least 1; the published value is 180")
    for name, value in (("max_num_packing", max_num_packing), ("force_packing", force_packing)):
        if value is not None and not (1 <= value <= MAX_PACKING and int(value) == value):
            raise FrameSamplingError(
                f"{name}={value} must be a whole number from 1 to {MAX_PACKING} frames in a group; "
                "the published value is 3"
            )
    limit = max_num_frames * max_num_packing
    if num_frames is not None and not 1 <= num_frames <= limit:
        raise FrameSamplingError(
            f"num_frames={num_frames} must lie between 1 and {limit} (max_num_frames={max_num_frames} x "
            f"max_num_packing={max_num_packing}); ask for fewer frames, or raise max_num_packing (at most {MAX_PACKING})"
        )


# --- the processor ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoReport:
    """What was taken from a video. Names are those of transformers' VideoMetadata, then what packing adds."""

    total_num_frames: int  # of the whole video
    fps: float  # native
    duration: float  # seconds, of the whole video
    width: int
    height: int
    video_backend: str
    frames_indices: list[int]  # in the whole video
    timestamps: list[float]  # seconds from the beginning of the whole video
    packing: int
    num_groups: int
    num_tokens: int  # visual tokens the language model reads
    variable_frame_rate: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SampledVideo:
    """Chosen frames in time order, their temporal ids in groups, and the report."""

    frames: list[Image.Image]
    temporal_ids: list[list[int]]
    metadata: VideoReport


class MiniCPMVVideosKwargs(VideosKwargs, total=False):
    """Keyword arguments of the video processor beyond those of transformers."""

    max_num_frames: int | None
    max_num_packing: int | None
    force_packing: int | None
    time_scale: float | None
    frame_selection: str | None
    video_backend: str | None
    max_slice_nums: int | None
    use_image_id: bool | None
    start: float | None
    end: float | None


class MiniCPMVVideoProcessor(MiniCPMVImageProcessor):
    """Samples, decodes and slices videos for MiniCPM-V 4.5. Every option can also be given to a single call.

    Args:
        fps: frames per second to look at.
        max_num_frames: groups (of 64 tokens) before frames are packed more tightly.
        max_num_packing: most frames in a group, 1 to 6. With 6 a frame of 448 x 448 costs 96 times less than one
            token per patch.
        force_packing: frames in a group for short clips too (the recipe packs long ones only).
        num_frames: a number of frames instead of a rate; a shorter clip gives all it has.
        time_scale: seconds that one step of a temporal id means; the model was trained with 0.1.
        frame_selection: "uniform" takes the centres of equal time bins; "keyframes" takes as many frames with the
            same packing, but those that differ most from the frame before them (cuts first). It decodes the whole
            clip once, in small.
        do_sample_frames: False keeps every frame (the caller has chosen them).
        video_backend: force "decord", "pyav" or "torchcodec"; by default the first that is installed and can open the file.
        max_slice_nums: slices a frame may be cut into; 1 keeps a frame whole.
        use_image_id: whether frames get `<image_id>` numbers in the prompt.
        kwargs: those of the image processor.

    Parts of a video: `start` and `end` (seconds) sample as if the part had been cut out first.
    Frame lists, folders and arrays have no clock: give `video_metadata={"fps": ...}`; without it they count as frames
    sampled at `fps`, and all are kept up to `max_num_frames * max_num_packing`.
    A variable frame rate: frames are chosen evenly by number, and their ids come from the real time stamps.
    """

    model_input_names = ["pixel_values", "image_sizes", "tgt_sizes", "temporal_ids"]
    valid_kwargs = MiniCPMVVideosKwargs
    _auto_class = None  # not the image processor's, should that have been registered

    def __init__(
        self,
        fps: float = 3,
        max_num_frames: int = 180,
        max_num_packing: int = 3,
        force_packing: int | None = None,
        num_frames: int | None = None,
        time_scale: float = 0.1,
        frame_selection: str = "uniform",
        do_sample_frames: bool = True,
        video_backend: str | None = None,
        max_slice_nums: int = 1,
        use_image_id: bool = False,
        **kwargs,
    ):
        kwargs.pop("video_processor_type", None)
        super().__init__(max_slice_nums=max_slice_nums, use_image_id=use_image_id, **kwargs)
        self.fps = fps
        self.max_num_frames = max_num_frames
        self.max_num_packing = max_num_packing
        self.force_packing = force_packing
        self.num_frames = num_frames
        self.time_scale = time_scale
        self.frame_selection = frame_selection
        self.do_sample_frames = do_sample_frames
        self.video_backend = video_backend

    def __call__(self, videos, **kwargs) -> MiniCPMVBatchFeature:
        return self.preprocess(videos, **kwargs)

    def sample_video(self, video, video_metadata: Mapping | None = None, **options) -> SampledVideo:
        """Choose and decode the frames of one video.

        Args:
            video: a path, bytes or open file of a video, GIF, APNG or animated WebP; a folder of frames (natural
                order); a list of frames; an array or tensor (frames, height, width, 3) or (frames, 3, height, width).
            video_metadata: `{"fps": ...}`, the clock of a list of frames.
            options: see the class; also `start` and `end` in seconds. None means the processor's own setting.

        Raises:
            VideoInputError: the video is missing, broken, empty, or has no picture track.
            FrameSamplingError: an option outside its range.
            TypeError: an unknown option.
            ImportError: no decoder is installed.
        """
        settings = self._settings(options)
        frames, temporal_ids, report_of = self._sample(video, video_metadata, settings)
        frames = list(frames)
        units_per_group = self.get_slice_layout(frames[0].size, settings["max_slice_nums"]).num_slices
        return SampledVideo(frames, temporal_ids, report_of(frames[0].size, units_per_group * len(temporal_ids)))

    def preprocess(
        self,
        videos,
        video_metadata: Mapping | Sequence[Mapping | None] | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        **options,
    ) -> MiniCPMVBatchFeature:
        """Sample, decode and slice videos; each frame is sliced as soon as it is decoded.

        Args:
            videos: one video (see `sample_video`), a list of videos, or one list of videos per conversation.
            video_metadata: of the one video, or a list with one (or None) for each.
            return_metadata: adds `video_metadata`, one `VideoReport` per video.
            return_tensors: None or "pt" give torch tensors, "np" numpy arrays, in nested lists either way.

        Returns:
            One entry a video in each of: `pixel_values`, list of float32 `(3, P, P * patches)`; `image_sizes`, list of
            the frames' (width, height); `tgt_sizes`, integer tensor `(slices, 2)` of (rows, columns) in patches;
            `temporal_ids`, list of units, each with the ids of its frames.

        Raises: as `sample_video`.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; give None, 'pt' or 'np'")
        convert = (lambda tensor: tensor.numpy()) if return_tensors == "np" else (lambda tensor: tensor)
        settings = self._settings(options)
        videos = flatten_videos(videos)
        if video_metadata is None or isinstance(video_metadata, Mapping):
            video_metadata = [video_metadata] * len(videos)
        if len(video_metadata) != len(videos):
            raise VideoInputError(
                f"{len(video_metadata)} video_metadata for {len(videos)} videos; give one (or None) for each"
            )
        data: dict[str, list] = {"pixel_values": [], "image_sizes": [], "tgt_sizes": [], "temporal_ids": []}
        reports = []
        for video, metadata in zip(videos, video_metadata, strict=True):
            frames, temporal_ids, report_of = self._sample(video, metadata, settings)
            sliced = self.slice_all_to_patches(frames, settings["max_slice_nums"])
            pixel_values, tgt_sizes, unit_temporal_ids = pack_frames(sliced, temporal_ids)
            data["pixel_values"].append([convert(strip) for strip in pixel_values])
            data["image_sizes"].append([frame.image_size for frame in sliced])
            data["tgt_sizes"].append(convert(torch.tensor(tgt_sizes, dtype=torch.int64)))
            data["temporal_ids"].append(unit_temporal_ids)
            reports.append(report_of(sliced[0].image_size, len(unit_temporal_ids)))
        if return_metadata:
            data["video_metadata"] = reports
        return MiniCPMVBatchFeature(data)

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """This processor's options with those of one call over them."""
        names = [name for name in inspect.signature(MiniCPMVVideoProcessor.__init__).parameters if hasattr(self, name)]
        settings = {"start": None, "end": None, **{name: getattr(self, name) for name in names}}
        for name, value in options.items():
            if name not in settings:
                nearest = difflib.get_close_matches(name, settings, n=1, cutoff=0)[0]
                raise TypeError(f"unknown video option {name!r}; did you mean {nearest!r}? All: {', '.join(settings)}")
            if value is not None:
                settings[name] = value
        for name, allowed in (("frame_selection", FRAME_SELECTIONS), ("video_backend", (None, *DECODERS))):
            if settings[name] not in allowed:
                raise FrameSamplingError(f"{name}={settings[name]!r} is unknown; give one of {allowed}")
        if not 0 < settings["time_scale"] < math.inf:
            raise FrameSamplingError(f"time_scale={settings['time_scale']} must be a positive number of seconds")
        return settings

    def _sample(self, video, video_metadata: Mapping | None, settings: dict[str, Any]):
        """The chosen frames (an iterator that decodes them), their groups of ids, and a maker of the report."""
        source = open_video(video, settings["video_backend"], self.load_image)
        count = source.num_frames
        limit = settings["max_num_frames"] * settings["max_num_packing"]
        num_frames = settings["num_frames"] if settings["do_sample_frames"] else count
        native_fps = (video_metadata or {}).get("fps")
        times = source.times if native_fps is None else None
        if native_fps is None and source.native_fps is None:  # frames without a clock: taken as sampled already
            native_fps, num_frames = settings["fps"], num_frames or min(count, limit)
        native_fps = float(source.native_fps if native_fps is None else native_fps)
        options = {key: settings[key] for key in ("fps", "max_num_frames", "max_num_packing", "force_packing")}
        _check_plan_options(count, native_fps, num_frames=settings["num_frames"], **options)

        clock = np.arange(count) / native_fps  # seconds
        # Within half a frame the rate is constant, and the ids are those of the published recipe.
        variable = (
            times is not None
            and _is_clock(times, native_fps)
            and bool(np.abs(times - times[0] - clock).max() > 0.5 / native_fps)
        )
        if variable:
            clock = times - times[0]
        first, stop = _part(clock, count / native_fps, settings["start"], settings["end"])
        if not settings["do_sample_frames"]:
            num_frames = stop - first
        plan = plan_frames(stop - first, native_fps, num_frames=num_frames, **options)
        if settings["frame_selection"] == "keyframes":
            plan = replace(plan, indices=keyframe_indices(source.thumbnails(first, stop), plan))
        indices = [first + index for index in plan.indices]
        if variable:
            ids = temporal_ids_at(clock[indices] - clock[first], settings["time_scale"])
        else:
            ids = temporal_ids_of(plan.indices, native_fps, settings["time_scale"], stop - first)

        def decode() -> Iterator[Image.Image]:
            try:
                yield from source.frames(indices)
            finally:
                source.close()

        def report_of(size: tuple[int, int], num_units: int) -> VideoReport:
            return VideoReport(
                total_num_frames=count,
                fps=native_fps,
                duration=count / native_fps,
                width=size[0],
                height=size[1],
                video_backend=source.decoder,
                frames_indices=indices,
                timestamps=clock[indices].tolist(),
                packing=plan.packing,
                num_groups=plan.num_groups,
                num_tokens=num_units * self.image_feature_size,
                variable_frame_rate=variable,
            )

        return decode(), group_temporal_ids(ids, plan.packing), report_of

    # Saving and loading: a file of its own (video_preprocessor_config.json), or the image processor's settings.

    save_pretrained = BaseVideoProcessor.save_pretrained

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        return BaseVideoProcessor.get_video_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """Build from saved settings. Those of an image processor do not decide how frames are sliced and numbered."""
        if "image_processor_type" in image_processor_dict or "max_num_packing" not in image_processor_dict:
            of_images = ("image_processor_type", "max_slice_nums", "use_image_id")
            image_processor_dict = {key: v for key, v in image_processor_dict.items() if key not in of_images}
        # Overrides of the parent's settings go through __init__ and its checks, like those of this class.
        inherited = inspect.signature(MiniCPMVImageProcessor.__init__).parameters
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in inherited}
        return super().from_dict({**image_processor_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # No "video_processor_type" either: without torchvision, transformers 4 fails on it.
        return {key: value for key, value in super().to_dict().items() if key != "image_processor_type"}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoVideoProcessor"):
        super().register_for_auto_class(auto_class)


def _is_clock(times: np.ndarray, native_fps: float) -> bool:
    """Whether time stamps are real: decord makes some up where the file has none (AVI, MPEG)."""
    average = (times[-1] - times[0]) * native_fps / max(len(times) - 1, 1)  # 1 if they agree with the rate
    return bool(np.isfinite(times).all() and (np.diff(times) >= 0).all() and 0.5 < average < 2)


def _part(clock: np.ndarray, duration: float, start: float | None, end: float | None) -> tuple[int, int]:
    """(first, stop) of the frames shown from `start` to `end` seconds; at least the frame on screen at `start`."""
    start, end = start or 0.0, math.inf if end is None else end
    if start < 0:
        raise FrameSamplingError(f"start={start} must be 0 or more seconds")
    if start >= end:
        raise FrameSamplingError(f"start={start} must lie before end={end} (seconds)")
    duration = max(duration, float(clock[-1]))
    if start >= duration:
        raise FrameSamplingError(f"start={start} lies past the end of the video, which lasts {duration:.3f} seconds")
    first, stop = (int(i) for i in np.searchsorted(clock, (start - 1e-6, end - 1e-6)))
    if first >= stop:
        first = max(int(np.searchsorted(clock, start + 1e-6)) - 1, 0)
        stop = first + 1
    return first, stop
