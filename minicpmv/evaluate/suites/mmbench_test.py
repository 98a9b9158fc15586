"""MMBench V1.1, test sets: answers to be uploaded to mmbench.opencompass.org.cn, which alone can score them.

A run writes `mmbench_test_en.xlsx` and `mmbench_test_cn.xlsx`: the columns of the data without the images, and `prediction`.
"""

from pathlib import Path
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Scores
from minicpmv.evaluate.spreadsheet import write_spreadsheet
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_CHOICE, THOUGHTFUL_CHOICE, choices, columns
from minicpmv.evaluate.suites.mmbench import question_and_rotation


COLUMNS = ("question", "hint", *"ABCD", "category", "l2-category", "split", "source")


def unknown(answer: str, expected: Any, **rules: Any) -> Scores:
    return {"exact": None, "extracted": answer}


def test_set(language: str, name: str) -> Task:
    id = f"mmbench_test_{language}"

    def upload(entries: list[Entry], folder: Path) -> None:
        heading = ["index", *COLUMNS, "prediction"]
        lines = [
            [
                entry["facts"]["id"],
                *(entry["facts"].get(name.replace("-", "_"), "") for name in COLUMNS),
                entry["answer"],
            ]
            for entry in entries
        ]
        write_spreadsheet(folder / f"{id}.xlsx", [heading, *lines])

    return Task(
        id=id,
        title=f"multiple choice in {name}, to be uploaded; test set",
        data=f"mmbench_test_{language}",
        plain=PLAIN_CHOICE,
        published=THOUGHTFUL_CHOICE,
        expected=lambda sample: {"choices": choices(sample)},
        facts=columns(*COLUMNS),
        scorer=unknown,
        order=question_and_rotation,
        upload=upload,
    )


SUITE = Suite("mmbench_test", "MMBench V1.1 test", 1, (test_set("en", "English"), test_set("cn", "Chinese")))
