"""Every answer of a run, on disk as soon as it is there: what makes a run resumable and its mistakes readable.

What is special:
- `samples.jsonl` is only ever appended to, a line an answer; a line that a kill cut in half is dropped when the log is
  opened again;
- each line carries the fingerprint of the settings it was made with (`settings.json` spells them out), and a log with
  other settings is refused: answers of two settings never share a file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple


SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"


class SampleLogError(ValueError):
    """A log cannot be continued: it was made with other settings, or it is damaged."""


class SampleKey(NamedTuple):
    row: str
    seed: int
    index: int


def fingerprint(settings: dict) -> str:
    """16 hexadecimal digits that stand for the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class SampleLog:
    """The answers of one setting, by (row, seed, index).

    Args:
        folder: made if it is not there.
        settings: everything that answers depend on, apart from the key; anything that JSON can hold.

    Raises:
        SampleLogError: the folder holds answers of other settings (names what differs), or a broken line.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings, self.fingerprint = folder, settings, fingerprint(settings)
        self.path = folder / SAMPLES_FILE
        self.entries: dict[SampleKey, dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SETTINGS_FILE).exists():
            self._refuse_other_settings()
        elif self.path.exists():
            raise SampleLogError(f"{self.path} has no {SETTINGS_FILE} beside it: choose another folder or delete it")
        else:
            write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        if self.path.exists():
            self._drop_torn_line()
            for entry in read_entries(self.path):
                if entry["settings"] != self.fingerprint:
                    raise SampleLogError(
                        f"{self.path} holds an answer made with other settings ({entry['settings']}, not "
                        f"{self.fingerprint}): choose another folder or delete this one"
                    )
                self.entries.setdefault(SampleKey(entry["row"], entry["seed"], entry["index"]), entry)

    def append(self, entries: list[dict]) -> None:
        """Add answers, each with its `row`, `seed` and `index`, in one write."""
        lines = b""
        for entry in entries:
            entry = {"settings": self.fingerprint, **entry}
            self.entries[SampleKey(entry["row"], entry["seed"], entry["index"])] = entry
            lines += json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(lines)

    def _refuse_other_settings(self) -> None:
        path = self.folder / SETTINGS_FILE
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(stored.keys() | self.settings.keys())
        differences = [
            f"{name} {stored.get(name)!r} (now {self.settings.get(name)!r})"
            for name in names
            if stored.get(name) != self.settings.get(name)
        ]
        if differences:
            raise SampleLogError(
                f"{self.folder} holds answers made with other settings: {', '.join(differences)}; choose another "
                "folder or delete this one"
            )

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def read_entries(path: Path) -> list[dict]:
    """The answers in a log file.

    Raises:
        SampleLogError: names the line that is no answer.
    """
    entries = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SampleLogError(
                    f"{path}, line {number} is not JSON ({error}): delete the line, or the file"
                ) from error
    return entries


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
