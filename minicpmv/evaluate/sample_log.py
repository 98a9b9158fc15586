"""Every answer of a run, on disk as soon as it is there: what makes a run resumable and its mistakes readable.

What is special:
- `samples.jsonl` is only ever appended to, a line an answer; a line that a kill cut in half is dropped when the log is
  opened again;
- answers are scored when they come, and those of public benchmarks once more when all are there, by the rules and the judge
  of that run: these scores stand in `scores.jsonl`, written anew each time, and count over the first ones;
- each line carries the fingerprint of the settings it was made with (`settings.json` spells them out), and a log with
  other settings is refused: answers of two settings never share a file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError
from minicpmv.files import DamagedFileError, drop_torn_line, read_json, read_json_lines, write_whole


SETTINGS_FILE, SAMPLES_FILE, SCORES_FILE = "settings.json", "samples.jsonl", "scores.jsonl"
FIELDS = {
    "settings": str,
    "row": str,
    "seed": int,
    "index": int,
    "answer": str,
    "scores": dict,
}  # what a line must hold


class SampleLogError(MiniCPMVError):
    """A log cannot be continued: it was made with other settings, or a part of it is missing."""


@dataclass(frozen=True)
class SampleKey:
    row: str
    seed: int
    index: int


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class SampleLog:
    """The answers of one setting, by (row, seed, index).

    Args:
        folder: made if it is not there.
        settings: everything that answers depend on, apart from the key; anything that JSON can hold.

    Raises:
        SampleLogError: the folder holds answers of other settings (names what differs).
        DamagedFileError: one of its files cannot be read (names the file and the line).
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings, self.fingerprint = folder, settings, fingerprint(settings)
        self.path = folder / SAMPLES_FILE
        self.entries: dict[SampleKey, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SETTINGS_FILE).exists():
            self._refuse_other_settings()
        elif self.path.exists():
            raise SampleLogError(f"{self.path} has no {SETTINGS_FILE} next to it: choose another folder or delete it")
        else:
            write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        if self.path.exists():
            drop_torn_line(self.path)
            for entry in read_entries(self.path):
                if entry["settings"] != self.fingerprint:
                    raise SampleLogError(
                        f"{self.path} holds an answer made with other settings ({entry['settings']}, not "
                        f"{self.fingerprint}): choose another folder or delete this one"
                    )
                self.entries.setdefault(SampleKey(entry["row"], entry["seed"], entry["index"]), entry)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add answers, each with its `row`, `seed` and `index`, in one write."""
        lines = b""
        for entry in entries:
            entry = {"settings": self.fingerprint, **entry}
            self.entries[SampleKey(entry["row"], entry["seed"], entry["index"])] = entry
            lines += json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(lines)

    def _refuse_other_settings(self) -> None:
        stored = read_json(self.folder / SETTINGS_FILE)
        differences = [
            f"{name} {stored.get(name)!r} (now {self.settings.get(name)!r})"
            for name in sorted(stored.keys() | self.settings.keys())
            if stored.get(name) != self.settings.get(name)
        ]
        if differences:
            raise SampleLogError(
                f"{self.folder} holds answers made with other settings: {', '.join(differences)}; choose another "
                "folder or delete this one"
            )


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The answers in a log file.

    Raises:
        DamagedFileError: names the line that is not an answer.
    """
    entries = read_json_lines(path)
    for number, entry in enumerate(entries, start=1):
        for name, kind in FIELDS.items():
            if not isinstance(entry.get(name), kind):
                raise DamagedFileError(
                    f"{path}, line {number} is not an answer: {name!r} is {entry.get(name)!r}, not of type "
                    f"{kind.__name__}; delete the line, or the file"
                )
    return entries


def write_scores(folder: Path, scores: Mapping[SampleKey, Mapping[str, Any]]) -> None:
    """Keep the scores that count over those in the log."""
    lines = (json.dumps({**asdict(key), "scores": each}, ensure_ascii=False) for key, each in scores.items())
    write_whole(folder / SCORES_FILE, "".join(f"{line}\n" for line in lines))


def read_scored(folder: Path) -> list[dict[str, Any]]:
    """The answers of a run with the scores that count; of a group of benchmarks, those of all its folders.

    Raises:
        DamagedFileError: a file is not what a run writes.
    """
    if not (folder / SAMPLES_FILE).exists():
        return [entry for part in sorted(folder.glob(f"*/{SAMPLES_FILE}")) for entry in read_scored(part.parent)]
    entries = read_entries(folder / SAMPLES_FILE)
    if not (folder / SCORES_FILE).exists():
        return entries
    final: dict[SampleKey, Any] = {}
    for number, line in enumerate(read_json_lines(folder / SCORES_FILE), start=1):
        if not isinstance(line.get("scores"), dict) or not {"row", "seed", "index"} <= line.keys():
            raise DamagedFileError(
                f"{folder / SCORES_FILE}, line {number} holds no scores of an answer: delete the file, and run the same "
                "command again"
            )
        final[SampleKey(line["row"], line["seed"], line["index"])] = line["scores"]
    for entry in entries:
        key = SampleKey(entry["row"], entry["seed"], entry["index"])
        entry["scores"] = final.get(key, entry["scores"])
    return entries
