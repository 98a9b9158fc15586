"""Small pictures of the first mistakes of each row, kept while a run is under way, so that a report needs no data set.

Of a video it is the first frame.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from minicpmv.evaluate.answerers import Question, is_video
from minicpmv.evaluate.benchmark import Entry, main_score


PICTURES = 12  # of each row
SIDE = 448  # pixels of the longer side
FOLDER = "pictures"


def keep_picture(question: Question, entry: Entry, output: Path) -> str | None:
    """Store the first picture of a question that was not answered rightly; returns its place below the run's folder."""
    row, seed, index = question.row.id, question.key.seed, question.key.index
    folder = output / FOLDER
    if main_score(entry["scores"]) == 1 or len(list(folder.glob(f"{row}-*.jpg"))) >= PICTURES:
        return None
    picture = next(filter(None, map(first_picture, question.prompt.content)), None)
    if picture is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row}-{seed}-{index}.jpg"
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(path, quality=80)
    return f"{FOLDER}/{path.name}"


def first_picture(part: Any) -> Image.Image | None:
    """An image that is a part of a message, or the first frame of a video in a file."""
    if isinstance(part, Image.Image):
        return part
    if not (is_video(part) and isinstance(part["video"], str) and Path(part["video"]).is_file()):
        return None
    import av

    with av.open(part["video"]) as container:
        return next((frame.to_image() for frame in container.decode(video=0)), None)
