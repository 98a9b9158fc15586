"""Pictures that nobody drew, for a model to say that it does not know them: textures out of noise, light and waves.

What is special:
- they stand for photographs without being any: real ones are left for testing;
- the kinds in UNSEEN are of the test split alone.
"""

import random

import numpy as np
from PIL import Image


Rng = np.random.Generator
Array = np.ndarray


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int, channels: int = 1) -> np.ndarray:
    """Noise of 0 to 1 in blobs, about `cells` of them across: float [height, width, channels]."""
    grid = (max(2, cells * size[1] // max(size)), max(2, cells * size[0] // max(size)))
    parts = []
    for _ in range(channels):
        coarse = Image.fromarray((rng.random(grid) * 255).astype(np.uint8))
        parts.append(np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255)
    return np.stack(parts, axis=-1)


def octaves(rng: np.random.Generator, size: tuple[int, int], first: int, channels: int = 1) -> np.ndarray:
    """Noise at four scales, each half as strong as the one before, stretched to 0 to 1."""
    total = sum(smooth_noise(rng, size, first * 2**i, channels) / 2**i for i in range(4))
    total = np.asarray(total)
    return (total - total.min()) / max(1e-6, float(total.max() - total.min()))


def shade(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """A field [height, width, 1] between two or three colors of any kind."""
    low, middle, high = rng.random((3, 3))
    return np.where(field < 0.5, low + (middle - low) * field * 2, middle + (high - middle) * (field * 2 - 1))


def clouds(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    return shade(rng, octaves(rng, size, int(rng.integers(2, 5))))


def colored_blobs(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    return octaves(rng, size, int(rng.integers(2, 5)), channels=3)


def wood(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    rings = x * rng.uniform(4, 12) + octaves(rng, size, 3)[..., 0] * rng.uniform(1, 4)
    return shade(rng, (np.sin(2 * np.pi * rings) * 0.5 + 0.5)[..., None]) * 0.7 + 0.1


def weave(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    across, along = rng.uniform(6, 20, 2)
    field = 0.5 + 0.25 * np.sin(2 * np.pi * across * x) + 0.25 * np.sin(2 * np.pi * along * y)
    return shade(rng, field[..., None]) * (0.8 + 0.2 * rng.random((*field.shape, 1)))


def landscape(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    sky, near = shade(rng, (1 - y)[..., None]), shade(rng, octaves(rng, size, 6))
    for depth in np.sort(rng.uniform(0.3, 0.8, int(rng.integers(1, 4)))):
        ridge = depth + 0.2 * (octaves(rng, (size[0], 2), 4)[0, :, 0] - 0.5)
        sky = np.where((y > ridge[None, :])[..., None], near * (0.4 + depth / 2), sky)
    return sky


def grain(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    return np.clip(octaves(rng, size, 2, 3) * 0.5 + rng.normal(0.25, 0.2, (size[1], size[0], 3)), 0, 1)


def marble(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    return shade(rng, np.abs(np.sin(3 * np.pi * (x + 2 * octaves(rng, size, 3)[..., 0])))[..., None])


def lights(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    image = shade(rng, octaves(rng, size, 2)) * 0.3
    for _ in range(int(rng.integers(6, 16))):
        far = (x - rng.random()) ** 2 + (y - rng.random()) ** 2
        image = image + np.exp(-far / rng.uniform(0.002, 0.02))[..., None] * rng.random(3) * 0.8
    return image


def leaves(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    points = rng.random((int(rng.integers(20, 60)), 2))
    far = np.stack([(x - u) ** 2 + (y - v) ** 2 for u, v in points])
    return rng.random((len(points), 3))[far.argmin(0)] * (0.3 + 0.7 * np.sqrt(far.min(0))[..., None] * 4)


def fruit(rng: Rng, size: tuple[int, int], x: Array, y: Array) -> Array:
    """Lit balls of any size on a cloth."""
    image = shade(rng, octaves(rng, size, 3)) * 0.6
    for _ in range(int(rng.integers(1, 6))):
        u, v, radius = rng.random(), rng.random(), rng.uniform(0.1, 0.35)
        far = np.sqrt((x - u) ** 2 + (y - v) ** 2) / radius
        light = np.clip(1.1 - np.sqrt((x - u + radius / 3) ** 2 + (y - v + radius / 3) ** 2) / radius * 0.7, 0, 1)
        cover = np.clip((1 - far) * 12, 0, 1)[..., None]
        image = image * (1 - cover) + cover * light[..., None] * rng.random(3)
    return image


SEEN = (clouds, colored_blobs, wood, weave, landscape, grain, leaves, fruit)
UNSEEN = (marble, lights)


def photo(rng: random.Random, size: tuple[int, int], split: str) -> Image.Image:
    """A texture of `size` (width, height)."""
    kind = rng.choice((*SEEN, *UNSEEN, *UNSEEN) if split == "test" else SEEN)
    noise = np.random.default_rng(rng.getrandbits(64))
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    pixels = kind(noise, size, x, y).clip(0, 1)
    grey = pixels.mean(axis=-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.choice((0.0, rng.random(), 1.0))  # black and white, pale, or as it is
    return Image.fromarray((pixels * 255).astype(np.uint8))
