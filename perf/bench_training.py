"""Samples a second of supervised fine-tuning, as a share of what forward and backward passes alone allow.

Both are measured in the same run on the same samples: first the trainer (reading, collating, forward, backward, clipping,
optimizer, logging), then forward and backward passes on the same batches, ready made, which nothing can leave out. Times
are those of the CPU, so that other programs on the machine count little.

    python perf/bench_training.py [--model nano] [--adapters none lora] [--steps 20] [--batch_size 6]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from minicpmv.train import sft
from minicpmv.train.common import arguments


REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps that are not counted


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - getattr(self, "start", 0)


def measure(model: str, adapter: str, steps: int, batch_size: int) -> tuple[float, float]:
    """Seconds a step takes in the trainer, and with forward and backward alone."""
    with tempfile.TemporaryDirectory() as output:
        options = {
            "model_name_or_path": model,
            "adapter": adapter,
            "dataset_name": REPOSITORY / "assets/conversations.jsonl",
            "output_dir": output,
            "max_steps": steps + WARM_UP,
            "per_device_train_batch_size": batch_size,
            "learning_rate": 1e-5,
            "gradient_checkpointing": False,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        trainer = sft.make_trainer(*arguments.parse(sft.GROUPS, flags))
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    batches = list(trainer.get_train_dataloader())
    seconds = 0.0
    for step in range(steps + WARM_UP):
        batch = dict(batches[step % len(batches)])
        trainer.model.zero_grad()
        start = time.process_time()
        trainer.model(**batch, use_cache=False).loss.backward()
        if step >= WARM_UP:
            seconds += time.process_time() - start
    return clock.seconds / steps, seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / "nano"))
    parser.add_argument("--adapters", nargs="+", default=["none", "lora"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=6)
    options = parser.parse_args()
    rows = [
        (adapter, *measure(options.model, adapter, options.steps, options.batch_size)) for adapter in options.adapters
    ]
    print(f"\n{options.batch_size} samples a step, {options.steps} steps, {torch.get_num_threads()} threads, CPU time")
    print(f"{'adapter':10}{'samples/s':>12}{'passes alone':>16}{'share':>8}")
    for adapter, training, passes in rows:
        print(
            f"{adapter:10}{options.batch_size / training:12.1f}{options.batch_size / passes:16.1f}{passes / training:8.2f}"
        )


if __name__ == "__main__":
    main()
