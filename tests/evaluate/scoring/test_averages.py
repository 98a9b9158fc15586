"""The OpenCompass average."""

import pytest

from minicpmv.evaluate.scoring.averages import OPENCOMPASS, opencompass_average


# Published: MiniCPM-o 4.5, thinking (openbmb/MiniCPM-V, README.md), in the order of OPENCOMPASS.
PUBLISHED = dict(zip(OPENCOMPASS, [None, 0.736, 0.702, 0.81, 0.626, 0.885, 0.879, 0.736], strict=True))


def test_both_languages_of_mmbench_are_averaged_first():
    row = {**PUBLISHED, "mmbench_en": 0.89, "mmbench_cn": 0.876}
    assert opencompass_average(row) == pytest.approx(0.782, abs=5e-4)
    assert opencompass_average({**PUBLISHED, "mmbench": 0.89}) == pytest.approx(0.783, abs=5e-4)


def test_there_is_no_average_of_less_than_all():
    assert opencompass_average({**PUBLISHED, "mmbench_en": 0.89}) is None
    assert opencompass_average({}) is None


def test_other_rows_do_not_matter():
    row = {**PUBLISHED, "mmbench": 0.8}
    assert opencompass_average({**row, "chartqa": 0.1}) == opencompass_average(row)
