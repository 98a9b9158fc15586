"""Slicing geometry, loading and the image processor."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import pickle
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import FIXTURES, REPOSITORY, ground_floor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from transformers.models.auto.image_processing_auto import AutoImageProcessor


image_loading = ground_floor("image_loading_minicpmv")
image_processing = ground_floor("image_processing_minicpmv")
ImageInputError, load_image = image_loading.ImageInputError, image_loading.load_image
FramePackingError = image_processing.FramePackingError
MiniCPMVImageProcessor = image_processing.MiniCPMVImageProcessor
best_resize, slice_grid = image_processing.best_resize, image_processing.slice_grid
pack_frames, slice_layout = image_processing.pack_frames, image_processing.slice_layout


SIZES = st.tuples(st.integers(1, 9000), st.integers(1, 9000))
LIMITS = st.integers(1, 40)


@pytest.fixture(scope="module")
def processor():
    return MiniCPMVImageProcessor()


@pytest.fixture(scope="module")
def tiny():
    """Settings of a small sibling checkpoint: nothing may rely on 448, 14 or 64."""
    return MiniCPMVImageProcessor(scale_resolution=32, patch_size=4, image_feature_size=5, max_slice_nums=4)


def wave(width, height, k=0):
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 127.5 + 127.5 * np.sin(x / (7 + k) + y / (11 + 2 * k))
    green = 127.5 + 127.5 * np.cos(x * y / (5000 + 997 * k))
    blue = (x * 3 + y * 5 + k * 17) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image, **options):
    return np.asarray(load_image(image, **options))


# Geometry


def test_slicing_matches_the_reference_on_every_measured_size():
    cases = json.loads((FIXTURES / "slicing.json").read_text())
    assert len(cases) == 240
    for case in cases:
        layout = slice_layout(tuple(case["size"]), case["max_slice_nums"])
        expected = [case.get(key) for key in ("grid", "source", "refine", "slice")]
        got = [layout.grid, layout.source, layout.refined, layout.slice]
        assert got == [None if size is None else tuple(size) for size in expected], case


@given(SIZES, LIMITS, st.sampled_from([(448, 14), (32, 4), (56, 14), (100, 7)]))
def test_every_side_is_whole_in_patches_and_slices_are_equal(size, limit, resolution_and_patch):
    layout = slice_layout(size, limit, *resolution_and_patch)
    patch_size = resolution_and_patch[1]
    for view in (layout.source, layout.slice, layout.refined):
        assert view is None or (min(view) >= patch_size and view[0] % patch_size == view[1] % patch_size == 0)
    if layout.grid is None:
        assert layout.num_slices == 1
    else:
        columns, rows = layout.grid
        assert layout.refined == (columns * layout.slice[0], rows * layout.slice[1])
        assert 2 <= columns * rows <= limit


@given(SIZES, LIMITS)
def test_turning_a_picture_turns_its_grid_or_finds_one_as_near(size, limit):
    grid, turned = slice_grid(size, limit), slice_grid(size[::-1], limit)
    if grid is None:
        assert turned is None
    else:
        aspect = math.log(size[0] / size[1])
        assert abs(aspect - math.log(grid[0] / grid[1])) == pytest.approx(
            abs(-aspect - math.log(turned[0] / turned[1])), abs=1e-9
        )


@given(SIZES)
def test_one_slice_means_no_slicing(size):
    assert slice_grid(size, 1) is None


@given(st.integers(448, 9000), st.integers(448, 9000))
def test_resized_area_stays_near_the_wanted_area(width, height):
    resized = best_resize((width, height), 448, 14)
    assert 0.75 * 448**2 < resized[0] * resized[1] < 1.25 * 448**2


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_empty_size_is_refused(size):
    with pytest.raises(ImageInputError, match="at least 1"):
        slice_layout(size)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 150), st.integers(1, 150)), st.integers(1, 9), st.booleans())
def test_placeholder_counts_equal_pixel_slices(size, limit, use_image_id):
    processor = MiniCPMVImageProcessor(scale_resolution=32, patch_size=4, image_feature_size=5)
    sliced = processor.slice_all_to_patches([Image.new("RGB", size)], limit)[0]
    text = processor.get_slice_image_placeholder(size, 3, limit, use_image_id)
    assert len(sliced.pixel_values) == text.count("<image>") + text.count("<slice>")
    assert len(sliced.pixel_values) == processor.get_number_of_image_patches(
        size[1], size[0], {"max_slice_nums": limit}
    )
    assert text.count("<unk>") == 5 * len(sliced.pixel_values)
    assert text.startswith("<image_id>3</image_id>") == use_image_id
    for strip, (rows, columns) in zip(sliced.pixel_values, sliced.tgt_sizes, strict=True):
        assert strip.shape == (3, 4, 4 * rows * columns)


def test_placeholder_layout(processor):
    unit = "<unk>" * 64
    source, piece = f"<image>{unit}</image>", f"<slice>{unit}</slice>"
    assert processor.get_slice_image_placeholder((300, 200)) == "<image_id>0</image_id>" + source
    expected = f"<image_id>2</image_id>{source}{piece}{piece}\n{piece}{piece}"
    assert processor.get_slice_image_placeholder((1000, 700), 2, 9, True) == expected
    assert processor.get_slice_image_placeholder(torch.tensor([1000, 700]), image_idx=2) == expected
    assert processor.get_slice_image_placeholder((1000, 700), 2, 1, False) == source


def test_grid_is_columns_by_rows(processor):
    assert processor.get_sliced_grid((1600, 400)) == (4, 1)
    assert processor.get_sliced_grid((400, 1600)) == (1, 4)
    assert processor.get_sliced_grid((1600, 400), max_slice_nums=1) is None
    assert MiniCPMVImageProcessor(slice_mode=False).get_sliced_grid((1600, 400)) is None


# Pixels


@pytest.mark.parametrize(
    "case", json.loads((FIXTURES / "pixels.json").read_text()), ids=lambda case: str(case["size"])
)
def test_pixels_match_the_reference(processor, case):
    measured = np.load(FIXTURES / "pixels.npz")
    out = processor(wave(*case["size"], case["k"]), return_tensors="pt")
    assert out["image_sizes"] == [[tuple(case["size"])]]
    assert out["tgt_sizes"][0].tolist() == case["tgt_sizes"]
    strips = out["pixel_values"][0]
    assert [list(strip.shape) for strip in strips] == case["shapes"]
    for number, strip in enumerate(strips):
        name = f"{case['k']}_{number}"
        assert strip.dtype == torch.float32 and strip.is_contiguous()
        assert np.abs(strip[..., :28].numpy() - measured[f"{name}_head"]).max() < 1e-6
        assert np.abs(strip[..., -28:].numpy() - measured[f"{name}_tail"]).max() < 1e-6
        assert strip.double().mean().item() == pytest.approx(case["means"][number], abs=1e-6)
        assert strip.double().abs().sum().item() == pytest.approx(case["abs_sums"][number], rel=1e-6)


def test_strips_are_the_patches_of_equal_cuts_row_by_row(tiny):
    image = wave(90, 50)
    sliced = tiny.slice_all_to_patches([image])[0]
    (columns, rows), side = sliced.grid, tiny.patch_size
    tall, wide = sliced.tgt_sizes[1]
    refined = image.resize((columns * wide * side, rows * tall * side), Image.Resampling.BICUBIC)
    views = [image.resize((sliced.tgt_sizes[0][1] * side, sliced.tgt_sizes[0][0] * side), Image.Resampling.BICUBIC)]
    views += [
        refined.crop((x * wide * side, y * tall * side, (x + 1) * wide * side, (y + 1) * tall * side))
        for y in range(rows)
        for x in range(columns)
    ]
    assert len(views) == len(sliced.pixel_values) == 4
    for view, strip in zip(views, sliced.pixel_values, strict=True):
        pixels = np.asarray(view, np.float32) / 127.5 - 1
        patches = [
            pixels[y : y + side, x : x + side] for y in range(0, view.height, side) for x in range(0, view.width, side)
        ]
        np.testing.assert_allclose(strip.numpy(), np.concatenate(patches, 1).transpose(2, 0, 1), atol=1e-6)


def test_tall_pictures_have_the_pixels_of_pillow_9_to_12_whose_first_pass_is_horizontal():
    values = np.arange(400 * 900 * 3, dtype=np.uint64) * np.uint64(2654435761)
    noise = ((values >> np.uint64(13)) % np.uint64(256)).astype(np.uint8).reshape(900, 400, 3)
    for picture, size, digest in (
        (noise, (448, 448), "17f2869aad1e8742"),
        (noise.reshape(400, 900, 3), (448, 448), "3b5dee69056ed991"),
    ):
        resized = image_processing.resize_bicubic(Image.fromarray(picture), size)
        assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == digest  # measured with Pillow 9.4 and 12.3


def test_mean_and_std_of_each_channel_are_used():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]
    processor = MiniCPMVImageProcessor(norm_mean=mean, norm_std=std)
    strip = processor.slice_all_to_patches([Image.new("RGB", (448, 448), (255, 0, 51))])[0].pixel_values[0]
    expected = [(value / 255 - m) / s for value, m, s in zip((255, 0, 51), mean, std, strict=True)]
    assert strip.amax((1, 2)).tolist() == pytest.approx(expected, abs=1e-6)


def test_threads_and_order_do_not_change_the_result(tiny):
    images = [wave(20 + 7 * k, 60 - k, k) for k in range(20)]  # more than one block of memory
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = tiny.slice_all_to_patches(images)
    finally:
        torch.set_num_threads(threads)
    for image, sliced in zip(images, together, strict=True):
        alone = tiny.slice_all_to_patches([image])[0]
        assert (sliced.image_size, sliced.grid, sliced.tgt_sizes) == (alone.image_size, alone.grid, alone.tgt_sizes)
        assert all(map(torch.equal, sliced.pixel_values, alone.pixel_values))


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (3, 5000), (5000, 3), (1, 5000), (449, 448), (448, 4032), (365, 211), (1084, 820)]
)
def test_odd_sizes(processor, size):
    sliced = processor.slice_all_to_patches([Image.new("RGB", size)])[0]
    assert sliced.image_size == size
    assert len(sliced.pixel_values) == processor.get_slice_image_placeholder(size).count("</") - 1
    for strip, (rows, columns) in zip(sliced.pixel_values, sliced.tgt_sizes, strict=True):
        assert strip.shape == (3, 14, 14 * rows * columns)
        assert (strip == -1).all()


def test_large_picture(processor):
    sliced = processor.slice_all_to_patches([Image.new("RGB", (8000, 8000), "white")])[0]
    assert sliced.grid == (3, 3) and len(sliced.pixel_values) == 10
    assert (sliced.pixel_values[9] == 1).all()


# Loading


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_alpha_convert_as_pillow_does(mode):
    image = Image.new("LAB", (30, 20), (200, 30, 90)) if mode == "LAB" else wave(30, 20).convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_lies_over_the_background(mode):
    rgba = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 2, 2))
    image = rgba.convert("LA").convert("La") if mode == "La" else rgba.convert(mode)
    assert image.mode == mode
    got = pixels(image)
    assert (got[:, :2] == 0).all() and (got[:, 2:] == 255).all()
    assert (pixels(image, background_color=(10, 20, 30))[:, 2:] == (10, 20, 30)).all()


def test_half_transparent_pixels_are_mixed_and_the_reference_drops_alpha():
    image = Image.new("RGBA", (2, 2), (200, 100, 0, 128))
    expected = [round(value * 128 / 255 + 127) for value in (200, 100, 0)]
    assert np.abs(pixels(image).astype(int) - expected).max() <= 1
    assert (pixels(image, background_color=None) == (200, 100, 0)).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_of_a_png_lies_over_white(mode):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 1)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    data = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert pixels(data)[0, 0].tolist() == [255] * 3
    assert pixels(data)[0, 1].tolist() == ([1] * 3 if mode == "L" else [9] * 3)
    assert pixels(data, background_color=None)[0, 0].tolist() == [0] * 3


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I", "png", "F"])
def test_deep_greys_are_scaled_to_8_bits(mode):
    values = np.array([[0, 257, 32896, 65535]])
    if mode == "png":
        image = encoded(Image.fromarray(values.astype(np.uint16)))
    elif mode == "F":
        image = Image.fromarray((values / 65535).astype(np.float32))
    elif mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    else:
        image = Image.frombytes(mode, (4, 1), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert pixels(image)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (32, 16, 48, 32))
    # a camera stores the picture so that the tag's transform makes it upright: store the inverse
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encoded(stored, format, exif=exif, **options)
    got = load_image(data)
    assert got.size == (48, 32)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(upright)).max() < 40
    once = load_image(data)
    assert load_image(once).tobytes() == once.tobytes() and load_image(once).size == once.size
    assert load_image(data, do_exif_transpose=False).size == stored.size
    assert MiniCPMVImageProcessor(do_exif_transpose=False).slice_all_to_patches([data])[0].image_size == stored.size


def test_unreadable_exif_leaves_the_picture_as_stored():
    data = encoded(wave(30, 20), "PNG")
    image = Image.open(io.BytesIO(data))
    image.info["exif"] = b"Exif\x00\x00not a tiff header"
    assert load_image(image).size == (30, 20)


def test_paths_bytes_and_data_urls_agree(tmp_path):
    image = wave(30, 20)
    data = encoded(image)
    path = tmp_path / "picture with spaces.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    wrapped = "data:image/png;base64," + base64.encodebytes(data).decode()
    for source in (image, path, str(path), data, bytearray(data), memoryview(data), url, percent, wrapped):
        assert np.array_equal(pixels(source), np.asarray(image))


class PictureServer(BaseHTTPRequestHandler):
    """Gives a picture with a transparent pixel, a page for any other path, or something that does not end."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        body = encoded(Image.fromarray(np.array([[[9, 8, 7, 255], [0, 0, 0, 0]]], np.uint8)))
        self.wfile.write(body if self.path == "/picture.png" else b"<html>Something else</html>")
        while self.path == "/endless":
            try:
                self.wfile.write(b"x" * 2**14)
            except OSError:
                return
        while self.path == "/dripping":
            try:
                self.wfile.write(b"x")
                time.sleep(0.02)
            except OSError:
                return

    def log_message(self, *args):
        pass


@pytest.fixture
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_picture_at_an_address_is_as_if_it_were_a_file(address):
    assert pixels(f"{address}/picture.png").tolist() == [[[9, 8, 7], [255] * 3]]
    with pytest.raises(ImageInputError, match=f"{address}/page: not an image.*perhaps a page of text"):
        load_image(f"{address}/page")


def test_a_download_ends_at_a_size_and_after_a_time(address, monkeypatch):
    monkeypatch.setattr(image_loading, "FETCH_BYTES", 2**20)
    with pytest.raises(ImageInputError, match=f"{address}/endless: more than 1048576 bytes"):
        load_image(f"{address}/endless")
    monkeypatch.setattr(image_loading, "FETCH_SECONDS", 0.2)
    with pytest.raises(ImageInputError, match="0.2 seconds; download it"):
        load_image(f"{address}/dripping")


def test_an_address_without_an_answer_is_said_so(monkeypatch):
    monkeypatch.setattr(image_loading, "FETCH_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/late.jpg"
        with pytest.raises(ImageInputError, match=f"{address}: cannot be fetched.*timed out"):
            load_image(address)
        silent.close()
        with pytest.raises(ImageInputError, match=f"{address}: cannot be fetched.*give the file"):
            load_image(address)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageInputError, match="not a file"):
        load_image(tmp_path / "pipe.png")


def test_formats_whose_readers_start_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageInputError, match="not an image in a format"):
        load_image(script)


def test_arrays_and_tensors_agree_with_pillow():
    image = wave(30, 20)
    hwc = np.asarray(image)
    chw = np.ascontiguousarray(hwc.transpose(2, 0, 1))
    tensor = torch.from_numpy(chw.copy())
    for source in (
        hwc,
        chw,
        hwc[:, ::-1][:, ::-1],
        hwc / 255.0,
        (hwc / 255).astype(np.float32),
        hwc.astype(np.uint16) * 257,
        tensor,
        tensor.permute(1, 2, 0),
        tensor / 255,
        (tensor / 255).double().requires_grad_(),
    ):
        assert np.array_equal(pixels(source), hwc)
    assert np.abs(pixels((tensor / 255).bfloat16()).astype(int) - hwc).max() <= 1
    grey = hwc[..., 0]
    for source in (
        grey,
        grey[..., None],
        grey[None],
        torch.from_numpy(grey.copy()),
        torch.from_numpy(grey[None].copy()),
    ):
        assert np.array_equal(pixels(source), np.stack([grey] * 3, -1))
    assert pixels(np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]
    assert pixels(np.zeros((2, 2, 4), np.uint8)).tolist() == [[[255] * 3] * 2] * 2  # transparent


def test_axes_in_doubt_follow_the_type_or_the_argument():
    shape = (3, 5, 3)
    assert load_image(np.zeros(shape, np.uint8)).size == (5, 3)
    assert load_image(torch.zeros(shape, dtype=torch.uint8)).size == (3, 5)
    assert load_image(np.zeros(shape, np.uint8), input_data_format="channels_first").size == (3, 5)
    assert load_image(torch.zeros(shape), input_data_format="channels_last").size == (5, 3)
    with pytest.raises(ImageInputError, match="channels_first"):
        load_image(np.zeros(shape, np.uint8), input_data_format="sideways")


def jpeg_cut_short():
    data = encoded(wave(200, 200), "JPEG")
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "NoneType"),
        (3, "type int"),
        ({"type": "image"}, "type dict"),
        ("no/such/picture.png", "no such file"),
        ("x" * 5000, "no such file"),
        (REPOSITORY, "not a file"),
        ("data:image/png;base64,é", "base64"),
        (b"", "not an image"),
        (b"plain text", "not an image"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@", "base64"),
        (encoded(wave(200, 200))[:3000], "truncated"),
        (jpeg_cut_short(), "truncated"),
        (Image.new("RGB", (0, 5)), "0 x 5"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((2, 4, 4, 3), np.uint8), "list"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), "not one image"),
        (np.zeros((7, 8, 9), np.uint8), "1 to 4 channels"),
        (np.zeros(5, np.uint8), "not one image"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), complex), "complex128"),
        (torch.zeros(4, 4, dtype=torch.int32), "int32"),
        (np.full((4, 4, 3), 128.0), "128"),
        (np.full((4, 4, 3), -0.5), "-0.5"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "70000"),
    ],
)
def test_unusable_pictures_are_named(source, message):
    with pytest.raises(ImageInputError, match=message):
        load_image(source)


def test_lazy_broken_picture_is_named():
    with pytest.raises(ImageInputError, match="truncated"):
        load_image(Image.open(io.BytesIO(jpeg_cut_short())))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11, 30])  # Pillow itself warns from the limit on, and refuses twice as much
def test_a_file_of_too_many_pixels_is_refused(monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageInputError, match="MAX_IMAGE_PIXELS for a source you trust"):
        load_image(encoded(Image.new("RGB", (side, side))))
    assert load_image(Image.new("RGB", (side, side))).size == (side, side)  # in memory already
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(encoded(Image.new("RGB", (side, side)))).size == (side, side)


def test_wrong_facts_about_a_picture_cost_no_more_than_the_picture():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nnot hexadecimal")
    assert load_image(encoded(wave(30, 20), pnginfo=info)).size == (30, 20)
    image = wave(30, 20)
    image.info["transparency"] = "no color"
    with pytest.raises(ImageInputError, match="cannot be decoded"):
        load_image(image)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own about damaged TIFF tags
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.data())
def test_damaged_files_give_a_picture_or_the_typed_error(format, data):
    damaged = bytearray(encoded(wave(16, 12), format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(damaged))
    except ImageInputError:
        return
    assert image.mode == "RGB"


# Packing


def test_packed_slices_are_ordered_by_position_across_the_frames(processor):
    frames = [processor.slice_all_to_patches([wave(900, 500, k)], 2)[0] for k in range(4)]
    pixel_values, tgt_sizes, unit_ids = pack_frames(frames, [[0, 5], [10, 15]])
    assert unit_ids == [[0, 5]] * 3 + [[10, 15]] * 3
    assert tgt_sizes == ([(24, 43)] * 2 + [(34, 30)] * 4) * 2
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2)]
    for strip, (frame, position) in zip(pixel_values, order, strict=True):
        assert strip is frames[frame].pixel_values[position]


def test_stills_and_groups_mix(tiny):
    frames = [tiny.slice_all_to_patches([wave(90, 50)])[0]] + [
        tiny.slice_all_to_patches([wave(20, 20, k)], 1)[0] for k in range(3)
    ]
    pixel_values, tgt_sizes, unit_ids = pack_frames(frames, [[-1], [0, 1], [2]])
    assert unit_ids == [[-1]] * 4 + [[0, 1], [2]]
    assert len(pixel_values) == len(tgt_sizes) == 7
    assert pack_frames([], []) == ([], [], [])


def test_groups_of_different_shapes_do_not_pack(tiny):
    frames = [tiny.slice_all_to_patches([Image.new("RGB", size)])[0] for size in ((20, 20), (20, 20), (90, 50))]
    with pytest.raises(FramePackingError, match="different shapes"):
        pack_frames(frames, [[0, 1, 2]])


@pytest.mark.parametrize(
    "temporal_ids, message",
    [
        ([[0, 1]], "2 ids, but there are 3 images"),
        ([[0, 1], [2, 3]], "4 ids, but there are 3 images"),
        ([[0, 1], [-1, 2]], "0 or more"),
        ([[0, 1], [2], []], "0 or more"),
        ([[0, 1], [-2]], "0 or more"),
        ([0, 1, 2], "list of groups"),
        (7, "list of groups"),
        ("012", "list of groups"),
        ([[0, 1], [2.5]], "whole numbers"),
        ([[0, 1], [None]], "whole numbers"),
        ([[0], ["1", 2]], "whole numbers"),
    ],
)
def test_bad_temporal_ids_are_named(temporal_ids, message):
    for samples, counts in ((temporal_ids, [3]), ([temporal_ids, None], [3, 1])):
        with pytest.raises(FramePackingError, match=message):
            image_processing.read_groups(samples, counts)


# preprocess


def test_picture_list_and_batch(tiny):
    a, b = wave(20, 20), wave(90, 50)
    for images, sizes in (
        (a, [[(20, 20)]]),
        ([a, b], [[(20, 20), (90, 50)]]),
        ((a, b), [[(20, 20), (90, 50)]]),
        ([[a], [b, a]], [[(20, 20)], [(90, 50), (20, 20)]]),
        ([[a], []], [[(20, 20)], []]),
        ([[]], [[]]),
        ([], [[]]),
    ):
        out = tiny(images, do_pad=True, return_tensors="pt", unknown_argument=1)
        assert set(out) == {"pixel_values", "image_sizes", "tgt_sizes", "temporal_ids"}
        assert out["image_sizes"] == sizes
        for strips, tgt_sizes, units in zip(out["pixel_values"], out["tgt_sizes"], out["temporal_ids"], strict=True):
            assert tgt_sizes.dtype == torch.int64 and tgt_sizes.shape == (len(strips), 2)
            assert units == [[-1]] * len(strips)


def test_mixed_nesting_is_refused(tiny):
    with pytest.raises(ImageInputError, match="one list a sample"):
        tiny([wave(20, 20), [wave(20, 20)]])


def test_temporal_ids_for_a_sample_and_for_a_batch(tiny):
    frames = [wave(20, 20, k) for k in range(3)]
    one = tiny(frames, max_slice_nums=1, temporal_ids=[[0, 1], [2]])
    assert one["temporal_ids"] == [[[0, 1], [2]]] == tiny([frames], temporal_ids=[[[0, 1], [2]]])["temporal_ids"]
    batch = tiny([frames, frames[:1], [], []], temporal_ids=[[[0, 1, 2]], [[-1]], [], None])
    assert batch["temporal_ids"] == [[[0, 1, 2]], [[-1]], [], []]
    assert tiny([[], []], temporal_ids=[[], []])["temporal_ids"] == [[], []]
    assert tiny([], temporal_ids=[])["temporal_ids"] == [[]]
    for groups in (
        [np.array([0, 1]), np.array([2])],
        [[np.int64(0), np.int64(1)], (2,)],
        [[[0, 1], torch.tensor([2])]],
    ):
        assert tiny(frames, temporal_ids=groups)["temporal_ids"] == [[[0, 1], [2]]]
    with pytest.raises(FramePackingError, match="each of 2 samples"):
        tiny([frames, frames], temporal_ids=[[0, 1, 2]])


def test_an_array_of_several_pictures_is_its_pictures(tiny):
    clip = np.stack([np.asarray(wave(20, 20, k)) for k in range(3)])
    expected = tiny([Image.fromarray(frame) for frame in clip])
    for images in (clip, [clip], [[clip]], torch.from_numpy(clip.transpose(0, 3, 1, 2).copy())):
        assert all(map(torch.equal, tiny(images)["pixel_values"][0], expected["pixel_values"][0]))
    assert tiny([[clip], [clip[0], clip]])["image_sizes"] == [[(20, 20)] * 3, [(20, 20)] * 4]


def test_max_slice_nums_of_a_call_wins(tiny):
    assert len(tiny(wave(90, 50))["pixel_values"][0]) == 4
    assert len(tiny(wave(90, 50), max_slice_nums=1)["pixel_values"][0]) == 1
    with pytest.raises(ValueError, match="max_slice_nums=0"):
        tiny(wave(90, 50), max_slice_nums=0)


def test_return_tensors(tiny):
    for kind in (None, "pt"):
        assert isinstance(tiny(wave(20, 20), return_tensors=kind)["pixel_values"][0][0], torch.Tensor)
    out = tiny(wave(20, 20), return_tensors="np")
    assert isinstance(out["pixel_values"][0][0], np.ndarray) and isinstance(out["tgt_sizes"][0], np.ndarray)
    with pytest.raises(ValueError, match="'tf'"):
        tiny(wave(20, 20), return_tensors="tf")


def test_to_casts_nested_floats_and_leaves_integers(tiny):
    out = tiny([[wave(90, 50)], []])
    assert out.to(torch.bfloat16) is out
    assert {strip.dtype for strip in out["pixel_values"][0]} == {torch.bfloat16}
    assert out["tgt_sizes"][0].dtype == torch.int64
    for arguments in (("meta",), (torch.device("meta"), torch.float16)):
        moved = tiny(wave(90, 50)).to(*arguments)
        assert moved["pixel_values"][0][0].is_meta and moved["tgt_sizes"][0].is_meta
        assert moved["image_sizes"] == [[(90, 50)]]
    assert tiny(wave(9, 9)).to(device="meta", dtype=torch.float16)["pixel_values"][0][0].dtype == torch.float16


# Settings


def test_repository_settings_are_the_defaults():
    loaded = MiniCPMVImageProcessor.from_pretrained(REPOSITORY)
    published = json.loads((REPOSITORY / "preprocessor_config.json").read_text())
    assert {key: getattr(loaded, key) for key in published if hasattr(loaded, key)}.items() <= published.items()
    fresh = MiniCPMVImageProcessor().to_dict()
    assert {key: loaded.to_dict()[key] for key in fresh if not key.startswith("_")}.items() <= fresh.items()
    assert published["auto_map"]["AutoImageProcessor"] == "image_processing_minicpmv.MiniCPMVImageProcessor"


def test_auto_class_loads_the_repository():
    loaded = AutoImageProcessor.from_pretrained(REPOSITORY, trust_remote_code=True, max_slice_nums=2)
    assert type(loaded).__name__ == "MiniCPMVImageProcessor" and loaded.max_slice_nums == 2


def test_names_other_code_reads(processor):
    assert (processor.im_start_token, processor.im_end_token, processor.unk_token) == ("<image>", "</image>", "<unk>")
    assert (processor.slice_start_token, processor.slice_end_token) == ("<slice>", "</slice>")
    assert (processor.im_id_start, processor.im_id_end) == ("<image_id>", "</image_id>")
    assert list(processor.mean) == list(processor.image_std) == [0.5] * 3


def test_settings_survive_saving(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    loaded = MiniCPMVImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == tiny.to_dict()
    image = wave(90, 50)
    assert all(map(torch.equal, loaded(image)["pixel_values"][0], tiny(image)["pixel_values"][0]))
    assert pickle.loads(pickle.dumps(tiny)).to_dict() == tiny.to_dict()


def test_settings_are_overridden_on_loading(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    changes = {"max_slice_nums": 1, "scale_resolution": 56, "image_feature_size": 7, "image_mean": [0.1, 0.2, 0.3]}
    loaded = MiniCPMVImageProcessor.from_pretrained(tmp_path, **changes, background_color=None)
    assert {key: getattr(loaded, key) for key in changes} == changes
    assert loaded.background_color is None
    with pytest.raises(ValueError, match="patch_size=-1"):
        MiniCPMVImageProcessor.from_pretrained(tmp_path, patch_size=-1)


def test_dropping_alpha_survives_saving(tmp_path):
    MiniCPMVImageProcessor(background_color=None, do_exif_transpose=False).save_pretrained(tmp_path)
    loaded = MiniCPMVImageProcessor.from_pretrained(tmp_path)
    assert loaded.background_color is None and loaded.do_exif_transpose is False


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_slice_nums": 0},
        {"max_slice_nums": 2.5},
        {"max_slice_nums": True},
        {"patch_size": "14"},
        {"scale_resolution": -448},
        {"image_feature_size": 0},
        {"norm_mean": [0.5]},
        {"norm_mean": 0.5},
        {"norm_std": [0.5, 0.5, 0.0]},
        {"norm_std": [0.5, 0.5, "x"]},
        {"background_color": (0, 0, 256)},
        {"scale_resolution": 8, "patch_size": 14},
    ],
)
def test_bad_settings_are_named(settings_):
    name, _value = next(iter(settings_.items()))
    with pytest.raises(ValueError, match=name):
        MiniCPMVImageProcessor(**settings_)
