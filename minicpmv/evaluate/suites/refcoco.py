"""RefCOCO, RefCOCO+ and RefCOCOg (Kazemzadeh et al. 2014; Mao et al. 2016): where is it? Right if the boxes overlap by half; the mean of eight splits.

There is no published figure of MiniCPM-V 4.5. The question is VLMEvalKit's; strict scoring reads boxes as thousandths, which the model
writes.
"""

from typing import Any

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.boxes import mean_of_parts, refcoco
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, images_then, question


CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def expected(sample: Sample) -> dict[str, Any]:
    width, height = float(sample["width"]), float(sample["height"])
    return {"box": [float(sample[name]) for name in CORNERS], "width": width, "height": height}


def facts(sample: Sample) -> Facts:
    return {"id": f"{sample['split']}_{sample['index']}", "split": sample["split"]}


SUITE = Suite(
    "refcoco",
    "RefCOCO, RefCOCO+, RefCOCOg",
    1,
    (
        Task(
            id="refcoco",
            title="the box of what is described, eight splits",
            data="refcoco",
            plain=PLAIN_QUESTION,
            published=Asking(images_then(question), DIRECT),
            expected=expected,
            facts=facts,
            scorer=refcoco,
            aggregate=mean_of_parts,
            breakdowns=("split",),
        ),
    ),
)
