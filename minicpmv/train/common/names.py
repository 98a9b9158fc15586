"""Names of models and data, checked without importing anything heavy: a run that misses one is refused at once."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from minicpmv.train.common.errors import ArgumentsError


MODEL_FLAGS = ("--model_name_or_path", "--model-name-or-path", "--model", "-m")
DATA_FLAGS = ("--dataset_name", "--dataset-name")
DATA_SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".yaml", ".yml"}


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith(".")


def check_model_name(name: str | None) -> None:
    """A folder with a whole model in it, or a name on the Hub.

    Raises:
        ArgumentsError: it is neither.
    """
    if not name:
        raise ArgumentsError("model_name_or_path is missing: the folder of the model, or its name on the Hub.")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if is_hub_name(name):
            return
        raise ArgumentsError(f"model_name_or_path: {name} is neither a folder nor of the form owner/name.")
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ArgumentsError(
            f"model_name_or_path: {name} holds only an adapter. Merge it first: minicpmv train merge {name} OUTPUT."
        )
    raise ArgumentsError(f"model_name_or_path: {name} has no config.json, so it is not a model folder.")


def check_data_name(option: str, name: str) -> None:
    """A file or folder that exists, or a name on the Hub.

    Raises:
        ArgumentsError: it is neither.
    """
    is_file_name = Path(name).suffix in DATA_SUFFIXES or not is_hub_name(name)
    if is_file_name and not Path(name).expanduser().exists():
        raise ArgumentsError(f"{option}: {name} does not exist.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest of `known`, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=2)
    return f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def refuse_early(argv: Sequence[str]) -> None:
    """Check model and data of a command line before the seconds that importing TRL takes. All else is the parser's.

    Raises:
        ArgumentsError: one of them is missing, or there is no such folder or file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(*MODEL_FLAGS, dest="model_name_or_path")
    parser.add_argument(*DATA_FLAGS, dest="dataset_name")
    if any(argument in ("-h", "--help") for argument in argv):
        return
    given, others = parser.parse_known_args(argv)
    options = {name: value for name, value in vars(given).items() if value is not None}
    if any(did_you_mean(other.split("=")[0], (*MODEL_FLAGS, *DATA_FLAGS)) for other in others):
        return  # misspelled: the parser names the right one
    if given.config is not None:
        try:
            options = yaml.safe_load(Path(given.config).read_text(encoding="utf-8")) | options
        except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError):
            return  # the parser says what is wrong with the file
    check_model_name(options.get("model_name_or_path"))
    if options.get("dataset_name"):
        check_data_name("dataset_name", str(options["dataset_name"]))
