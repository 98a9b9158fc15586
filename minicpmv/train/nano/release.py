"""The files that take the place of nano's own, out of what a run trained.

    python -m minicpmv.train.nano.release --weights DIR --logs DIR... --output DIR

What is special:
- the weights are stored in bfloat16, whatever the last stage trained in; the settings are nano's, but for the depth;
- logs and curves of the runs go into `training/`, named by the runs.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel

from minicpmv.errors import one_line_errors
from minicpmv.train.nano.pretrain import export


def release(weights: Path, logs: Sequence[Path], output: Path, model: Path = Path("nano")) -> None:
    """Write the folder `output`: a checkpoint as `model` is one, with the weights of `weights`, and what the runs logged.

    Args:
        weights: folder of the trained checkpoint.
        logs: folders of the runs of `minicpmv.train.nano` that it went through.
        model: folder whose settings, processor and code are taken.
    """
    trained = AutoModel.from_pretrained(weights, trust_remote_code=True, dtype=torch.float32)
    export(trained, model, output)
    (output / "training").mkdir()
    for run in logs:
        for file in ("log.jsonl", "curves.png"):
            shutil.copyfile(run / file, output / "training" / f"{run.name}{Path(file).suffix}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv.train.nano.release", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="Folder of the trained checkpoint.")
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="Folders of the runs, in order.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write; what it holds is replaced.")
    args = parser.parse_args(argv)
    with one_line_errors(OSError):
        release(args.weights, args.logs, args.output)
    print(f"{args.output} holds what takes the place of nano's files")


if __name__ == "__main__":
    main()
