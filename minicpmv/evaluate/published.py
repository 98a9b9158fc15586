"""What the authors of MiniCPM-V 4.5 published, and closed models on the same benchmarks: to be set beside figures of one's own.

What is special:
- every figure is as printed, with its mark; none of them was measured by this repository;
- a column names its source. Sources disagree here and there: GPT-4o's TextVQA is 85.6* in the first table, 77.4 in the
  second one.

The settings behind the figures are known in part only. The authors' code does not think on DocVQA and RealWorldQA, which
are marked †, and thinks on MMBench, which is not; frames, rate and packing of the video rows are not public.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from minicpmv.evaluate.data_sets.catalog import DATA_SETS, other_file


OURS = "MiniCPM-V 4.5"
PAPER = "arXiv 2509.18154, main table"
O45_PAGE = "README of github.com/OpenBMB/MiniCPM-V, breakdown of MiniCPM-o 4.5"
V4_PAGE = "docs/minicpm_v4_en.md of github.com/OpenBMB/MiniCPM-V"
MARKS = {
    "†": "with deep thinking; of MiniCPM-V 4.5, the mean of three runs",
    "*": "evaluated by the authors of MiniCPM-V 4.5",
    "‡": "GPT-4o-latest, from the OpenCompass leaderboard; GPT-4o's other figures are those of version 1120",
}


# Rows of the table that are two metrics of one row of ours: (row, metric).
SAME_ROW = {
    "objhal_chair_s": ("objhal", "chair_s"),
    "objhal_chair_i": ("objhal", "chair_i"),
    "mmhal_score": ("mmhal", "score"),
    "mmhal_rate": ("mmhal", "hallucination_rate"),
}


@dataclass(frozen=True)
class Figure:
    """A number as it was printed, and its mark."""

    printed: str
    mark: str = ""

    @property
    def value(self) -> float:
        return float(self.printed)

    def __str__(self) -> str:
        return self.printed + self.mark


@dataclass(frozen=True)
class PublishedRow:
    """A line of the published table."""

    id: str
    title: str
    lower_is_better: bool = False

    def own(self, results: Mapping[str, Any]) -> str | None:
        """The figure of a run, in the way in which the published one is printed; None where the run has none.

        Args:
            results: what `results.json` of a suite or a group holds.
        """
        if self.id == "opencompass":
            share = results.get("averages", {}).get("opencompass")
            return None if share is None else f"{100 * share:.1f}"
        names = ("mmbench_en", "mmbench_cn") if self.id == "mmbench" else (SAME_ROW.get(self.id, (self.id, ""))[0],)
        rows = [results["rows"].get(name) for name in names]
        if any(row is None for row in rows):
            return None
        metric = SAME_ROW.get(self.id, ("", None))[1] or next(iter(rows[0]["mean"]))
        values = [row["mean"].get(metric) for row in rows]
        if any(value is None for value in values):
            return None
        value = fmean(values)
        if metric not in rows[0].get("points", ()):
            return f"{100 * value:.1f}"
        digits = len(COLUMNS[0].figures[self.id].printed.partition(".")[2]) if self.id in COLUMNS[0].figures else 1
        return f"{value:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A model's figures by row id."""

    model: str
    mode: str  # how it answered, as far as the source tells
    source: str
    figures: dict[str, Figure]


VIDEO_ROWS = ("videomme", "lvbench", "mlvu", "longvideobench", "motionbench", "favorbench")
# Row, title, then MiniCPM-V 4.5, Qwen2.5-VL-7B, Qwen2.5-VL-72B, InternVL3-8B, GLM-4.1V-9B-Thinking, GPT-4o.
MAIN_MODELS = (OURS, "Qwen2.5-VL-7B", "Qwen2.5-VL-72B", "InternVL3-8B", "GLM-4.1V-9B-Thinking", "GPT-4o")
MAIN_TABLE = """
opencompass        | OpenCompass average        | 77.0† | 70.5  | 76.1  | 73.6   | 76.6   | 75.4‡
mmvet              | MMVet                      | 75.5† | 67.1  | 76.9  | 81.3   | 70.5†  | 76.9‡
mmstar             | MMStar                     | 72.1† | 63.9  | 70.5  | 68.2   | 72.9   | 70.2‡
mme                | MME                        | 2500  | 2347  | 2483  | 2415   | 2466†  | 2318*
mmbench            | MMBench V1.1               | 84.2  | 82.6  | 87.8  | 81.7   | 85.3   | 86.0‡
mmmu               | MMMU (val)                 | 67.7† | 58.6  | 68.2  | 62.7   | 68.0   | 72.9‡
mathvista          | MathVista (testmini)       | 79.9† | 68.2  | 74.2  | 71.6   | 80.7   | 71.6‡
ai2d               | AI2D                       | 86.5  | 83.9  | 88.5  | 85.2   | 87.9   | 86.3‡
mathverse          | MathVerse MINI             | 58.8† | 49.2  | 47.3  | 39.8   | 68.4   | 40.6
logicvista         | LogicVista                 | 57.0† | 44.1  | 55.7  | 44.1   | 60.4   | 52.8
emma               | EMMA                       | 34.8† | 28.6* | -     | -      | 35.7†  | 32.4
ocrbench           | OCRBench (/ 10)            | 89.0  | 86.4  | 88.2  | 88.0   | 84.2   | 82.2‡
chartqa            | ChartQA                    | 87.4  | 87.3  | 89.5  | 86.6   | 87.1†  | 86.7
textvqa            | TextVQA (val)              | 82.2  | 84.9  | 83.5  | 80.2   | 79.9†  | 85.6*
docvqa             | DocVQA                     | 94.7† | 95.7  | 96.4  | 92.7   | 93.4†  | 93.0
omnidocbench_en ↓  | OmniDocBench EN            | 0.175 | 0.316 | 0.214 | 0.335* | 0.460* | 0.233
omnidocbench_zh ↓  | OmniDocBench ZH            | 0.253 | 0.399 | 0.261 | 0.390* | 0.573* | 0.399
hallusionbench     | HallusionBench             | 61.2† | 52.9  | 54.6  | 49.9   | 63.2   | 57.0‡
objhal_chair_s ↓   | Object HalBench CHAIRs     | 9.3†  | 13.7* | 17.0* | 11.3*  | 12.3*  | -
objhal_chair_i ↓   | Object HalBench CHAIRi     | 5.2†  | 7.7*  | 8.9*  | 6.5*   | 6.4*   | -
mmhal_score        | MMHal-Bench score (0 to 6) | 5.0†  | 4.1*  | 4.2*  | 4.2*   | 4.6*   | -
mmhal_rate ↓       | MMHal-Bench rate           | 19.4† | 31.6* | 38.2* | 24.3*  | 22.9*  | -
mantis             | Mantis                     | 82.5† | 74.7* | 81.1* | 70.1   | 78.8†  | -
mmtbench           | MMT-Bench                  | 68.3  | 63.6  | -     | 65.0   | 67.6   | 66.7*
realworldqa        | RealWorldQA                | 72.1† | 68.5  | 75.7  | 70.8   | 70.7†  | 76.8*
mm_ifeval          | MM-IFEval                  | 66.0  | 51.3* | 73.8* | 53.2*  | 58.4†  | 64.6
videomme           | Video-MME without subtitles | 67.9 | 65.1  | 73.3  | 66.3   | 68.2   | 71.9
videomme_subtitles | Video-MME with subtitles   | 73.5  | 71.6  | 79.1  | 68.9   | 73.6   | 77.2
lvbench            | LVBench                    | 50.4  | 45.3  | 47.3  | 44.1*  | 44.0   | 48.9
mlvu               | MLVU (M-Avg)               | 75.1  | 70.2  | 74.6  | 71.4   | 72.5†  | -
longvideobench     | LongVideoBench (val)       | 63.9  | 56.0  | 60.7  | 58.8   | 65.7   | -
motionbench        | MotionBench                | 59.7  | 53.0  | 58.3  | 58.1   | 59.0   | 58.0
favorbench         | FAVOR-Bench                | 56.0  | 42.3  | 48.1  | 45.3   | 51.2†  | -
"""
# The same, for models that the authors quote elsewhere. OCRBench is printed there out of 1000.
PEERS = (
    ("GPT-4o (latest)", "not thinking", O45_PAGE),
    ("GPT-5", "thinking", O45_PAGE),
    ("Gemini-2.0 Pro", "not told", O45_PAGE),
    ("Gemini-2.5-Flash", "not thinking", O45_PAGE),
    ("Gemini-2.5-Flash", "thinking", O45_PAGE),
    ("MiniCPM-o 4.5 Instruct", "not thinking", O45_PAGE),
    ("MiniCPM-o 4.5 Thinking", "thinking", O45_PAGE),
    ("Claude 3.5 Sonnet (20241022)", "not told", V4_PAGE),
    ("Gemini-1.5-Pro", "not told", V4_PAGE),
)
PEER_TABLE = """
opencompass        | OpenCompass average         | 75.4 | 79.7 | 73.3 | 78.5  | 79.9 | 77.6 | 78.2 | 70.6 | 64.5
mmbench            | MMBench V1.1                | -    | -    | -    | -     | -    | -    | -    | 81.7 | 73.9
mmbench_en         | MMBench V1.1 EN             | 86.0 | 85.5 | 83.0 | 86.6  | 87.1 | 87.6 | 89.0 | -    | -
mmbench_cn         | MMBench V1.1 CN             | 86.0 | 85.6 | 83.0 | 86.0  | 87.3 | 87.2 | 87.6 | -    | -
mathvista          | MathVista (testmini)        | 71.6 | 81.9 | 71.3 | 75.3  | 79.4 | 80.1 | 81.0 | 65.3 | 58.3
mmvet              | MMVet                       | 76.9 | 77.6 | 70.4 | 81.4  | 81.2 | 74.4 | 73.6 | 70.1 | 64.0
mmmu               | MMMU (val)                  | 72.9 | 81.8 | 72.6 | 76.3  | 77.7 | 67.6 | 70.2 | 66.4 | 60.6
mmstar             | MMStar                      | 70.2 | 75.7 | 68.5 | 75.8  | 76.5 | 73.1 | 73.6 | 65.1 | 59.1
hallusionbench     | HallusionBench              | 57.0 | 65.2 | 49.8 | 59.1  | 63.5 | 63.2 | 62.6 | 55.5 | 45.6
ai2d               | AI2D                        | 86.3 | 89.5 | 84.8 | 87.7  | 88.7 | 87.6 | 88.5 | 81.2 | 79.1
ocrbench           | OCRBench (/ 10)             | 82.2 | 80.7 | 86.3 | 86.4  | 85.3 | 87.6 | 87.9 | 79.8 | 75.4
chartqa            | ChartQA                     | -    | -    | -    | -     | -    | -    | -    | 90.8 | -
textvqa            | TextVQA (val)               | 77.4 | -    | -    | 74.3  | -    | 83.8 | -    | 74.1 | -
docvqa             | DocVQA                      | 93.0 | -    | -    | 93.0  | -    | 94.7 | -    | 95.2 | -
omnidocbench_en ↓  | OmniDocBench EN             | -    | -    | -    | 0.214 | -    | -    | -    | -    | -
omnidocbench_zh ↓  | OmniDocBench ZH             | -    | -    | -    | 0.290 | -    | -    | -    | -    | -
mmhal_score        | MMHal-Bench score (0 to 6)  | -    | -    | -    | 4.6   | -    | -    | -    | -    | -
mmhal_rate ↓       | MMHal-Bench rate            | -    | -    | -    | 23.9  | -    | -    | -    | -    | -
realworldqa        | RealWorldQA                 | -    | -    | -    | -     | -    | -    | -    | 60.1 | -
videomme           | Video-MME without subtitles | -    | -    | -    | 75.6  | -    | -    | -    | -    | 75.0
videomme_subtitles | Video-MME with subtitles    | -    | -    | -    | -     | -    | -    | -    | -    | 81.3
lvbench            | LVBench                     | -    | -    | -    | 62.2  | -    | -    | -    | -    | -
mlvu               | MLVU (M-Avg)                | -    | -    | -    | 77.8  | -    | -    | -    | -    | -
"""


def _read(table: str, columns: Sequence[tuple[str, str, str]]) -> tuple[list[PublishedRow], list[Column]]:
    rows, figures = [], [dict[str, Figure]() for _ in columns]
    for line in table.strip().splitlines():
        name, title, *cells = (cell.strip() for cell in line.split("|"))
        row = PublishedRow(name.removesuffix(" ↓"), title, lower_is_better=name.endswith("↓"))
        rows.append(row)
        for found, cell in zip(figures, cells, strict=True):
            if cell != "-":
                printed = cell.rstrip("".join(MARKS))
                found[row.id] = Figure(printed, cell[len(printed) :])
    return rows, [Column(*column, found) for column, found in zip(columns, figures, strict=True)]


ROWS, _main = _read(MAIN_TABLE, [(model, "thinking where marked †", PAPER) for model in MAIN_MODELS])
_peer_rows, _peers = _read(PEER_TABLE, PEERS)
ALL_ROWS = ROWS + [row for row in _peer_rows if row.id not in {known.id for known in ROWS}]
COLUMNS: list[Column] = [*_main, *_peers]


def caveats(results: Mapping[str, Any]) -> list[str]:
    """Why a run's figures may not be comparable with the published ones, a sentence each."""
    parts = [each.get("settings", {}) for each in results.get("suites", {}).values()] or [results["settings"]]
    found = []
    others = [
        name
        for part in parts
        for name, digest in (part.get("data") or {}).items()
        if name in DATA_SETS and other_file(DATA_SETS[name], digest)
    ]
    if others:
        found.append(f"Other files than those that are published, such as fixtures: {', '.join(others)}.")
    if results.get("samples") is not None:
        found.append(f"No more than {results['samples']} questions of each row were asked.")
    if not all(part.get("as_published") for part in parts):
        found.append("Plain setting: neither the authors' prompts nor their decoding (--as-published).")
    if results.get("scoring", {}).get("strict"):
        found.append("Strict rules, which mend the reference's defects.")
    rows = results["rows"]
    if unjudged := [name for name, row in rows.items() if row.get("judge") == "rules only" and row.get("undecided")]:
        found.append(f"Rules only, without a judge: {', '.join(unjudged)}.")
    if {"mmbench_en", "mmbench_cn"} & rows.keys():
        found.append("MMBench is the dev set; the published figure is taken to be that of the test set.")
    if any(name.startswith(VIDEO_ROWS) for name in rows):
        found.append("Frames, rate and packing of the published video figures are not known.")
    return found
