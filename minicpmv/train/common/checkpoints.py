"""Checkpoints to resume from: which of them are whole.

A run may die at any moment, also while it writes, and disks fill up. Files are therefore opened before a run relies on them;
both formats keep their table of contents where a file that was cut no longer agrees with it.
"""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from minicpmv.train.common.errors import ArgumentsError


logger = logging.getLogger(__name__)

ZIPPED = {".pt", ".pth", ".bin"}  # what torch.save writes


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names; for "last" the newest whole one, None where there is none.

    Raises:
        ArgumentsError: it is not whole, or the output folder has some and nothing was said about them.
    """
    found = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in Path(args.output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name)
    }
    folders = [found[step] for step in sorted(found, reverse=True)]
    if args.resume_from_checkpoint == "last":
        passed_over: list[str] = []
        for folder in folders:
            if (damage := damage_of(folder)) is None:
                if passed_over:
                    logger.warning("Resuming from %s, since %s.", folder, "; ".join(passed_over))
                return str(folder)
            passed_over.append(f"{folder} is not whole ({damage})")
        if passed_over:
            logger.warning("Starting from the beginning, since %s.", "; ".join(passed_over))
        return None
    if args.resume_from_checkpoint is not None:
        damage = damage_of(Path(args.resume_from_checkpoint))
        if damage is not None:
            raise ArgumentsError(
                f"resume_from_checkpoint: {args.resume_from_checkpoint} is not a whole checkpoint: {damage}. Name another "
                "one, or 'last' for the newest that is whole."
            )
        return args.resume_from_checkpoint
    if any(damage_of(folder) is None for folder in folders):
        raise ArgumentsError(
            f"output_dir: {args.output_dir} holds checkpoints of an earlier run. Resume with resume_from_checkpoint: last, "
            "or choose another folder."
        )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint: cut, empty or missing; None when it is whole."""
    state = checkpoint / TRAINER_STATE_NAME  # the trainer writes it last
    try:
        if not json.loads(state.read_text(encoding="utf-8")):
            return f"{state.name} is empty"
    except FileNotFoundError:
        return f"{state.name} is missing"
    except ValueError:  # not JSON, not UTF-8
        return f"{state.name} is damaged"
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{name} is damaged"
        elif file.suffix in ZIPPED and not zipfile.is_zipfile(file):
            return f"{name} is damaged"
    return None
