"""Frames out of a video: files by whichever decoder is installed, animations by Pillow, lists and folders as they are.

What is special:
- Every decoder is optional and imported by name: decord (or decord2, which has the same import name), PyAV, torchcodec.
- The same index gives the same frame with each of them in MP4, MOV, Matroska, WebM and WMV files. In others (AVI, MPEG,
  transport streams, FLV) decord 0.6 miscounts frames after a jump, so PyAV goes first there. decord also comes out up
  to three frames late in streams with open groups of pictures (some HEVC); `video_backend="pyav"` is exact.
- Only the frames asked for become pictures, a few at a time. Thumbnails are scaled by the decoder where it can.
- Nothing is fetched: an address is refused.
"""

import bisect
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from .configuration_minicpmv import MiniCPMVError


logger = logging.get_logger(__name__)

DECODERS = ("decord", "pyav", "torchcodec")  # in order of preference
STILL_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2"}
PILLOW_SIGNATURES = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")  # and RIFF....WEBP
DECORD_SIGNATURES = (b"\x1aE\xdf\xa3", b"0&\xb2u")  # Matroska and WebM, WMV; and MP4, see _is_exact_in_decord
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # those whose time stamps are complete
THUMBNAIL = 32  # side of a thumbnail
DECODE_CHUNK = 16  # full-size frames held at once; with 1080p about 100 MB


class VideoInputError(MiniCPMVError):
    """The video cannot be used: missing, broken, empty, without a picture track, or not a video."""


class FrameSource:
    """An open video.

    Attributes:
        decoder: what reads it.
        num_frames: frames it has.
        native_fps: frames per second; None for frames without a clock (lists, arrays, folders).
        times: seconds at which each frame is shown, or None where only the rate is known.
    """

    decoder = "frames"
    num_frames: int
    native_fps: float | None = None
    times: np.ndarray | None = None

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at `indices` (rising) as RGB pictures, one at a time. Raises VideoInputError for damaged ones."""
        raise NotImplementedError

    def thumbnails(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """All frames from `first` up to `stop` as uint8 arrays (THUMBNAIL, THUMBNAIL, 3)."""
        for frame in self.frames(range(first, stop)):
            yield np.asarray(frame.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))

    def close(self) -> None:
        pass


class _FrameList(FrameSource):
    """Frames that are pictures already: a list of whatever `load_image` takes, or a 4-D array."""

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Image.Image]):
        self.items, self.num_frames, self.load = items, len(items), load

    def frames(self, indices):
        for i in indices:
            _refuse_address(self.items[i])
            yield self.load(self.items[i])


class _Pillow(FrameSource):
    """GIF, APNG and animated WebP, with the duration each frame has."""

    decoder = "pillow"

    def __init__(self, source, load: Callable[[Any], Image.Image]):
        self.load = load
        self.image = Image.open(source)
        self.num_frames = getattr(self.image, "n_frames", 1)
        if self.num_frames == 1 and self.image.format != "GIF":
            raise VideoInputError(
                f"a still {self.image.format} picture is not a video; give it as an image, or as a list of one frame"
            )
        durations = []
        for i in range(self.num_frames):
            self.image.seek(i)
            self.image.load()  # WebP tells the duration of a frame only once it is decoded
            durations.append(self.image.info.get("duration") or 100)  # 0 means "as fast as you can": 0.1 s in browsers
        self.times = (np.cumsum(durations) - durations) / 1000
        self.native_fps = self.num_frames * 1000 / sum(durations)

    def frames(self, indices):
        for i in indices:
            self.image.seek(i)
            yield self.load(self.image.convert("RGBA"))

    def close(self):
        self.image.close()


class _Decord(FrameSource):
    decoder = "decord"

    def __init__(self, source, decord):
        self.decord, self.source = decord, source
        self.reader = self._open()
        self.num_frames = len(self.reader)
        self.native_fps = float(self.reader.get_avg_fps())
        self.times = self.reader.get_frame_timestamp(range(self.num_frames))[:, 0].astype(np.float64)

    def _open(self, **size):
        try:
            return self.decord.VideoReader(_rewound(self.source), ctx=self.decord.cpu(0), **size)
        except (RuntimeError, AssertionError, self.decord.DECORDError) as error:
            raise VideoInputError(_first_line(error)) from error

    def _batches(self, reader, indices, size) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), size):
            try:
                yield from reader.get_batch(list(indices[start : start + size])).asnumpy()
            except (RuntimeError, self.decord.DECORDError) as error:
                raise VideoInputError(
                    f"decord cannot decode the video after frame {indices[start]} ({_first_line(error)}); "
                    "the file is damaged or its codec too new, try video_backend='pyav'"
                ) from error

    def frames(self, indices):
        for frame in self._batches(self.reader, indices, DECODE_CHUNK):
            yield Image.fromarray(frame)

    def thumbnails(self, first, stop):
        small = self._open(width=THUMBNAIL, height=THUMBNAIL)
        yield from self._batches(small, range(first, stop), 16 * DECODE_CHUNK)


class _PyAV(FrameSource):
    decoder = "pyav"

    def __init__(self, source, av):
        self.av, self.source = av, source
        self._open()
        # Reading the packets without decoding them gives the exact number of frames, their times and the key frames.
        packets = [packet for packet in self.container.demux(self.stream) if packet.size and not packet.is_discard]
        if not packets:
            raise VideoInputError("the video track is empty")
        self.num_frames = len(packets)
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(0)
        self.pts = sorted(packet.pts for packet in packets if packet.pts is not None)
        if len(self.pts) == self.num_frames:
            self.times = np.array(self.pts, dtype=np.float64) * float(self.stream.time_base)
            if not rate and self.times[-1] > self.times[0]:
                rate = (self.num_frames - 1) / (self.times[-1] - self.times[0])
        self.native_fps = float(rate)
        self.key_pts = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        self.seekable = self.times is not None and self.container.format.name in SEEKABLE_FORMATS

    def _open(self):
        try:
            self.container = self.av.open(_rewound(self.source))
        except (OSError, self.av.error.FFmpegError) as error:
            raise VideoInputError(_first_line(error)) from error
        if not self.container.streams.video:
            raise VideoInputError("the file has no video track")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"

    def frames(self, indices):
        for frame in self._decode(indices):
            image = frame.to_image()
            rotation = self._rotation(frame)
            yield image.rotate(rotation, expand=True) if rotation else image

    def thumbnails(self, first, stop):
        for frame in self._decode(range(first, stop)):
            yield frame.reformat(THUMBNAIL, THUMBNAIL, "rgb24").to_ndarray()

    def _rotation(self, frame) -> float:
        """Degrees against the clock by which the picture has to be turned, as phones note it."""
        if hasattr(frame, "rotation"):  # PyAV 14
            return frame.rotation % 360
        return getattr(self.stream, "side_data", {}).get("DISPLAYMATRIX", 0) % 360

    def _decode(self, indices):
        try:
            yield from self._decode_by_time(indices) if self.seekable else self._decode_by_count(indices)
        except self.av.error.FFmpegError as error:
            raise VideoInputError(
                f"PyAV cannot decode the video ({_first_line(error)}); the file is damaged"
            ) from error

    def _decode_by_time(self, indices):
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

    def _decode_by_count(self, indices):
        """Count frames from the start, where time stamps are missing or those of decoding (AVI, MPEG, raw H.264)."""
        wanted, found = set(indices), 0
        self._reopen()
        for i, frame in enumerate(self.container.decode(self.stream)):
            if i in wanted:
                found += 1
                yield frame
            if found == len(wanted):
                return
        raise VideoInputError(
            f"{len(wanted) - found} of {len(wanted)} frames could not be decoded; the file is damaged"
        )

    def _reopen(self):
        self.container.close()
        self._open()

    def close(self):
        self.container.close()


class _TorchCodec(FrameSource):
    """torchcodec knows the times of frames only after decoding them, so a variable rate is treated as constant."""

    decoder = "torchcodec"

    def __init__(self, source, torchcodec):
        source = _rewound(source)
        try:
            self.reader = torchcodec.decoders.VideoDecoder(source if isinstance(source, str) else source.read())
        except (RuntimeError, ValueError) as error:
            raise VideoInputError(_first_line(error)) from error
        self.num_frames = self.reader.metadata.num_frames or 0
        self.native_fps = float(self.reader.metadata.average_fps or 0)

    def frames(self, indices):
        for start in range(0, len(indices), DECODE_CHUNK):
            chunk = list(indices[start : start + DECODE_CHUNK])
            try:
                frames = self.reader.get_frames_at(indices=chunk).data  # (frames, 3, height, width) uint8
            except (RuntimeError, IndexError) as error:
                raise VideoInputError(
                    f"torchcodec cannot decode the video after frame {chunk[0]} ({_first_line(error)}); "
                    "try video_backend='pyav'"
                ) from error
            for frame in frames:
                yield Image.fromarray(frame.permute(1, 2, 0).numpy())


def _import_decoder(name: str):
    """The decoder's module, or None. Imported by name: nothing here may require a decoder to be installed."""
    try:
        if name == "torchcodec":
            importlib.import_module("torchcodec.decoders")
        return importlib.import_module("av" if name == "pyav" else name)
    except (ImportError, OSError, RuntimeError):  # torchcodec raises the last two where FFmpeg is missing
        return None


def _rewound(source):
    if hasattr(source, "seek"):
        source.seek(0)
    return source


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_file(source: str | io.IOBase, name: str, backend: str | None, load: Callable) -> FrameSource:
    """Open a file, in Pillow where its first bytes are those of a picture format, else in the first decoder that can."""
    header = source.read(16) if hasattr(source, "read") else _read_header(source)
    _rewound(source)
    if not header:
        raise VideoInputError(f"{name} is an empty file")
    if header.startswith(PILLOW_SIGNATURES) or (header[:4] == b"RIFF" and header[8:12] == b"WEBP"):
        try:
            return _Pillow(source, load)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError) as error:
            raise VideoInputError(f"{name} is damaged: {_first_line(error)}") from error
    readers: dict[str, Callable] = {"decord": _Decord, "pyav": _PyAV, "torchcodec": _TorchCodec}
    wanted = DECODERS if backend is None else (backend,)
    modules = {decoder: module for decoder in wanted if (module := _import_decoder(decoder)) is not None}
    if not modules:
        raise ImportError(
            f"no video decoder found for {name} (looked for: {', '.join(wanted)}). "
            "Install one: `pip install decord` (Linux x86, Windows), `pip install av` (everywhere) or `pip install torchcodec`"
        )
    order = list(modules)
    if order[0] == "decord" and not _is_exact_in_decord(header):
        order.append(order.pop(0))
        if len(order) == 1:
            logger.warning_once("decord may miscount frames of this kind of file; `pip install av` for exact ones")
    reasons = []
    for decoder in order:
        try:
            reader = readers[decoder](source, modules[decoder])
            if reader.num_frames < 1:
                raise VideoInputError("it has no frames")
            return reader
        except VideoInputError as error:
            reasons.append(f"{decoder}: {error}")
    raise VideoInputError(
        f"{name} cannot be read as a video ({'; '.join(reasons)}). Check that it is a whole file with a picture track"
    )


def _is_exact_in_decord(header: bytes) -> bool:
    return header.startswith(DECORD_SIGNATURES) or header[4:8] in MP4_BOXES


def _read_header(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _refuse_address(name: Any) -> None:
    if isinstance(name, str) and re.match(r"(data:|[a-z][a-z0-9+.-]+://)", name, re.IGNORECASE):
        raise VideoInputError(
            f"{name[:60]!r} is an address, and nothing is fetched for videos; download it and give its path or bytes"
        )


def open_video(video: Any, backend: str | None, load: Callable[[Any], Image.Image]) -> FrameSource:
    """Open a path, bytes, open file, folder of frames, list of frames or 4-D array.

    Args:
        backend: one of `DECODERS`, or None for the first that is installed and can open the file.
        load: turns what the caller gave as a frame (and a frame of an animation) into an RGB picture.

    Raises:
        VideoInputError: missing, broken, empty, an address, without a picture track, or not a video.
        ImportError: no decoder is installed.
    """
    if isinstance(video, (str, os.PathLike)):
        name = os.fspath(video)
        _refuse_address(name)
        path = Path(name).expanduser()
        if path.is_dir():
            frames = sorted((p for p in path.iterdir() if p.suffix.lower() in STILL_SUFFIXES), key=_natural_order)
            if not frames:
                raise VideoInputError(f"the folder {name!r} holds no pictures ({', '.join(sorted(STILL_SUFFIXES))})")
            return _FrameList([str(p) for p in frames], load)
        if not path.is_file():
            raise VideoInputError(f"there is no file {name!r}; give the path of a video, or a folder of frames")
        return _open_file(str(path), repr(name), backend, load)
    if isinstance(video, (bytes, bytearray)):
        return _open_file(io.BytesIO(video), "the video given as bytes", backend, load)
    if hasattr(video, "read"):
        return _open_file(video, "the video file", backend, load)
    if getattr(video, "ndim", None) == 4 or isinstance(video, (list, tuple)):
        if len(video) == 0:
            raise VideoInputError("the video has no frames; give at least one")
        return _FrameList(video, load)
    shape = f" of shape {tuple(video.shape)}" if hasattr(video, "shape") else ""
    raise VideoInputError(
        f"{type(video).__name__}{shape} is not a video; give a path, bytes, a folder or list of frames, "
        "or an array of shape (frames, height, width, 3)"
    )


def _natural_order(path: Path) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name.lower())]


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, os.PathLike)):
        return Path(item).suffix.lower() in STILL_SUFFIXES and not Path(item).is_dir()
    return isinstance(item, Image.Image) or getattr(item, "ndim", None) in (2, 3)


def flatten_videos(videos: Any) -> list:
    """All videos of one call in order: a single video, a list of them, or one list per conversation.

    A list that begins with a picture (also an array of one frame, or the path of a file named as a still picture) is
    one video. Animated WebP and PNG files are therefore given one by one, not in a list.
    """
    if not isinstance(videos, (list, tuple)) or (len(videos) and _is_frame(videos[0])):
        return [videos]
    return [video for item in videos for video in flatten_videos(item)]
