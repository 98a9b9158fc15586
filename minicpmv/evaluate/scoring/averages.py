"""Figures made of several benchmarks: the OpenCompass average, and the means of its parts."""

from collections.abc import Mapping
from statistics import fmean


# What OpenCompass averages: MMBench is the mean of English and Chinese, HallusionBench that of aAcc, fAcc and qAcc, and
# OCRBench a thousandth of its points. MMBench is meant with the answers of the test set, which only its server knows.
OPENCOMPASS = ("mmbench", "mmstar", "mmmu", "mathvista", "hallusionbench", "ai2d", "ocrbench", "mmvet")


def opencompass_average(shares: Mapping[str, float | None]) -> float | None:
    """The mean of eight, as a share; None where one of them is missing.

    Args:
        shares: main metrics (0 to 1) by row; MMBench as `mmbench_en` and `mmbench_cn`, or `mmbench`.
    """
    both = [shares.get("mmbench_en"), shares.get("mmbench_cn")]
    known = dict(shares)
    if all(share is not None for share in both):
        known["mmbench"] = fmean(share for share in both if share is not None)
    parts = [known.get(name) for name in OPENCOMPASS]
    return None if any(part is None for part in parts) else fmean(part for part in parts if part is not None)
