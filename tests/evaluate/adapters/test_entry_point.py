"""Where lmms-eval looks for the model: the name in pyproject.toml leads to something, without lmms-eval being there."""

import importlib
import re

from conftest import REPOSITORY


def test_the_entry_point_leads_to_a_function():
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."lmms_eval.models"]\n')[1]
    module, name = re.match(r'minicpmv = "([\w.]+):(\w+)"', section).groups()
    assert callable(getattr(importlib.import_module(module), name))
