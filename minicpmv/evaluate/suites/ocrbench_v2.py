"""OCRBench v2 (Fu et al. 2024): 10000 questions in English and Chinese: reading, finding, parsing, counting, reasoning.

There is no published figure of MiniCPM-V 4.5. Prompt and decoding as published are those that the authors' class takes for every name
that holds "OCRBench".
"""

import ast
from typing import Any

from minicpmv.evaluate.scoring.ocrbench_v2 import ocrbench_v2, ocrbench_v2_score
from minicpmv.evaluate.suite import Asking, Decoding, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import (
    READ_CAREFULLY,
    REASONING,
    columns,
    expected_answers,
    images_then,
    question,
)


def expected(sample: Sample) -> dict[str, Any]:
    found = {"type": sample["category"], "question": sample["question"], **expected_answers(sample)}
    if (way := sample.get("eval", "without eval")) != "without eval":
        found["eval"] = way
    for name in ("bbox", "content"):  # of where a text stands: Python lists in the table, or one text
        if (value := sample.get(name, f"without {name}")) != f"without {name}":
            found[name] = ast.literal_eval(value) if value.startswith("[") else value
    return found


SUITE = Suite(
    "ocrbench_v2",
    "OCRBench v2",
    1,
    (
        Task(
            id="ocrbench_v2",
            title="reading, finding and parsing text, English and Chinese",
            data="ocrbench_v2",
            plain=Asking(images_then(question), Decoding(max_new_tokens=2048)),
            published=Asking(images_then(lambda sample: READ_CAREFULLY + sample["question"]), REASONING),
            expected=expected,
            facts=columns("category"),
            scorer=ocrbench_v2,
            aggregate=ocrbench_v2_score,
        ),
    ),
)
