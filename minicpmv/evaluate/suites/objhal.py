"""Object HalBench (Rohrbach et al. 2018; Yu et al. 2024): 300 descriptions of COCO images; which named objects are not there?

What an image holds is COCO's annotation together with what five people wrote about it. A judge lists the objects that an answer names.
Decoding as published: see MMHal-Bench.
"""

from typing import Any

from minicpmv.evaluate.scoring.coco_annotations import ANNOTATION_FILES, objects_of_image
from minicpmv.evaluate.scoring.objects import chair, judge_of_objects, objhal
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, columns, pictures_then, question


def expected(sample: Sample) -> dict[str, Any]:
    files = [sample.data.media(f"annotations/{name}") for name in ANNOTATION_FILES]
    return {"objects": objects_of_image(files, int(sample["image_id"])), "question": sample["question"]}


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
