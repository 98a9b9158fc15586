"""The images and the clip that come with the repository, and questions about them that nano can answer.

They lie in a clone only: an installed package has neither them nor nano.
"""

from pathlib import Path

from minicpmv.errors import MiniCPMVError


IMAGES = {
    "shapes.jpg": ("How many shapes are there?", "What color is the circle?", "What shape is on the right?"),
    "number.jpg": ("What does it say?",),
    "receipt.jpg": ("What is the DATE?", "What is the TOTAL?"),
}
PAIR = ("number.jpg", "shapes.jpg")
PAIR_QUESTIONS = ("What does the first picture say?", "What color is the square in the second picture?")
FIND = ("shapes.jpg", ("red circle", "blue square"))
PAGE = "receipt.jpg"
SUM = ("sum.jpg", "What is the result?")
CLIP = "star.mp4"
CLIP_QUESTIONS = ("Which way does the shape move?", "What color is the shape?")


class NoCloneError(MiniCPMVError):
    """The working directory is not in a clone of the repository."""


def find_clone() -> Path:
    """The clone that the working directory is in, or that the package was installed from in editable mode.

    Raises:
        NoCloneError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "assets" / CLIP).is_file() and (folder / "nano" / "config.json").is_file():
            return folder
    raise NoCloneError(
        f"{here} is not in a clone of the repository, which holds the example images and nano: run it there"
    )
