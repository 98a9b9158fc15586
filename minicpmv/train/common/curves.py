"""What a run logs, as `log.csv` (columns step, name, value) and as an image `curves.png`, in its output folder.

Any trainer of transformers or TRL can carry it: it takes whatever names are logged. A run that continues from a checkpoint
rewrites the file from the checkpoint's history, so that no step is in it twice.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def is_measure(name: str) -> bool:
    """Whether a logged name is worth drawing: no counter, no time, no sum over the whole run."""
    counters = ("step", "epoch", "runtime", "per_second", "total_flos", "num_tokens", "num_input_tokens_seen")
    return not name.endswith(counters) and name != "train_loss"


class LossCurves(TrainerCallback):
    """Writes the log and draws the curves of a run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._write(args, state.log_history, "w")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._write(args, state.log_history[-1:], "a")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, Path(args.output_dir) / "curves.png")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_save(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_save(args, state, control)

    @staticmethod
    def _write(args, entries, mode):
        path = Path(args.output_dir) / "log.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if mode == "w":
                writer.writerow(("step", "name", "value"))
            for entry in entries:
                writer.writerows((entry["step"], name, value) for name, value in entry.items() if name != "step")


def draw(history: Sequence[dict[str, Any]], path: Path, unit: str = "step") -> None:
    """One panel a measure, training and evaluation in the same; nothing without two points of anything.

    Args:
        history: entries {"step": number, measure: value, ...}; `unit` says what the number counts.
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in history:
        for name, value in entry.items():
            if is_measure(name) and isinstance(value, (int, float)):
                curves[name].append((entry["step"], value))
    curves = {name: points for name, points in curves.items() if len(points) > 1 or name.startswith("eval_")}
    panels = list(dict.fromkeys(name.removeprefix("eval_") for name in curves))
    if not panels:
        return
    from matplotlib.figure import Figure  # not pyplot: its back ends want a screen
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(4 * min(3, len(panels)), 3 * -(-len(panels) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        for name in (panel, f"eval_{panel}"):
            if name in curves:
                axis.plot(*zip(*curves[name], strict=True), "o-" if len(curves[name]) < 20 else "-", ms=3, label=name)
        axis.set_title(panel)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
        if f"eval_{panel}" in curves:
            axis.legend()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path)
