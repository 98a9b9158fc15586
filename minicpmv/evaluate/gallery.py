"""Small pictures of the first mistakes of each row, kept while a run is under way, so that a report needs no data set."""

from pathlib import Path

from PIL import Image

from minicpmv.evaluate.answerers import Question
from minicpmv.evaluate.benchmark import Entry, main_score


PICTURES = 12  # of each row
SIDE = 448  # pixels of the longer side
FOLDER = "pictures"


def keep_picture(question: Question, entry: Entry, output: Path) -> str | None:
    """Store the first picture of a question that was not answered rightly; returns its place below the run's folder."""
    row, seed, index = question.row.id, question.key.seed, question.key.index
    picture = next((part for part in question.prompt.content if isinstance(part, Image.Image)), None)
    if picture is None or main_score(entry["scores"]) == 1:
        return None
    folder = output / FOLDER
    if len(list(folder.glob(f"{row}-*.jpg"))) >= PICTURES:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"{row}-{seed}-{index}.jpg"
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(path, quality=80)
    return f"{FOLDER}/{path.name}"
