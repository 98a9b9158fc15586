"""Scans put right before they are read: straightened, and with black ink on white paper.

What is special:
- both change nothing where they find nothing to change, such as an empty page;
- boxes that the model names afterwards belong to the repaired image.
"""

import numpy as np
from PIL import Image, ImageOps


LARGEST_SKEW = 15.0  # degrees; what seems more is a drawing or a photograph, not a crooked page
SMALLEST_SKEW = 0.3  # degrees; less cannot be told from none
MEASURED_SIDE = 1000  # pixels of the image in which the angle is measured
# Shares of the pixels, in percent, that may become quite black and quite white. Ink may be a small part of a page.
INK, PAPER = 0.05, 5
LEAST_RANGE = 24  # levels between paper and ink; less is the grain of an empty page


def straighten(image: Image.Image) -> tuple[Image.Image, float]:
    """An RGB page with its lines level, and the degrees (counter-clockwise) that it was turned by: 0 if none.

    Raises:
        ImportError: the package deskew is not installed.
    """
    from deskew import determine_skew

    grey = ImageOps.grayscale(image)
    grey.thumbnail((MEASURED_SIDE, MEASURED_SIDE))
    angle = determine_skew(
        np.asarray(grey), min_angle=-LARGEST_SKEW, max_angle=LARGEST_SKEW, min_deviation=SMALLEST_SKEW
    )
    if angle is None or abs(angle) < SMALLEST_SKEW:
        return image, 0.0
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor="white"), float(angle)


def raise_contrast(image: Image.Image) -> Image.Image:
    """An RGB page whose darkest pixels are black and whose paper is white, with its colors kept."""
    levels = np.asarray(ImageOps.grayscale(image))
    ink, paper = np.percentile(levels, [INK, 100 - PAPER])
    if paper - ink < LEAST_RANGE:
        return image
    return ImageOps.autocontrast(image, cutoff=(INK, PAPER), preserve_tone=True)
