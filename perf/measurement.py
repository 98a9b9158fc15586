"""What a benchmark of this folder measures: a figure next to the limit that the machine sets."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """A figure, and what it is compared with in the same unit."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_name: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The figure as a share of its limit."""
        return None if self.limit is None else self.value / self.limit

    def __str__(self) -> str:
        limit = "" if self.limit is None else f"{self.limit:,.1f} {self.limit_name}"
        ratio = "" if self.ratio is None else f"{self.ratio:.1%}"
        return f"{self.name:42}{self.value:>14,.1f} {self.unit:10}{limit:>30}{ratio:>9}  {self.note}".rstrip()


def heading() -> str:
    return f"{'what':42}{'measured':>14} {'':10}{'limit':>30}{'ratio':>9}"


def write_json(measurements: Sequence[Measurement], file: Path) -> None:
    entries = [asdict(measurement) | {"ratio": measurement.ratio} for measurement in measurements]
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
