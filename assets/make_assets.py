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

from minicpmv.drawn.drawing import COLORS, Drawing, Print, add_shape, add_text  # noqa: E402


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
        style = Print("aileron", True, height // 2)
        corner = ((width - style.width(text)) / 2, height * 0.16)
        add_text(drawing, text, "blue", corner, style, COLORS["blue"])
    return with_grain(drawing.image.resize(size, Image.Resampling.LANCZOS), seed)


def paper(size, lines, points, seed, margin=0.06):
    """Black print on paper: `lines`, each a text, or a text at the left and one at the right edge."""
    width, height = (SMOOTH * side for side in size)
    drawing = Drawing(lit_backdrop((width, height), (236, 234, 228), (236, 234, 228)), Image.new("L", (width, height)))
    style = Print("mono", False, SMOOTH * points)
    pitch = height / (len(lines) + 0.6)
    for i, line in enumerate(lines):
        y = pitch * (i + 0.3)
        left, *right = line if isinstance(line, tuple) else (line,)
        add_text(drawing, left, "neutral", (margin * width, y), style, (20, 20, 20))
        for text in right:
            add_text(drawing, text, "neutral", ((1 - margin) * width - style.width(text), y), style, (20, 20, 20))
    return with_grain(drawing.image.resize(size, Image.Resampling.LANCZOS), seed)


def moving_star(size, frames=60, radius=48):
    """A red star that crosses the picture from left to right, a little beyond both edges."""
    begin, end = 0.7 * radius, size[0] - 0.7 * radius
    for i in range(frames):
        place = (begin + (end - begin) * i / (frames - 1), 0.5 * size[1])
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
    entries = [("TABLE:", "47"), ("DATE:", "21/11"), ("TIME:", "18:05"), ("TOTAL:", "12.50")]
    paper((220, 170), entries, points=24, seed=3).save(HERE / "receipt.jpg", quality=92)
    paper((200, 64), ["7+5-3+8"], points=34, seed=4).save(HERE / "sum.jpg", quality=92)
    write_clip(HERE / "star.mp4", (320, 240), moving_star((320, 240)))


if __name__ == "__main__":
    main()
