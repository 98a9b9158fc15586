"""What became of every prompt, as JSON lines: a run that was stopped goes on from them.

What is special:
- one file for each process, and all of them are read: the number of processes may change from run to run;
- the first line of a file says how its answers were made, and a run with other options is refused;
- a line that a killed run left unfinished is cut off, a line that is damaged is an error.
"""

import json
from pathlib import Path

from minicpmv.files import drop_torn_line
from minicpmv.train.common.errors import TrainingError


class FeedbackLog:
    """One JSON line a prompt, in one file for each process; the first line of a file says how the answers were made."""

    def __init__(self, folder: Path, settings: dict, process: int = 0):
        self.settings = settings
        self.records: dict[int, dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._read(path)
        self.path = folder / f"answers-{process:03d}.jsonl"
        if self.path.exists():
            drop_torn_line(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            self._write([{"settings": settings}])

    def _read(self, path):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break  # a run was killed while it wrote
            try:
                record = json.loads(line)
                if not (isinstance(record["settings"], dict) if "settings" in record else record["prompt"] >= 0):
                    raise TypeError("neither settings nor what became of a prompt")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise TrainingError(f"{path}, line {number + 1} is damaged ({error}). Delete the line.") from error
            if "settings" not in record:
                self.records[record["prompt"]] = record
            elif record["settings"] != self.settings:
                changed = [name for name in self.settings if record["settings"].get(name) != self.settings[name]]
                name = changed[0] if changed else "the options"
                raise TrainingError(
                    f"{path} was made with {name} = {record['settings'].get(name)!r}, not {self.settings.get(name)!r}. "
                    "Take another output_dir, or the same options to go on."
                )

    def add(self, records: list[dict]) -> None:
        self.records |= {record["prompt"]: record for record in records}
        self._write(records)

    def _write(self, records):
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
