"""What COCO's annotations of 2014 say an image holds, which Object HalBench takes for the truth."""

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from minicpmv.evaluate.scoring.objects import objects_in_image


ANNOTATION_FILES = tuple(f"{kind}_{part}2014.json" for kind in ("captions", "instances") for part in ("train", "val"))


def objects_of_image(files: Iterable[Path], image_id: int) -> list[str]:
    """The objects of an image by its annotated instances and its captions, under COCO's names.

    Args:
        files: the four of `ANNOTATION_FILES`. They are read once; those of COCO take some seconds and a few GB.
    """
    categories, captions = _annotations(tuple(files))
    return objects_in_image(sorted(categories[image_id]), captions[image_id])


@lru_cache(maxsize=1)
def _annotations(files: tuple[Path, ...]) -> tuple[dict[int, set[str]], dict[int, list[str]]]:
    categories: dict[int, set[str]] = defaultdict(set)
    captions: dict[int, list[str]] = defaultdict(list)
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in found.get("categories", ())}
        for annotation in found["annotations"]:
            if "caption" in annotation:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                categories[annotation["image_id"]].add(names[annotation["category_id"]])
    return categories, captions
