"""`minicpmv evaluate get`: the data of public benchmarks, asked for, with size and terms told beforehand."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import MiniCPMVError, one_line_errors, require


if TYPE_CHECKING:
    from minicpmv.evaluate.data_sets import DataSet
    from minicpmv.evaluate.data_sets.download import Download


class NotAskedError(MiniCPMVError):
    """Nobody has agreed to the download."""


def get(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Suites or groups, such as videomme or ocr; or data sets.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the files; by default $LMUData, else ~/.cache/minicpmv/data."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch without asking.")] = False,
) -> None:
    """Fetch the data of public benchmarks: sizes and terms first, resumed after an interruption, checked.

    Examples:

    \b
      minicpmv evaluate get mmstar
      minicpmv evaluate get opencompass --data /data --yes
    """
    with one_line_errors(OSError):
        require("evaluate", "tqdm")
        from tqdm import tqdm

        from minicpmv.evaluate.data_sets.download import fetch, in_units, plan
        from minicpmv.evaluate.data_sets.locate import cache_folder

        root = (data or cache_folder()).expanduser()
        plans = [(data_set, plan(data_set, root)) for data_set in data_sets_of(names)]
        for data_set, files in plans:
            terminal.write(described(data_set, files))
        missing = [file for _, files in plans for file in files if not file.is_here]
        size = sum(file.missing or 0 for file in missing)
        if missing:
            unknown = " and files of unknown size" if any(file.size is None for file in missing) else ""
            terminal.write(f"to fetch: {in_units(size)}{unknown}, into {root}")
            if not yes:
                ask()
        with tqdm(total=size, unit="B", unit_scale=True, disable=not missing) as bar:
            for _, files in plans:
                fetch(files, bar.update)
        for data_set, files in plans:
            terminal.write(f"{data_set.id}: {len(files)} file{'s' * (len(files) != 1)} in {root / data_set.folder}")


def data_sets_of(names: list[str]) -> "list[DataSet]":
    """What suites, groups and data sets of these names need, each once.

    Raises:
        UnknownDataSetError: there is none of a name.
    """
    from minicpmv.evaluate.data_sets import find_data_set
    from minicpmv.evaluate.suites import GROUPS, SUITES, load_suite, spelled

    ids: list[str] = []
    for name in map(spelled, names):
        suites = GROUPS[name][0] if name in GROUPS else (name,) if name in SUITES else ()
        ids += [data for suite in suites for data in load_suite(suite).data] if suites else [name]
    return list({data_set.id: data_set for data_set in map(find_data_set, ids)}.values())


def described(data_set: "DataSet", files: "list[Download]") -> str:
    """What would be fetched, and under which terms."""
    from minicpmv.evaluate.data_sets.download import in_units

    rows = f", {data_set.rows} rows" if data_set.rows else ""
    lines = [f"{data_set.id}: {data_set.name}{rows}; license: {data_set.license}"]
    lines += [f"  needed first: {data_set.gate}"] if data_set.gate else []
    lines += [f"  note: {data_set.note}"] if data_set.note else []
    missing = [file for file in files if not file.is_here]
    lines += [f"  {file.path.name}: {in_units(file.size)}" for file in missing[:10]]
    lines += [f"  and {len(missing) - 10} more files"] if len(missing) > 10 else []
    lines += ["  all files are here"] if not missing else []
    return "\n".join(lines)


def ask() -> None:
    """Raises:
    NotAskedError: the answer is no, or nobody is there to ask.
    """
    if not sys.stdin.isatty():
        raise NotAskedError("nothing was fetched: add --yes to fetch without being asked")
    if not typer.confirm("Fetch them?"):
        raise NotAskedError("nothing was fetched")
