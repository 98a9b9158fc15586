"""Video: the published sampling numbers, the decoders side by side, and what happens to videos that cannot be used."""

import functools
import importlib
import importlib.util
import io
import json
import math
import operator
import shutil
import struct
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, ground_floor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


av = pytest.importorskip("av")

video_processing = ground_floor("video_processing_minicpmv")
video_decoding = ground_floor("video_decoding_minicpmv")
FrameSamplingError = video_processing.FrameSamplingError
VideoInputError = video_processing.VideoInputError
VideoOptions = video_processing.VideoOptions


def plan_frames(total, native_fps, **options):
    return video_processing.plan_frames(total, native_fps, VideoOptions(**options))


def temporal_ids_of(indices, native_fps, time_scale=0.1, total_num_frames=None):
    """Those of a clip with a constant rate."""
    duration = None if total_num_frames is None else total_num_frames / native_fps
    return video_processing.temporal_ids_at(np.asarray(indices) / native_fps, time_scale, duration)


@pytest.fixture(scope="module")
def processor():
    return video_processing.MiniCPMVVideoProcessor()


# --- clips: a numbered frame shows its number in two digits of base 12 as grey levels -------------------------------------------------------------------


def write_clip(path, levels, rate=30, size=(64, 48), times=None, codec="libx264", metadata=()):
    """An H.264 clip with B-frames and a key frame every 12; `times` are milliseconds, for a variable rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        container.metadata.update(metadata)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": "12", "bf": "2", "crf": "4"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, level in enumerate(levels):
            pixels = level if isinstance(level, np.ndarray) else np.full((size[1], size[0], 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotated_copy(source, path):
    """The same clip with a display matrix that asks for a quarter turn clockwise, as phones write it."""
    data = bytearray(source.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(data)
    return path


def numbered(i, size=(64, 48)):
    """A frame whose left half shows i % 12 and whose right half shows i // 12, twenty grey levels apart."""
    pixels = np.full((size[1], size[0], 3), 10 + 20 * (i % 12), np.uint8)
    pixels[:, size[0] // 2 :] = 10 + 20 * (i // 12)
    return pixels


def number_of(frame):
    grey = np.asarray(frame, dtype=np.float64)
    low, high = grey[:, : frame.width // 2 - 4].mean(), grey[:, frame.width // 2 + 4 :].mean()
    return round((low - 10) / 20) + 12 * round((high - 10) / 20)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "count.mp4", [numbered(i) for i in range(120)])
    shot_levels = [20] * 17 + [120] * 23 + [60] * 11 + [220] * 30 + [10] * 19
    write_clip(folder / "cuts.mp4", shot_levels)
    write_clip(folder / "still.mp4", [90] * 60)
    write_clip(folder / "one.mp4", [100])
    write_clip(folder / "slow.mp4", [numbered(i) for i in range(20)], rate=1)
    write_clip(
        folder / "uneven.mp4",
        [numbered(i) for i in range(20)],
        times=[40 * i + (3000 if i >= 10 else 0) for i in range(20)],
    )
    gradient = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (32, 1, 3))
    rotated_copy(write_clip(folder / "flat.mp4", [gradient] * 6, size=(64, 32)), folder / "rotated.mp4")
    pictures = [Image.new("L", (40, 30), 20 * i) for i in range(6)]
    pictures[0].save(
        folder / "six.gif", save_all=True, append_images=pictures[1:], duration=[100, 100, 1000, 100, 100, 100]
    )
    pictures[0].save(folder / "six.png", save_all=True, append_images=pictures[1:], duration=200)
    pictures[0].save(folder / "six.webp", save_all=True, append_images=pictures[1:], duration=200, lossless=True)
    return folder


# --- the recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, native, fps, frames, packing, groups, tokens",
    [
        (150, 30, 5, 25, 1, 25, 1_600),
        (180, 30, 3, 18, 1, 18, 1_152),
        (1104, 30, 5, 184, 1, 184, 11_776),
        (1800, 30, 3, 180, 1, 180, 11_520),
        (1830, 30, 3, 183, 2, 92, 5_888),
        (1800, 30, 5, 300, 2, 150, 9_600),
        (3000, 30, 5, 500, 3, 167, 10_688),
        (3600, 30, 5, 540, 3, 180, 11_520),
        (216_000, 30, 5, 540, 3, 180, 11_520),
    ],
)
def test_published_sampling_table(total, native, fps, frames, packing, groups, tokens):
    plan = plan_frames(total, native, fps=fps)
    assert (len(plan.indices), plan.packing) == (frames, packing)
    ids = temporal_ids_of(plan.indices, native, total_num_frames=total)
    grouped = [ids[i : i + plan.packing] for i in range(0, len(ids), plan.packing)]
    assert (len(grouped), len(grouped) * 64) == (groups, tokens)
    assert functools.reduce(operator.iadd, grouped, []) == ids


def test_frames_stand_at_the_centres_of_equal_bins():
    assert plan_frames(180, 30).indices == tuple(range(5, 180, 10))


@pytest.mark.parametrize(
    "total, native, fps, frames",
    [
        (1, 30, 3, 1),
        (2, 30, 3, 1),
        (3, 30, 3, 1),
        (30, 30, 0.2, 1),
        (60, 1, 5, 60),  # the source is slower than the rate: every frame once
        (24, 0.4, 3, 24),  # a slide show
        (15, 1.6, 3, 15),
    ],
)
def test_there_is_a_frame_and_no_frame_twice(total, native, fps, frames):
    indices = plan_frames(total, native, fps=fps).indices
    assert len(set(indices)) == len(indices) == frames
    assert indices[-1] < total


def test_a_slow_source_is_packed_for_the_frames_it_has():
    assert plan_frames(60, 1, fps=5).packing == 1


def test_forced_packing_is_bounded_by_the_largest_packing():
    assert plan_frames(180, 30, force_packing=6).packing == 3
    assert plan_frames(180, 30, force_packing=6, max_num_packing=6).packing == 6
    assert plan_frames(1830, 30, force_packing=1).packing == 1


def test_a_number_of_frames_may_replace_the_rate():
    assert len(plan_frames(900, 30, num_frames=32).indices) == 32
    assert len(plan_frames(10, 30, num_frames=32).indices) == 10
    assert plan_frames(10_000, 30, num_frames=540).packing == 3


@given(
    total=st.integers(1, 200_000),
    native=st.sampled_from([0.3, 1, 10, 12.5, 15, 24000 / 1001, 25, 30000 / 1001, 30, 60, 120]),
    fps=st.one_of(st.integers(1, 60), st.floats(0.01, 60)),
    packing=st.integers(1, 6),
    limit=st.integers(1, 400),
)
@settings(deadline=None)
def test_any_plan_is_rising_unique_and_inside_the_clip(total, native, fps, packing, limit):
    plan = plan_frames(total, native, fps=fps, max_num_packing=packing, max_num_frames=limit)
    indices = np.array(plan.indices)
    assert 1 <= plan.packing <= packing
    assert indices[0] >= 0 and indices[-1] < total
    assert (np.diff(indices) > 0).all()
    ids = temporal_ids_of(plan.indices, native, total_num_frames=total)
    assert min(ids) >= 0 and (np.diff(ids) >= 0).all()


def test_truncated_ids_are_kept_for_parity():
    assert temporal_ids_of([129, 132, 243], 30) == [42, 44, 80]  # 4.3, 4.4 and 8.1 seconds


@given(
    total=st.integers(1, 600),
    native=st.sampled_from([1, 5, 7, 12.5, 15, 24000 / 1001, 25, 29.97, 30]),
    time_scale=st.sampled_from([0.1, 0.2, 0.5]),
)
@settings(deadline=None, max_examples=40)
def test_ids_agree_with_a_search_among_all_multiples(total, native, time_scale):
    grid = np.arange(0, total / native, time_scale)
    seconds = np.arange(total) / native
    nearest = grid[np.abs(grid[None, :] - seconds[:, None]).argmin(axis=1)]
    expected = (nearest / time_scale).astype(np.int32).tolist()
    assert temporal_ids_of(range(total), native, time_scale, total) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_num_packing": 0}, ["max_num_packing=0", "6"]),
        ({"max_num_packing": 7}, ["max_num_packing=7", "6"]),
        ({"force_packing": 9}, ["force_packing=9", "6"]),
        ({"fps": 0}, ["fps=0", "positive"]),
        ({"fps": math.nan}, ["fps=nan", "positive"]),
        ({"max_num_frames": 0}, ["max_num_frames=0", "180"]),
        ({"num_frames": 541}, ["num_frames=541", "540", "max_num_packing"]),
        ({"num_frames": 0}, ["num_frames=0", "1"]),
        ({"num_frames": 2.5}, ["num_frames=2.5", "whole number"]),
        ({"fps": "3"}, ["fps='3'", "positive"]),
        ({"fps": True}, ["fps=True", "positive"]),
        ({"time_scale": 1e-30}, ["time_scale=1e-30", "0.001"]),
        ({"max_slice_nums": 0}, ["max_slice_nums=0", "at least 1"]),
        ({"start": math.nan}, ["start=nan", "seconds"]),
        ({"end": "5"}, ["end='5'", "seconds"]),
        ({"frame_selection": "best"}, ["frame_selection='best'", "keyframes"]),
    ],
)
def test_options_out_of_range_name_value_limit_and_remedy(options, words):
    with pytest.raises(FrameSamplingError) as error:
        VideoOptions(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- decoding ---------------------------------------------------------------------------------------------------------------


def test_the_frames_asked_for_are_decoded(processor, clips):
    sampled = processor.sample_video(clips / "count.mp4", fps=5)
    assert sampled.metadata.video_backend == "pyav"
    assert sampled.metadata.frames_indices == list(range(3, 120, 6))
    assert [number_of(frame) for frame in sampled.frames] == sampled.metadata.frames_indices
    assert sampled.temporal_ids == [[i] for i in temporal_ids_of(range(3, 120, 6), 30, total_num_frames=120)]


def test_phone_videos_stand_upright(processor, clips):
    sampled = processor.sample_video(clips / "rotated.mp4")
    assert sampled.frames[0].size == (32, 64)
    rows = np.asarray(sampled.frames[0].convert("L"), np.int16).mean(axis=1)
    assert rows[-1] - rows[0] > 200  # left to right has become top to bottom


def test_pieces_far_apart_are_found_by_seeking(clips):
    source = video_decoding.open_video(clips / "count.mp4", None)
    wanted = [0, 1, 11, 12, 13, 50, 97, 119]
    assert [number_of(frame) for frame in source.frames(wanted)] == wanted
    source.close()


@pytest.mark.parametrize("suffix", [".avi", ".ts", ".h264", ".flv", ".mpg", ".mkv", ".mov"])
def test_pyav_finds_the_frames_of_any_container(processor, tmp_path, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", [numbered(i) for i in range(60)], rate=25)
    sampled = processor.sample_video(path, fps=6)
    assert sampled.metadata.video_backend == "pyav"
    assert [number_of(frame) for frame in sampled.frames] == sampled.metadata.frames_indices
    assert functools.reduce(operator.iadd, sampled.temporal_ids, []) == temporal_ids_of(
        sampled.metadata.frames_indices, 25, total_num_frames=60
    )


@pytest.mark.parametrize("width", [2, 4, 8, 16, 24, 48, 72])
def test_narrow_clips_are_read(processor, tmp_path, width):
    path = write_clip(tmp_path / "narrow.mp4", [50] * 6, size=(width, 48))
    assert processor.sample_video(path, do_sample_frames=False).frames[0].size == (width, 48)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4"])
def test_frames_far_apart_keep_their_time_stamps_whatever_rate_the_header_states(processor, tmp_path, suffix):
    """A recording of a screen: a frame a second in a file that states thirty."""
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write_clip(
        tmp_path / f"sparse{suffix}", [numbered(i) for i in range(60)], times=range(0, 60_000, 1000), codec=codec
    )
    sampled = processor.sample_video(path, fps=0.5)
    assert sampled.metadata.duration == pytest.approx(60, abs=1.1)
    assert len(sampled.frames) == pytest.approx(30, abs=1)
    assert sampled.metadata.timestamps == pytest.approx([float(i) for i in sampled.metadata.frames_indices], abs=0.1)
    assert [number_of(frame) for frame in sampled.frames] == sampled.metadata.frames_indices


def test_pyav_starts_again_where_a_jump_went_too_far(clips):
    source = video_decoding.open_video(clips / "count.mp4", None)
    source.key_pts = source.pts[1::2]  # half of them are no key frames
    wanted = [5, 30, 31, 80]
    assert [number_of(frame) for frame in source.frames(wanted)] == wanted
    source.close()


def test_only_the_frames_needed_become_pictures_and_few_at_a_time(processor, clips, monkeypatch):
    images, decoded, alive = processor.image_processor, [], []
    slice_all = images.slice_all_to_patches

    def watched(frames, *arguments):
        def seen():
            for frame in frames:
                decoded.append(weakref.ref(frame))
                alive.append(sum(reference() is not None for reference in decoded))
                yield frame

        return slice_all(seen(), *arguments)

    monkeypatch.setattr(images, "slice_all_to_patches", watched)
    processor.preprocess(clips / "count.mp4", fps=12)
    assert len(decoded) == 48
    assert max(alive) <= 17  # a block, and perhaps the last frame of the one before


def test_a_decoder_that_is_missing_is_named_with_its_package(processor, clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoInputError, match="PyAV is needed.*pip install av"):
        processor.sample_video(clips / "count.mp4")
    assert len(processor.sample_video(clips / "six.gif").frames) == 4


def test_metadata_in_an_unknown_encoding_does_not_matter(processor, tmp_path):
    path = write_clip(tmp_path / "titled.mkv", [50] * 6, metadata={"title": "AAAAAAAA"})
    path.write_bytes(path.read_bytes().replace(b"AAAAAAAA", b"\xff\xfe" * 4))
    assert len(processor.sample_video(path).frames) == 1


def test_a_variable_frame_rate_uses_the_real_time_stamps(processor, clips):
    sampled = processor.sample_video(clips / "uneven.mp4", do_sample_frames=False)
    assert sampled.metadata.variable_frame_rate
    assert sampled.metadata.timestamps == pytest.approx(
        [0.04 * i + (3 if i >= 10 else 0) for i in range(20)], abs=1e-3
    )
    ids = functools.reduce(operator.iadd, sampled.temporal_ids, [])
    assert ids[:10] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4] and ids[10] == 34


@pytest.mark.parametrize("times", [[0.0] * 10, [-9e18, *range(9)], [math.nan] * 10, [0, 2, 1, *range(3, 10)]])
def test_time_stamps_made_up_by_a_decoder_do_not_agree_with_the_rate(times):
    assert not video_decoding.agree(np.array(times), 10.0)
    assert video_decoding.agree(np.arange(10) / 10, 10.0)


# --- animations, lists, folders, arrays -----------------------------------------------------------------------------------------


def test_gif_frames_keep_their_own_durations(processor, clips):
    sampled = processor.sample_video(clips / "six.gif", do_sample_frames=False)
    assert sampled.metadata.video_backend == "pillow"
    assert sampled.metadata.duration == pytest.approx(1.5)
    assert sampled.metadata.timestamps == pytest.approx([0, 0.1, 0.2, 1.2, 1.3, 1.4])
    assert sampled.temporal_ids == [[0], [1], [2], [12], [13], [14]]
    assert [round(np.asarray(frame).mean()) for frame in sampled.frames] == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize("name", ["six.png", "six.webp"])
def test_animated_png_and_webp(processor, clips, name):
    sampled = processor.sample_video(clips / name)
    assert (sampled.metadata.fps, sampled.metadata.duration) == (5, pytest.approx(1.2))
    assert sampled.metadata.frames_indices == [0, 2, 3, 5]
    assert [round(np.asarray(frame).mean()) for frame in sampled.frames] == [0, 40, 60, 100]


def test_frames_without_a_clock_are_all_kept(processor):
    frames = [np.full((30, 40, 3), i, np.uint8) for i in range(200)]
    sampled = processor.sample_video(frames, fps=0.5)
    assert sampled.metadata.frames_indices == list(range(200))
    assert sampled.metadata.fps == 0.5
    assert sampled.temporal_ids[0] == [0, 20]
    assert len(processor.sample_video(frames * 4).frames) == 540  # up to the limit


def test_frames_with_a_clock_are_sampled(processor):
    frames = [np.full((30, 40, 3), i, np.uint8) for i in range(60)]
    sampled = processor.sample_video(frames, video_metadata={"fps": 30})
    assert len(sampled.frames) == 6
    assert sampled.metadata.duration == 2


def test_pictures_arrays_tensors_and_paths_are_the_same_video(processor, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (11, 30, 40, 3), np.uint8)
    pictures = [Image.fromarray(frame) for frame in array]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    paths = [tmp_path / f"frame{i}.png" for i in range(11)]
    expected = processor.preprocess([pictures])
    for video in (array, torch.from_numpy(array).permute(0, 3, 1, 2), pictures, paths, tmp_path, [list(array)]):
        features = processor.preprocess(video)
        assert len(features["pixel_values"]) == 1
        assert len(features["pixel_values"][0]) == 11
        assert all(
            torch.equal(one, two)
            for one, two in zip(features["pixel_values"][0], expected["pixel_values"][0], strict=True)
        )  # a folder is read in natural order: frame2 before frame10


def test_exif_turns_a_frame_once(processor):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    features = processor.preprocess([Image.open(file)])
    assert features["image_sizes"] == [[(20, 40)]]


# --- keyframes, parts ---------------------------------------------------------------------------------------------------------------


def test_keyframes_land_on_the_cuts(processor, clips):
    sampled = processor.sample_video(clips / "cuts.mp4", num_frames=5, frame_selection="keyframes")
    assert sampled.metadata.frames_indices == [0, 17, 40, 51, 81]
    assert sampled.temporal_ids == [[i] for i in temporal_ids_of([0, 17, 40, 51, 81], 30)]


def test_keyframes_of_a_still_clip_are_spread_evenly(processor, clips):
    uniform = processor.sample_video(clips / "still.mp4")
    keyframes = processor.sample_video(clips / "still.mp4", frame_selection="keyframes")
    assert keyframes.metadata.frames_indices == [0, *uniform.metadata.frames_indices[:-1]]
    assert keyframes.metadata.packing == uniform.metadata.packing


def test_a_part_is_sampled_as_if_cut_out_first(processor, clips):
    part = processor.sample_video(clips / "count.mp4", start=1, end=3)
    assert part.metadata.frames_indices == [i + 30 for i in plan_frames(60, 30).indices]
    assert functools.reduce(operator.iadd, part.temporal_ids, []) == temporal_ids_of(
        plan_frames(60, 30).indices, 30, total_num_frames=60
    )
    assert part.metadata.timestamps == pytest.approx([i / 30 for i in part.metadata.frames_indices])
    assert [number_of(frame) for frame in part.frames] == part.metadata.frames_indices


def test_a_part_shorter_than_a_frame_gives_the_frame_on_screen(processor, clips):
    assert processor.sample_video(clips / "slow.mp4", start=4.2, end=4.3).metadata.frames_indices == [4]


@pytest.mark.parametrize(
    "part, words",
    [
        ({"start": -1}, ["start=-1"]),
        ({"start": 2, "end": 2}, ["start=2", "end=2"]),
        ({"start": 3, "end": 1}, ["start=3", "end=1"]),
        ({"start": 60}, ["start=60", "4.000 seconds"]),
    ],
)
def test_impossible_parts_are_refused(processor, clips, part, words):
    with pytest.raises(FrameSamplingError) as error:
        processor.sample_video(clips / "count.mp4", **part)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- the processor --------------------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_image_processor_on_the_same_frames(processor, clips):
    features = processor.preprocess(clips / "count.mp4", fps=5, force_packing=3, return_metadata=True)
    sampled = processor.sample_video(clips / "count.mp4", fps=5, force_packing=3)
    images = ground_floor("image_processing_minicpmv").MiniCPMVImageProcessor(max_slice_nums=1)
    expected = images.preprocess([sampled.frames], temporal_ids=[sampled.temporal_ids])
    assert features["temporal_ids"] == expected["temporal_ids"] == [sampled.temporal_ids]
    assert features["image_sizes"] == expected["image_sizes"]
    assert torch.equal(features["tgt_sizes"][0], expected["tgt_sizes"][0])
    assert all(map(torch.equal, features["pixel_values"][0], expected["pixel_values"][0]))
    (report,) = features["video_metadata"]
    assert report == sampled.metadata
    assert (report.packing, report.num_groups, report.num_tokens) == (3, 7, 448)


def test_slices_of_frames_count_as_units(processor):
    frames = [np.zeros((448, 896, 3), np.uint8)] * 4
    features = processor.preprocess([frames], max_slice_nums=4, force_packing=2, return_metadata=True)
    units = 1 + 2
    assert features["temporal_ids"] == [[[0, 3]] * units + [[7, 10]] * units]
    assert len(features["pixel_values"][0]) == 4 * units
    assert features["video_metadata"][0].num_tokens == 2 * units * 64
    assert processor.sample_video(frames, max_slice_nums=4, force_packing=2).metadata.num_tokens == 2 * units * 64


def test_several_videos_of_several_kinds(processor, clips):
    frames = [Image.new("RGB", (40, 30))] * 3
    videos = [str(clips / "count.mp4"), frames, clips / "six.gif", (clips / "one.mp4").read_bytes()]
    features = processor(videos, video_metadata=[None, {"fps": 3}, None, None], return_tensors="np")
    assert [len(ids) for ids in features["temporal_ids"]] == [12, 3, 4, 1]
    assert isinstance(features["tgt_sizes"][0], np.ndarray)
    nested = processor([[videos[0]], [frames, videos[2]]])
    assert [len(ids) for ids in nested["temporal_ids"]] == [12, 3, 4]
    with open(clips / "one.mp4", "rb") as file:
        assert len(processor(file)["temporal_ids"]) == 1


def test_no_video_is_no_error_but_a_video_without_frames_is(processor):
    assert processor([])["pixel_values"] == processor([[], []])["pixel_values"] == []
    with pytest.raises(VideoInputError, match="no frames"):
        processor.sample_video([])


def test_an_unknown_option_names_the_nearest(processor, clips):
    with pytest.raises(TypeError, match="'max_num_frame'. Did you mean 'max_num_frames'"):
        processor.preprocess(clips / "one.mp4", max_num_frame=4)


# --- what cannot be used -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video, whatever its name says")
    (folder / "cut.mp4").write_bytes((clips / "count.mp4").read_bytes()[:400])
    (folder / "cut.gif").write_bytes((clips / "six.gif").read_bytes()[:20])
    Image.new("RGB", (8, 8)).save(folder / "still.png")
    (folder / "no_frames").mkdir()
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return folder


@pytest.mark.parametrize(
    "name, words",
    [
        ("empty.mp4", "empty file"),
        ("text.mp4", "cannot be read as a video"),
        ("cut.mp4", "cannot be read as a video"),
        ("sound.wav", "cannot be read as a video"),
        ("cut.gif", "cannot be read as a video"),
        ("still.png", "still PNG image"),
        ("no_frames", "holds no images"),
        ("absent.mp4", "there is no file"),
    ],
)
def test_unusable_files_are_refused(processor, broken, name, words):
    with pytest.raises(VideoInputError, match=words):
        processor.preprocess(broken / name)


@pytest.mark.parametrize(
    "video, words",
    [
        ("https://example.org/clip.mp4", "download"),
        (["https://example.org/frame.jpg"], "download"),
        ("data:video/mp4;base64,AAAA", "bytes"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((2, 2, 4, 4, 3), np.uint8), r"\(2, 2, 4, 4, 3\)"),
        (3, "int is not a video"),
        (None, "NoneType is not a video"),
    ],
)
def test_other_unusable_inputs_are_refused(processor, video, words):
    with pytest.raises(VideoInputError, match=words):
        processor.preprocess(video)


# --- loading and saving ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("compat", "configuration", "image_loading", "image_processing", "video_decoding", "video_processing"):
        shutil.copy(REPOSITORY / f"{name}_minicpmv.py", folder)
    shutil.copy(REPOSITORY / "config.json", folder)
    settings = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
            "AutoVideoProcessor": "video_processing_minicpmv.MiniCPMVVideoProcessor",
        },
        "max_slice_nums": 9,
        "use_image_id": True,
        "scale_resolution": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def auto_load(folder, **options):
    # `transformers.AutoVideoProcessor` is a dummy where torchvision is missing; processors load this one
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    return AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True, **options)


def test_settings_of_the_image_processor_leave_frames_whole(model_folder):
    for loaded in (auto_load(model_folder), video_processing.MiniCPMVVideoProcessor.from_pretrained(model_folder)):
        assert type(loaded).__name__ == "MiniCPMVVideoProcessor"
        assert (loaded.max_slice_nums, loaded.use_image_id, loaded.image_processor.scale_resolution) == (1, False, 224)
    assert auto_load(model_folder, max_slice_nums=2, fps=5).max_slice_nums == 2
    with pytest.raises(ValueError, match="scale_resolution=0"):
        auto_load(model_folder, scale_resolution=0)


def test_saving_leaves_the_image_settings_alone_and_loads_again(model_folder):
    before = (model_folder / "preprocessor_config.json").read_text()
    processor = auto_load(model_folder, fps=5, max_num_packing=6, max_slice_nums=2)
    processor.save_pretrained(model_folder)
    assert (model_folder / "preprocessor_config.json").read_text() == before
    saved = json.loads((model_folder / "video_preprocessor_config.json").read_text())
    assert "image_processor_type" not in saved
    assert saved["auto_map"]["AutoVideoProcessor"] == "video_processing_minicpmv.MiniCPMVVideoProcessor"
    again = auto_load(model_folder)
    assert (again.fps, again.max_num_packing, again.max_slice_nums) == (5, 6, 2)
    assert (again.image_processor.max_slice_nums, again.image_processor.scale_resolution) == (2, 224)
    assert again.to_dict() == processor.to_dict()


def test_settings_do_not_depend_on_optional_packages():
    transformers_imports = importlib.import_module("transformers.dynamic_module_utils").get_imports
    for name in ("video_processing", "video_decoding", "image_processing", "image_loading", "messages", "processing"):
        needed = set(transformers_imports(REPOSITORY / f"{name}_minicpmv.py")) - set(sys.stdlib_module_names)
        assert needed <= {"numpy", "PIL", "tokenizers", "torch", "transformers"}


def test_it_is_a_video_processor_of_transformers_without_torchvision(processor):
    base = importlib.import_module("transformers.video_processing_utils").BaseVideoProcessor
    assert isinstance(processor, base)
    assert json.loads(processor.to_json_string())["fps"] == 3


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size, frames, words",
    [((4000, 4000), 40, "more than 536870912 pixels"), ((10_000, 10_000), 2, "MAX_IMAGE_PIXELS")],
)
def test_an_animation_of_too_many_pixels_is_refused_before_it_is_decoded(processor, size, frames, words):
    header = b"GIF89a" + struct.pack("<HH", *size) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    with pytest.raises(VideoInputError, match=words):
        processor.sample_video(header + frame * frames + b"\x3b")


def test_a_video_of_too_large_frames_is_refused_before_it_is_decoded(processor, clips, monkeypatch):
    monkeypatch.setattr(video_decoding, "FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoInputError, match="64 x 48 have more than 3071 pixels"):
        processor.sample_video(clips / "count.mp4")
