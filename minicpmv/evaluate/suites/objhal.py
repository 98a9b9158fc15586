"""Object HalBench (Rohrbach et al. 2018; Yu et al. 2024): 300 descriptions of COCO images; which named objects are not there?

What an image holds is COCO's annotation together with what five people wrote about it. A judge lists the objects that an answer names.
Decoding as published: see MMHal-Bench.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from minicpmv.evaluate.scoring.objects import chair, judge_of_objects, objects_in_image, objhal
from minicpmv.evaluate.suite import Asking, Sample, Suite, SuiteError, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, columns, pictures_then, question
from minicpmv.files import read_json


@cache
def coco_objects(folder: Path, ids: frozenset[int]) -> dict[int, list[str]]:
    """What each of these images of COCO 2014 holds. The files are large: this takes half a minute and some gigabytes.

    Raises:
        SuiteError: COCO's annotations are not there.
    """
    categories, captions = defaultdict[int, set[str]](set), defaultdict[int, list[str]](list)
    for part in ("train", "val"):
        files = {kind: folder / "annotations" / f"{kind}_{part}2014.json" for kind in ("instances", "captions")}
        if absent := [path for path in files.values() if not path.is_file()]:
            raise SuiteError(f"{absent[0]} is not there: `minicpmv evaluate get objhal` brings COCO's annotations")
        instances = read_json(files["instances"])
        names = {category["id"]: category["name"] for category in instances["categories"]}
        for thing in instances["annotations"]:
            if thing["image_id"] in ids:
                categories[thing["image_id"]].add(names[thing["category_id"]])
        for caption in read_json(files["captions"])["annotations"]:
            if caption["image_id"] in ids:
                captions[caption["image_id"]].append(caption["caption"])
    return {id: objects_in_image(categories[id], captions[id]) for id in ids}


def expected(sample: Sample) -> dict[str, Any]:
    ids = frozenset(int(record["image_id"]) for record in sample.data.records.without_images())
    objects = coco_objects(sample.data.folder, ids)[int(sample["image_id"])]
    return {"objects": objects, "question": sample["question"]}


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
            published=Asking(pictures_then(question), DIRECT),
            expected=expected,
            facts=columns(id="image_id"),
            scorer=objhal,
            aggregate=chair,
            lower_is_better=True,
            judge=judge_of_objects,
        ),
    ),
)
