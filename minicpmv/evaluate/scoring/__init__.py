"""How answers are scored: rules without a model, those of public benchmarks exact to what published figures were made with.

What is special:
- a rule that changed can be had as it was (`scoring`), since figures are compared with older ones;
- a defect of the reference is kept and named, because figures have to be comparable; where a rule can be wrong about a
  right answer, or right about a wrong one, `strict` sets it right;
- no rule imports torch; where rules do not decide, a [`minicpmv.evaluate.benchmark.Judge`] says what to ask a language
  model, and reads its reply. Its instructions are worded here, in the reference's format: examples in them are our own.

Most references are VLMEvalKit (open-compass, e8e78f0 of 2026-08), where nothing else is said.
"""

from typing import Literal


# VLMEvalKit counted an option's letter anywhere in a reply until 2025-08-04, then only among its last four tokens; since
# 2026-06-17 it also reads "answer is X".
Scoring = Literal["2025-07", "2025-09", "current"]
SCORINGS: tuple[Scoring, ...] = ("2025-07", "2025-09", "current")
