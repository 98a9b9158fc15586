"""Draw the self-made files of this folder: python assets/make_assets.py (needs PyAV for the clip).

They show what nano knows, in the drawing style of `minicpmv.data`, as a camera might: lit unevenly, with grain, as JPEG
and H.264. The same Pillow writes the same pictures.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minicpmv.data.drawing import COLORS, Drawing, add_shape, add_text, text_width  # noqa: E402


SMOOTH = 2  # everything is drawn twice as large and scaled down


def lit_backdrop(size, wall=(222, 220, 214), table=(196, 194, 190), horizon=0.72):
    """A wall above a table, brighter on the left: an RGB picture of `size` (width, height)."""
    width, height = size
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    color = np.where((y < horizon)[..., None], wall, table)
    light = 1.06 - 0.16 * x - 0.06 * y
    return Image.fromarray(np.clip(color * light[..., None], 0, 255).astype(np.uint8))


def with_grain(image, seed):
    """Grain as of a small sensor."""
    noise = np.random.default_rng(seed).normal(0, 3, (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def draw(size, seed, things=(), text=None):
    """Shapes `(kind, color, center, radius)` in pixels, or a `text`, on the backdrop."""
    width, height = (SMOOTH * side for side in size)
    drawing = Drawing(lit_backdrop((width, height)), Image.new("L", (width, height)))
    for kind, color, (x, y), radius in things:
        add_shape(drawing, kind, color, (SMOOTH * x, SMOOTH * y), SMOOTH * radius, COLORS[color])
    if text:
        points = height // 2
        corner = ((width - text_width(text, points, True)) / 2, height * 0.16)
        add_text(drawing, text, "blue", corner, points, True, COLORS["blue"])
    return with_grain(drawing.image.resize(size, Image.Resampling.LANCZOS), seed)


def moving_star(size, frames=60, radius=48):
    """A red star that crosses the picture from left to right."""
    room = size[0] - 2.4 * radius
    for i in range(frames):
        place = (1.2 * radius + room * i / (frames - 1), 0.5 * size[1])
        yield draw(size, seed=i, things=[("star", "red", place, radius)])


def write_clip(path, size, pictures, fps=30):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "26"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def main():
    shapes = draw(
        (640, 480),
        seed=1,
        things=[("circle", "red", (160, 240), 95), ("square", "blue", (480, 240), 95)],
    )
    shapes.save(HERE / "shapes.jpg", quality=88)
    draw((640, 480), seed=2, text="47").save(HERE / "number.jpg", quality=88)
    write_clip(HERE / "star.mp4", (320, 240), moving_star((320, 240)))


if __name__ == "__main__":
    main()
