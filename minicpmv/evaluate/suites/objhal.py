"""Object HalBench (Rohrbach et al. 2018; Yu et al. 2024): 300 descriptions of COCO images; which named objects are not there?

What an image holds is COCO's annotation together with what five people wrote about it. A judge lists the objects that an answer names.
Decoding as published: see MMHal-Bench.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from minicpmv.evaluate.scoring.objects import chair, judge_of_objects, objects_in_image, objhal
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, columns, images_then, question
from minicpmv.files import read_json


PARTS = ("train2014", "val2014")


@cache
def annotations(
    instances: tuple[Path, ...], captions: tuple[Path, ...]
) -> tuple[dict[int, set[str]], dict[int, list[str]]]:
    """Objects and captions of the images of COCO 2014, by their numbers. The files are large: this takes some gigabytes."""
    categories: dict[int, set[str]] = defaultdict(set)
    written: dict[int, list[str]] = defaultdict(list)
    for path in instances:
        found = read_json(path)
        names = {category["id"]: category["name"] for category in found["categories"]}
        for thing in found["annotations"]:
            categories[thing["image_id"]].add(names[thing["category_id"]])
    for path in captions:
        for caption in read_json(path)["annotations"]:
            written[caption["image_id"]].append(caption["caption"])
    return categories, written


def expected(sample: Sample) -> dict[str, Any]:
    instances, captions = (
        tuple(sample.data.media(f"annotations/{kind}_{part}.json") for part in PARTS)
        for kind in ("instances", "captions")
    )
    categories, written = annotations(instances, captions)
    image = int(sample["image_id"])
    return {"objects": objects_in_image(categories[image], written[image]), "question": sample["question"]}


SUITE = Suite(
    "objhal",
    "Object HalBench",
    1,
    (
        Task(
            id="objhal",
            title="objects in descriptions that are not in the image, judged",
            data="objhal",
            plain=PLAIN_QUESTION,
            published=Asking(images_then(question), DIRECT),
            expected=expected,
            facts=columns(id="image_id"),
            scorer=objhal,
            aggregate=chair,
            lower_is_better=True,
            judge=judge_of_objects,
        ),
    ),
)
