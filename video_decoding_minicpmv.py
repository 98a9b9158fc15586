"""Frames out of a video: files by PyAV, animations by Pillow, lists and folders as they are.

What is special:
- Frames are found by their time stamps in MP4, MOV, Matroska and WebM files, by a jump to the key frame before them;
  elsewhere (AVI, MPEG, raw streams) they are counted from the start.
- Only the frames asked for become images, a few at a time. Thumbnails are scaled by the decoder.
- Sizes are looked at before anything is decoded. Nothing is fetched: an address is refused.
"""

import bisect
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from .configuration_minicpmv import MiniCPMVError
from .image_loading_minicpmv import DECODE_ERRORS, check_pixels, open_formats


STILL_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2"}
PILLOW_SIGNATURES = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")  # and RIFF....WEBP
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # those whose time stamps are complete
THUMBNAIL = 32  # side of a thumbnail
FRAME_PIXELS = 2**25  # of a video's frame: 7680 x 4320 has fewer
ANIMATION_PIXELS = 2**29  # of all frames of an animation, which all have to be decoded: 258 of 1920 x 1080


class VideoInputError(MiniCPMVError):
    """The video cannot be used: missing, broken, too large, empty, without a video track, or not a video."""


class FrameSamplingError(MiniCPMVError):  # here for the reason of FramePackingError
    """A sampling option lies outside its range, or asks for a part of the video that is not there."""


class FrameSource:
    """An open video."""

    decoder = "frames"  # what reads it
    num_frames: int
    native_fps: float | None = None  # None for frames without a clock (lists, arrays, folders)
    times: np.ndarray | None = None  # seconds at which each frame is shown, or None where only the rate is known

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices` (rising) as RGB images, one at a time. Raises VideoInputError for damaged ones."""
        raise NotImplementedError

    def thumbnails(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """All frames from `first` up to `stop` as uint8 arrays (THUMBNAIL, THUMBNAIL, 3)."""
        for frame in self.frames(range(first, stop)):
            yield np.asarray(frame.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))

    def close(self) -> None: ...


class _FrameList(FrameSource):
    """Frames that are images already: a list of whatever `load_image` takes, or a 4-D array."""

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Image.Image]):
        self.items, self.num_frames, self.load = items, len(items), load

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for i in indices:
            _refuse_address(self.items[i])
            yield self.load(self.items[i])


class _Pillow(FrameSource):
    """GIF, APNG and animated WebP, with the duration each frame has."""

    decoder = "pillow"

    def __init__(self, source: Any, load: Callable[[Any], Image.Image]):
        self.load = load
        self.image = open_formats(source)
        width, height = self.image.size
        self.num_frames = getattr(self.image, "n_frames", 1)
        if self.num_frames == 1 and self.image.format != "GIF":
            raise VideoInputError(f"one still {self.image.format} image; give it as an image, or in a list of frames")
        check_pixels("the animation", self.image)
        if width * height * self.num_frames > ANIMATION_PIXELS:
            raise VideoInputError(
                f"{self.num_frames} frames of {width} x {height}, more than {ANIMATION_PIXELS} pixels; scale it down, or "
                "convert it to MP4, of which only the frames that are looked at are decoded"
            )
        durations = []
        for i in range(self.num_frames):
            self.image.seek(i)
            self.image.load()  # WebP tells the duration of a frame only once it is decoded
            durations.append(self.image.info.get("duration") or 100)  # 0 means "as fast as you can": 0.1 s in browsers
        self.times = (np.cumsum(durations) - durations) / 1000
        self.native_fps = self.num_frames * 1000 / sum(durations)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for i in indices:
            try:
                self.image.seek(i)
                frame = self.image.convert("RGBA")
            except DECODE_ERRORS as error:
                raise VideoInputError(f"frame {i} of the animation is damaged ({_first_line(error)})") from error
            yield self.load(frame)

    def close(self) -> None:
        self.image.close()


class _PyAV(FrameSource):
    decoder = "pyav"

    def __init__(self, source: Any, av: ModuleType):
        self.av, self.source = av, source
        try:
            self._open()
            self._read_packets()
        except av.error.FFmpegError as error:
            raise VideoInputError(_first_line(error)) from error

    def _read_packets(self) -> None:
        width, height = self.stream.codec_context.width, self.stream.codec_context.height
        if width * height > FRAME_PIXELS:
            raise VideoInputError(f"frames of {width} x {height} have more than {FRAME_PIXELS} pixels; scale it down")
        # Reading the packets without decoding them gives the exact number of frames, their times and the key frames.
        packets = [packet for packet in self.container.demux(self.stream) if packet.size and not packet.is_discard]
        if not packets:
            raise VideoInputError("the video track is empty")
        self.num_frames = len(packets)
        self.native_fps = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        self.pts = sorted(packet.pts for packet in packets if packet.pts is not None)
        self.key_pts = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        has_times = len(self.pts) == self.num_frames
        if has_times and self.num_frames > 1 and self.pts[0] == self.pts[-1]:
            # Such time stamps say nothing, nor does an average that was made from them.
            has_times, self.native_fps = False, float(self.stream.guessed_rate or 0)
        self.seekable = has_times and self.container.format.name in SEEKABLE_FORMATS
        if has_times:
            times = np.array(self.pts, dtype=np.float64) * float(self.stream.time_base)
            span = times[-1] - times[0]
            # Matroska may state a rate that its frames do not have: the time stamps are right.
            if span > 0 and (not self.native_fps or (self.seekable and not agree(times, self.native_fps))):
                self.native_fps = (self.num_frames - 1) / span
            self.times = times if self.seekable or agree(times, self.native_fps) else None

    def _open(self) -> None:
        self.container = self.av.open(_rewound(self.source), metadata_errors="replace")
        if not self.container.streams.video:
            raise VideoInputError("the file has no video track")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for frame in self._decode(indices):
            image = frame.to_image()
            # As phones note it. Before PyAV 14 it stands with the stream, if anywhere.
            side_data = getattr(self.stream, "side_data", {})
            rotation = getattr(frame, "rotation", side_data.get("DISPLAYMATRIX", 0)) % 360
            yield image.rotate(rotation, expand=True) if rotation else image

    def thumbnails(self, first: int, stop: int) -> Iterator[np.ndarray]:
        for frame in self._decode(range(first, stop)):
            yield frame.reformat(THUMBNAIL, THUMBNAIL, "rgb24").to_ndarray()

    def _decode(self, indices: Sequence[int]) -> Iterator[Any]:
        try:
            yield from self._decode_by_time(indices) if self.seekable else self._decode_by_count(indices)
        except self.av.error.FFmpegError as error:
            raise VideoInputError(f"the video is damaged: PyAV cannot decode it ({_first_line(error)})") from error

    def _decode_by_time(self, indices: Sequence[int]) -> Iterator[Any]:
        """Find frames by their time stamps, jumping to a key frame where one lies between here and the next frame."""
        decoded, position = None, None  # position: time stamp of the last frame that came out
        for index in indices:
            target = self.pts[index]
            key = self.key_pts[max(bisect.bisect_right(self.key_pts, target) - 1, 0)] if self.key_pts else self.pts[0]
            if decoded is None or key > position:
                self.container.seek(key, stream=self.stream, backward=True)
                decoded = self.container.decode(self.stream)
            frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= target), None)
            if frame is None or frame.pts != target:  # the jump went too far: once more from the start
                self._reopen()
                decoded = self.container.decode(self.stream)
                frame = next((frame for frame in decoded if frame.pts == target), None)
            if frame is None:
                raise VideoInputError(f"frame {index} is damaged; choose another part of the video with start and end")
            position = frame.pts
            yield frame

    def _decode_by_count(self, indices: Sequence[int]) -> Iterator[Any]:
        """Count frames from the start, where time stamps are missing or those of decoding (AVI, MPEG, raw H.264)."""
        wanted, found = set(indices), 0
        self._reopen()
        for i, frame in enumerate(self.container.decode(self.stream)):
            if i in wanted:
                found += 1
                yield frame
            if found == len(wanted):
                return
        raise VideoInputError(f"the video is damaged: {len(wanted) - found} of {len(wanted)} frames cannot be decoded")

    def _reopen(self) -> None:
        self.container.close()
        self._open()

    def close(self) -> None:
        self.container.close()


def agree(times: np.ndarray, fps: float) -> bool:
    """Whether time stamps are those of a video of about `fps` frames a second."""
    average = (times[-1] - times[0]) * fps / max(len(times) - 1, 1)  # 1 if they agree
    return bool(np.isfinite(times).all() and (np.diff(times) >= 0).all() and 0.5 < average < 2)


def _rewound(source: Any) -> Any:
    if hasattr(source, "seek"):
        source.seek(0)
    return source


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_file(source: Any, name: str, load: Callable[[Any], Image.Image]) -> FrameSource:
    """Open a file, in Pillow where its first bytes are those of an image format, else in PyAV."""
    try:
        if hasattr(source, "read"):
            header = _rewound(source).read(16)
        else:
            with open(source, "rb") as file:
                header = file.read(16)
        if not header:
            raise VideoInputError("an empty file")
        if header.startswith(PILLOW_SIGNATURES) or (header[:4] == b"RIFF" and header[8:12] == b"WEBP"):
            return _Pillow(_rewound(source), load)
        return _PyAV(source, importlib.import_module("av"))  # by name: nothing here may require it to be installed
    except ImportError as error:
        raise VideoInputError(f"PyAV is needed to read {name}: pip install av") from error
    except DECODE_ERRORS as error:
        what = f"{name} cannot be read as a video ({_first_line(error)})"
        raise VideoInputError(f"{what}. Check that it is a whole file with a video track") from error


def _refuse_address(name: Any) -> None:
    if isinstance(name, str) and re.match(r"(data:|[a-z][a-z0-9+.-]+://)", name, re.IGNORECASE):
        raise VideoInputError(f"{name[:60]!r} is an address; download the video and give its path or bytes")


def open_video(video: Any, load: Callable[[Any], Image.Image]) -> FrameSource:
    """Open a path, bytes, open file, folder of frames, list of frames or 4-D array.

    `load` turns what the caller gave as a frame (and a frame of an animation) into an RGB image. Raises
    VideoInputError, also where PyAV is not installed.
    """
    if isinstance(video, (str, os.PathLike)):
        name = os.fspath(video)
        _refuse_address(name)
        path = Path(name).expanduser()
        if path.is_dir():
            frames = sorted((p for p in path.iterdir() if p.suffix.lower() in STILL_SUFFIXES), key=_natural_order)
            if not frames:
                raise VideoInputError(f"the folder {name!r} holds no images ({', '.join(sorted(STILL_SUFFIXES))})")
            return _FrameList([str(p) for p in frames], load)
        if not path.is_file():
            raise VideoInputError(f"there is no file {name!r}; give the path of a video, or a folder of frames")
        return _open_file(str(path), repr(name), load)
    if isinstance(video, (bytes, bytearray)) or hasattr(video, "read"):
        file = video if hasattr(video, "read") else io.BytesIO(video)
        return _open_file(file, "the video", load)
    if getattr(video, "ndim", None) == 4 or isinstance(video, (list, tuple)):
        if len(video) == 0:
            raise VideoInputError("the video has no frames; give at least one")
        return _FrameList(video, load)
    shape = f" of shape {tuple(video.shape)}" if hasattr(video, "shape") else ""
    accepted = "a path, bytes, a folder or list of frames, or an array of shape (frames, height, width, 3)"
    raise VideoInputError(f"{type(video).__name__}{shape} is not a video; give {accepted}")


def _natural_order(path: Path) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name.lower())]


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, os.PathLike)):
        return Path(item).suffix.lower() in STILL_SUFFIXES and not Path(item).is_dir()
    return isinstance(item, Image.Image) or getattr(item, "ndim", None) in (2, 3)


def flatten_videos(videos: Any) -> list:
    """All videos of one call in order: a single video, a list of them, or one list per conversation.

    A list that begins with an image (also an array of one frame, or the path of a file named as a still image) is
    one video. Animated WebP and PNG files are therefore given one by one, not in a list.
    """
    if not isinstance(videos, (list, tuple)) or (len(videos) and _is_frame(videos[0])):
        return [videos]
    return [video for item in videos for video in flatten_videos(item)]
