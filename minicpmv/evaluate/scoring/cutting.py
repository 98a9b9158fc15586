"""The part of a reply that is scored: the cut of the authors' VLMEvalKit class, on sets that it asks to reason first.

Multiple choice (MMBench, MMStar, MMMU) is cut by `cut_choice`; yes/no and free answers (HallusionBench, MathVista,
MathVision, MathVerse, DynaMath, LogicVista, ChartQA) by `cut_value`; all others, OCRBench and MMVet among them, are scored as
they are. A cut that finds nothing changes nothing.
"""

import re


CHOICE = re.compile(r"Answer:\s*([A-Ia-i])(?![A-Za-z])")
VALUE = re.compile(r"Answer:\s*(.*)\s*$", re.DOTALL)


def cut_thought(reply: str) -> str:
    """What follows the last thought."""
    return reply.rpartition("</think>")[2].strip()


def cut_choice(reply: str) -> str:
    """The letter after the last `Answer:`.

    Known defect: a small letter is cut out as it is, and the rule for choices does not know it.
    """
    found = CHOICE.findall(reply)
    return found[-1] if found else reply


def cut_value(reply: str) -> str:
    """Everything after the first `Answer:`.

    Known defect: an `Answer:` in the thought, or in the reasoning before the last one, begins the cut. Take the thought
    away first.
    """
    found = VALUE.search(reply)
    return found[1] if found else reply
