"""The tables of nano's card, out of what a run measured and logged.

    python -m minicpmv.train.nano.card --card nano/README.md --figures FIGURES.json --logs DIR... --output FILE

What is special:
- only what stands between the marks `<!-- nano table -->` and `<!-- nano stages -->` and their `<!-- end -->` is written
  anew; the prose around them is a person's, who has to read it again;
- rows keep the words that the card has for them; those that it does not know are named by their ids.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpmv.errors import one_line_errors
from minicpmv.files import read_json, read_json_lines, write_whole
from minicpmv.train.common.errors import ArgumentsError


STAGES = "<!-- nano stages -->"


def block(card: str, name: str) -> str:
    """What stands between the mark of a table and its end.

    Raises:
        ArgumentsError: the card has no such table.
    """
    found = re.search(rf"<!-- nano {name} -->\n(.*?)<!-- end -->", card, re.DOTALL)
    if found is None:
        raise ArgumentsError(
            f"the card has no table between <!-- nano {name} --> and <!-- end -->; put the marks where it goes"
        )
    return found[1]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def told(figures: dict[str, Any]) -> str:
    """A row's figures in a cell: the main one, and what belongs to it."""
    if "chair_i" in figures:
        if figures["chair_i"] is None:
            return "no caption names anything"
        return f"{percent(figures['chair_i'])} of the objects (recall {percent(figures['recall'])})"
    main = percent(figures["exact"])
    for name, words in (("characters", "of the characters"), ("cells", "of the cells"), ("valid", "valid")):
        if name in figures:
            return f"{main} ({percent(figures[name])} {words})"
    if "exact_english" in figures:
        return f"{main} (in English {percent(figures['exact_english'])})"
    return main


def figures_table(figures: dict[str, dict[str, Any]], old: str) -> str:
    words = {row: what.strip() for row, what in re.findall(r"^\| `(\w+)` \|([^|]*)\|", old, re.MULTILINE)}
    rows = [f"| `{row}` | {words.get(row, row)} | {told(values)} |" for row, values in figures.items()]
    return "\n".join(["| row | what | right |", "|---|---|---|", *rows]) + "\n"


def stages_table(logs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """One line for each stage of each run: samples, minutes, and the last validation."""
    rows = []
    for run, entries in enumerate(logs, 1):
        before = {"samples": 0, "minutes": 0.0}
        for stage in sorted({entry["stage"] for entry in entries}):
            own = [entry for entry in entries if entry["stage"] == stage]
            last, checked = own[-1], [entry["validation"] for entry in own if "validation" in entry]
            result = checked[-1] if checked else {}
            share = f"{percent(result['answers'])} of the answers" if "answers" in result else ""
            if not share and result:
                share = f"{percent(result['patches'])} of the patches"
            samples, minutes = last["samples"] - before["samples"], last["minutes"] - before["minutes"]
            rows.append(f"| {last.get('name', f'{run}.{stage + 1}')} | {samples:,} | {minutes:.0f} | {share} |")
            before = last
    return (
        "\n".join(["| stage | samples | minutes | right in the validation set |", "|---|---|---|---|", *rows]) + "\n"
    )


def written(card: str, figures: dict[str, dict[str, Any]], logs: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The card with its tables anew; that of the stages comes last, where the card had none."""
    if STAGES not in card:
        card += f"\n## Stages of this run\n\n{STAGES}\n<!-- end -->\n"
    for name, table in (("table", figures_table(figures, block(card, "table"))), ("stages", stages_table(logs))):
        mark = f"<!-- nano {name} -->\n"
        before, after = card.split(mark, 1)
        card = before + mark + table + after[after.index("<!-- end -->") :]
    return card


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv.train.nano.card", description=__doc__.splitlines()[0])
    parser.add_argument("--card", type=Path, required=True, help="The card as it is.")
    parser.add_argument("--figures", type=Path, required=True, help="What minicpmv evaluate nanobench --json wrote.")
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="Folders of the runs, in order.")
    parser.add_argument("--output", type=Path, required=True, help="The card to write.")
    args = parser.parse_args(argv)
    with one_line_errors(OSError):
        logs = [read_json_lines(folder / "log.jsonl") for folder in args.logs]
        card = written(args.card.read_text(encoding="utf-8"), read_json(args.figures), logs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.output, card)
    print(f"{args.output} holds the card with the new figures: read its prose again")


if __name__ == "__main__":
    main()
