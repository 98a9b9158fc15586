"""Opens a data set by name: its records, one for each question, and the videos and subtitles beside them.

What is special:
- files that hold a video with several questions are flattened, since a record is a question;
- `video` of a record is what `Data.media` takes, whatever the data set; files are found by their path or, since archives
  unpack differently from year to year, by their name anywhere below the data set's folder.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from minicpmv.evaluate.data_sets.catalog import DataSet, find_data_set
from minicpmv.evaluate.data_sets.locate import MissingDataError, find
from minicpmv.evaluate.data_sets.records import (
    BrokenRecordError,
    JsonLines,
    KeptRecords,
    Record,
    Records,
    Table,
    read_json_lines,
    read_json_list,
    read_parquet,
)


MLVU_TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")
# Columns that a table must have, that hold Python lists, and that hold JSON, where it is not "index, question, image" alone.
CHOICES = ("index", "question", "A", "B", "answer", "image")
COLUMNS: dict[str, tuple[str, ...]] = {
    "mmbench_dev_en": (*CHOICES, "category", "l2-category"),
    "mmbench_dev_cn": (*CHOICES, "category", "l2-category"),
    "mmbench_test_en": CHOICES[:4],
    "mmbench_test_cn": CHOICES[:4],
    "mmstar": CHOICES,
    "mmmu": ("index", "question", "answer", "split", "image"),
    "mathvista": ("index", "question", "question_type", "answer_type", "choices", "answer", "image"),
    "hallusionbench": ("index", "question", "answer", "l2-category"),
    "ai2d": CHOICES,
    "ocrbench": ("index", "question", "answer", "category", "image"),
    "ocrbench_v2": ("index", "question", "answer", "category", "image"),
    "omnidocbench": ("index", "answer", "image"),
    "refcoco": ("index", "question", "split", "image"),
}
LISTS: dict[str, tuple[str, ...]] = {
    "mathvista": ("choices",),
    "ocrbench": ("answer",),
    "docvqa": ("answer",),
    "textvqa": ("answer",),
    "ocrbench_v2": ("answer",),
}
OBJECTS: dict[str, tuple[str, ...]] = {"omnidocbench": ("answer",)}
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".MP4")


@dataclass
class Data:
    """A data set on this machine.

    id: as in the catalog.
    folder: below which its files lie.
    records: a question each; `image` is a list of image files (bytes), `video` a name for `media`.
    """

    id: str
    folder: Path
    records: Records

    @property
    def fingerprint(self) -> str:
        """MD5 of the files: other files are another setting."""
        return self.records.digest

    @cached_property
    def _files_by_name(self) -> dict[str, Path]:
        """Every file below the folder, by its name; of several of one name the first in alphabetical order."""
        found: dict[str, Path] = {}
        for place, folders, names in os.walk(self.folder, followlinks=True):
            folders.sort()
            for name in names:
                found.setdefault(name, Path(place, name))
        return found

    def media(self, name: str) -> Path:
        """A video, subtitle or image file by the name that a record gives it.

        Raises:
            MissingDataError: it is not below the folder.
        """
        stem = PurePosixPath(name)
        alike = [stem] + [stem.with_suffix(suffix) for suffix in VIDEO_SUFFIXES if stem.suffix in VIDEO_SUFFIXES]
        for path in (self.folder / one for one in alike):
            if path.is_file():
                return path
        for one in alike:
            if one.name in self._files_by_name:
                return self._files_by_name[one.name]
        raise MissingDataError(
            f"{self.id}: there is no {stem.name} below {self.folder}: `minicpmv evaluate get {self.id}` fetches what the "
            "source has; what it has not has to be put there by hand (docs/evaluation.md says which)"
        )


def open_data(id: str, *, folder: Path | None = None, fixtures: bool = False) -> Data:
    """A data set on this machine.

    Args:
        id: as in the catalog.
        folder: where its files lie; None: $LMUData, the user's cache, ~/LMUData, the Hub's cache.
        fixtures: about 20 drawn questions in the same files, instead of the real ones.

    Raises:
        UnknownDataSetError, MissingDataError, BrokenRecordError: before any question is asked.
    """
    data_set = find_data_set(id)
    if fixtures:
        from minicpmv.evaluate.fixtures import fixture_folder

        folder = fixture_folder()
    place = find(data_set, folder)
    path = place / data_set.annotation
    return Data(data_set.id, place, _records(data_set, path))


def _records(data_set: DataSet, path: Path) -> Records:
    if data_set.id in READERS:
        return READERS[data_set.id](path)
    return Table(
        path,
        COLUMNS.get(data_set.id, ("index", "question", "image")),
        LISTS.get(data_set.id, ()),
        OBJECTS.get(data_set.id, ()),
    )


def _video_mme(path: Path) -> Records:
    records = [
        record | {"video": f"{record.get('videoID')}.mp4", "subtitle": f"subtitle/{record.get('videoID')}.srt"}
        for record in read_parquet(path)
    ]
    fields = ("videoID", "duration", "task_type", "question_id", "question", "options", "answer")
    return KeptRecords([path], records, fields)


def _lvbench(path: Path) -> Records:
    records = _flattened(path, read_json_lines(path), "qa", ("key", "type", "video_info"))
    return KeptRecords(
        [path],
        [record | {"video": f"videos/{record.get('key')}.mp4"} for record in records],
        ("key", "uid", "question", "answer", "question_type"),
    )


def _mlvu(path: Path) -> Records:
    files = [path.with_name(f"{task}.json") for task in MLVU_TASKS]
    if absent := [file.name for file in files if not file.is_file()]:
        raise MissingDataError(f"{path.parent} lacks {', '.join(absent)}: `minicpmv evaluate get mlvu` fetches them")
    records = [
        record | {"task": file.stem, "video": f"MLVU/video/{file.stem}/{record.get('video')}"}
        for file in files
        for record in read_json_list(file)
    ]
    return KeptRecords(files, records, ("duration", "question", "candidates", "answer"))


def _long_video_bench(path: Path) -> Records:
    records = [
        record
        | {"video": f"videos/{record.get('video_path')}", "subtitle": f"subtitles/{record.get('subtitle_path')}"}
        for record in read_json_list(path)
    ]
    fields = ("video_path", "question", "candidates", "correct_choice", "duration_group", "subtitle_path")
    return KeptRecords([path], records, fields)


def _motion_bench(path: Path) -> Records:
    kept = ("key", "video_path", "video_type", "question_type", "video_info")
    records = _flattened(path, read_json_lines(path), "qa", kept)
    return KeptRecords(
        [path],
        [record | {"video": record.get("video_path")} for record in records],
        ("key", "uid", "video_path", "question", "answer", "question_type"),
    )


def _favor_bench(path: Path) -> Records:
    records = _flattened(path, read_json_list(path), "questions", ("video_name",))
    return KeptRecords(
        [path],
        [record | {"video": f"videos/FAVOR-Bench/{_with_suffix(record.get('video_name', ''))}"} for record in records],
        ("video_name", "question", "options", "correct_answer", "task_type"),
    )


def _with_suffix(name: str) -> str:
    return name if name.endswith(VIDEO_SUFFIXES) else f"{name}.mp4"


def _flattened(path: Path, videos: list[Record], questions: str, kept: tuple[str, ...]) -> list[Record]:
    """A record for each question, with what is `kept` of its video."""
    records = []
    for number, video in enumerate(videos, start=1):
        asked = video.get(questions)
        if not isinstance(asked, list) or not all(isinstance(question, dict) for question in asked):
            raise BrokenRecordError(path, number, f"{questions!r} is not a list of questions")
        shared = {name: video[name] for name in kept if name in video}
        records += [shared | question for question in asked]
    return records


class _PicturesBeside(KeptRecords):
    """Records of MMHal-Bench: each names an address, and the image lies in images/ under its last part."""

    def read(self, index: int) -> Record:
        record = super().read(index)
        name = PurePosixPath(record["image_src"]).name
        for place in ("images", "test_data/images"):
            if (path := self.files[0].parent / place / name).is_file():
                return record | {"image": [path.read_bytes()]}
        raise MissingDataError(
            f"{self.files[0]}, row {index + 1}: there is no {name} in {self.files[0].parent / 'images'}: "
            "`minicpmv evaluate get mmhal` brings the images"
        )

    def without_images(self) -> Any:
        return (dict(record) for record in self.records)


def _mmhal(path: Path) -> Records:
    return _PicturesBeside([path], read_json_list(path), ("image_src", "image_content", "question", "gt_answer"))


def _object_hal_bench(path: Path) -> Records:
    return JsonLines(path, ("image_id", "question", "image"))


READERS: dict[str, Callable[[Path], Records]] = {
    "videomme": _video_mme,
    "lvbench": _lvbench,
    "mlvu": _mlvu,
    "longvideobench": _long_video_bench,
    "motionbench": _motion_bench,
    "favorbench": _favor_bench,
    "mmhal": _mmhal,
    "objhal": _object_hal_bench,
}


# --- Subtitles ---

SRT_TIME = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}[,.]\d{1,3})\s*-->\s*(\d+):(\d{1,2}):(\d{1,2}[,.]\d{1,3})")
SRT_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")
CLOCK = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")


def read_subtitles(path: Path) -> list[tuple[float, float, str]]:
    """(start, end, text) with times in seconds: of a SubRip file, or of LongVideoBench's JSON in both of its forms.

    Raises:
        BrokenRecordError: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        return _srt(text) if path.suffix == ".srt" else [_json_entry(entry) for entry in json.loads(text)]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BrokenRecordError(path, "the whole file", f"not subtitles ({error!r})") from error


def _srt(text: str) -> list[tuple[float, float, str]]:
    entries = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        if match := SRT_TIME.search(block):
            parts = match.groups()
            words = " ".join(SRT_MARKUP.sub("", block[match.end() :]).split())
            if words:
                entries.append((_seconds(":".join(parts[:3])), _seconds(":".join(parts[3:])), words))
    return entries


def _json_entry(entry: dict[str, Any]) -> tuple[float, float, str]:
    start, end = entry["timestamp"] if "timestamp" in entry else (entry["start"], entry["end"])
    text = entry["text"] if "text" in entry else entry["line"]
    return _seconds(start), _seconds(start if end is None else end), str(text)


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (match := CLOCK.fullmatch(value.strip())):
        hours, minutes, rest = match.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))
    return float(value)
