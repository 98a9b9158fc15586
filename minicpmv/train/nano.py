"""Train nano: a small model of the same architecture, from scratch, on pictures that the repository draws.

    python -m minicpmv.train.nano --config recipes/nano.yaml --output DIR

What is special:
- stages: first the tower alone learns what lies under each patch (dense labels cost nothing, since we draw), then
  resampler and language model learn conversations, with the dense loss kept beside;
- the resampler's queries start spread over the picture, each looking at one spot (`spread_queries`);
- one single-threaded process a core. Each takes the next batch of a step as soon as it is free, and the gradients are
  summed at the end: on shared cores much faster than threads, which wait for each other in every operation;
- everything follows from the recipe and its seed; a run that stopped goes on from `DIR/state.pt`.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from minicpmv.data.collate import (
    IGNORED,
    ConversationEncoder,
    collate,
    layout_key,
    single_turns,
    training_batch,
)
from minicpmv.data.drawing import COLOR_CLASSES, KIND_CLASSES
from minicpmv.data.synthetic import Mixture, make_sample


class RecipeError(ValueError):
    """The recipe names a field that does not exist, or lacks one."""


@dataclass
class Stage:
    """One part of the training; the learning rate warms up, stays, and falls to a twentieth at the end."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float  # of Muon
    mixture: Mixture = field(default_factory=Mixture)
    batches: int = 6  # a step; the processes share them
    answers: bool = True  # False: the tower alone, on dense labels
    dense_weight: float = 0.3
    adamw_share: float = 0.4  # learning rate of AdamW, as a share of Muon's
    warmup: int = 100
    decay: float = 0.2  # share of the steps in which the learning rate falls

    def rate(self, step: int) -> float:
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, max(0.05, left))


@dataclass
class Recipe:
    stages: list[Stage]
    model: str = "nano"  # folder with config and processors
    seed: int = 0
    processes: int = 2
    weight_decay: float = 0.1
    save_minutes: float = 4.0
    validate_every: int = 200
    validation_samples: int = 240

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
            stages = [Stage(**{**stage, "mixture": Mixture(**stage.get("mixture", {}))}) for stage in fields["stages"]]
            return cls(**{**fields, "stages": stages})
        except (TypeError, KeyError) as error:
            raise RecipeError(f"{path}: {error}; fields are those of Recipe, Stage and Mixture") from error


@torch.no_grad()
def spread_queries(resampler) -> None:
    """Start each query at one spot of the picture, so that the tokens begin as a coarse map of it.

    Query i holds the sin-cos position of cell i of a square grid over an 8 x 8 picture. Each head projects queries and
    keys on the highest frequencies of that code, where near and far positions differ most. From a random start the
    queries all see the same average, and it takes most of an hour until they part.
    """
    side = math.isqrt(resampler.num_queries)
    width, head_dim = resampler.embed_dim, resampler.attn.head_dim
    fine = head_dim // 4  # of each axis: so many sines and as many cosines
    quarter = width // 4
    chosen = torch.cat([torch.arange(fine) + quarter * part for part in range(4)])
    spots = (torch.arange(side) + 0.5) * 8 / side - 0.5
    frequencies = 1 / 10000 ** (torch.arange(quarter) / quarter)
    code = torch.cat([torch.sin(spots[:, None] * frequencies), torch.cos(spots[:, None] * frequencies)], dim=1)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, 0)
    keep = torch.zeros(width)
    keep[chosen] = 1
    resampler.query.zero_()
    resampler.query[: side * side] = torch.cat([columns, rows], dim=1) * keep
    pick = torch.zeros(width, width)
    for head in range(width // head_dim):
        pick[torch.arange(head_dim) + head * head_dim, chosen] = 1
    noise = torch.randn_like(resampler.attn.in_proj_weight[: 2 * width]) * 0.01
    resampler.attn.in_proj_weight[: 2 * width] = torch.cat([pick, pick]) + noise


class Trainee(nn.Module):
    """The model with the heads that name what lies under each patch; only the model is kept in the end."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.kind_head = nn.Linear(width, len(KIND_CLASSES))
        self.color_head = nn.Linear(width, len(COLOR_CLASSES))

    def heads(self):
        return [*self.kind_head.parameters(), *self.color_head.parameters()]

    def forward(self, batch: dict, answers: bool = True):
        """Returns the dense loss, the answer loss (0 without answers), and the logits of kinds and words."""
        visual = {name: batch[name] for name in ("pixel_values", "tgt_sizes", "temporal_ids")}
        if answers:
            vision = self.model.get_image_features(**visual)
            patches = vision.last_hidden_state
        else:
            slices = [pixels for sample in visual["pixel_values"] for pixels in sample]
            sizes = [tuple(size) for sample in visual["tgt_sizes"] for size in sample.tolist()]
            patches = self.model.vpm(slices, sizes).last_hidden_state  # [patches, D]
        kinds = self.kind_head(patches).float()
        dense_loss = F.cross_entropy(kinds, batch["kind_labels"], ignore_index=IGNORED)
        colors = self.color_head(patches).float()
        dense_loss = dense_loss + F.cross_entropy(colors, batch["color_labels"], ignore_index=IGNORED)
        if not answers:
            return dense_loss, torch.zeros(()), kinds, None
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            mm_encoder_outputs={"image": vision.pooler_output},
        ).logits.float()
        written = batch["labels"][:, 1:] != IGNORED
        answer_loss = F.cross_entropy(logits[:, :-1][written], batch["labels"][:, 1:][written])
        return dense_loss, answer_loss, kinds, logits


@torch.no_grad()
def validate(trainee: Trainee, encoder: ConversationEncoder, recipe: Recipe, stage: Stage) -> dict:
    """Share of foreground patches named right and, with answers, of questions answered right (each asked alone).

    An answer counts when every word of it is the most likely one after the words before: what greedy search gives.
    """
    samples = [make_sample("validation", recipe.seed, i, stage.mixture) for i in range(recipe.validation_samples)]
    asked = [single for sample in samples for single in (single_turns(sample) if stage.answers else [sample])]
    examples = [(encoder.encode(sample), sample.turns[0].task) for sample in asked]
    examples.sort(key=lambda pair: layout_key(pair[0]))
    named = foreground = 0
    right: dict[str, list[bool]] = {}
    trainee.eval()
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        batch = collate([example for example, _ in part], encoder.tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            _, _, kinds, logits = trainee(batch, stage.answers)
        thing = batch["kind_labels"] > 0
        named += int((kinds.argmax(-1) == batch["kind_labels"])[thing].sum())
        foreground += int(thing.sum())
        if stage.answers:
            labels = batch["labels"][:, 1:]
            rows = ((logits[:, :-1].argmax(-1) == labels) | (labels == IGNORED)).all(1).tolist()
            for (_, task), row in zip(part, rows, strict=True):
                right.setdefault(task, []).append(row)
    trainee.train()
    report = {"patches": round(named / foreground, 3)}
    if right:
        report["answers"] = round(sum(map(sum, right.values())) / sum(map(len, right.values())), 3)
        report |= {task: round(sum(rows) / len(rows), 2) for task, rows in sorted(right.items())}
    return report


def optimizers_of(trainee: Trainee, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, which learns from fewer pictures so; AdamW for all else."""
    inner, other = [], []
    for name, parameter in trainee.named_parameters():
        is_table = any(part in name for part in ("embedding", "embed_tokens", "query", "_head"))
        (inner if parameter.ndim == 2 and not is_table else other).append(parameter)
    muon = torch.optim.Muon(inner, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(other, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def load_untrained(recipe: Recipe) -> tuple[Trainee, ConversationEncoder]:
    torch.manual_seed(recipe.seed)
    config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=True)
    config.vision_batch_size = 4096  # memory is no concern here, and whole batches are faster
    # Eager, because the backward pass of the CPU's flash kernel is slow on sequences this short.
    options = {"trust_remote_code": True, "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModel.from_config(config, **options)
    spread_queries(model.resampler)
    encoder = ConversationEncoder(
        AutoImageProcessor.from_pretrained(recipe.model, trust_remote_code=True),
        AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=True),
    )
    return Trainee(model).train(), encoder


def sum_gradients(trainee: Trainee, stage: Stage) -> None:
    """Add up the gradients of all processes. A process that got no batch in this step gives zeros."""
    used = trainee.parameters() if stage.answers else [*trainee.model.vpm.parameters(), *trainee.heads()]
    used = list(used)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(flat)
    for parameter, summed in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = summed.view_as(parameter)


class Run:
    """What a run keeps on disk: `state.pt`, from which it goes on, and `log.jsonl`. Only process 0 writes."""

    def __init__(self, trainee: Trainee, optimizers, output: Path, rank: int):
        self.trainee, self.optimizers, self.output, self.rank = trainee, optimizers, output, rank
        self.progress = {"stage": 0, "step": 0, "batches": 0, "samples": 0, "seconds": 0.0}
        self.saved = time.monotonic()
        if (output / "state.pt").exists():
            state = torch.load(output / "state.pt", weights_only=True)
            trainee.load_state_dict(state["trainee"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.progress = state["progress"]

    def save(self) -> None:
        self.saved = time.monotonic()
        if self.rank == 0:
            partial = self.output / "state.partial"
            state = {"trainee": self.trainee.state_dict(), "progress": self.progress}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save(state, partial)
            partial.replace(self.output / "state.pt")  # a run that dies here leaves the older state whole

    def log(self, **entry) -> None:
        if self.rank == 0:
            entry = {key: self.progress[key] for key in ("stage", "step", "samples")} | entry
            entry["minutes"] = round(self.progress["seconds"] / 60, 2)
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def run_stage(run: Run, encoder: ConversationEncoder, recipe: Recipe, stage: Stage, store) -> None:
    """All steps of a stage; `store` hands out the batches of a step to the processes (None: there is one process)."""
    trainee, progress = run.trainee, run.progress
    bar = tqdm(initial=progress["step"], total=stage.steps, desc=stage.name, disable=run.rank > 0)
    averages, began = {}, time.monotonic()
    for step in range(progress["step"], stage.steps):
        trainee.zero_grad()
        taken = 0
        while True:
            taken = taken + 1 if store is None else store.add(f"{stage.name}/{step}", 1)
            if taken > stage.batches:
                break
            number = progress["batches"] + taken - 1
            batch = training_batch(encoder, stage.mixture, stage.batch_size, recipe.seed, number)
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                dense_loss, answer_loss, _, _ = trainee(batch, stage.answers)
                loss = answer_loss + (stage.dense_weight if stage.answers else 1.0) * dense_loss
                (loss / stage.batches).backward()
            for name, value in (("dense", dense_loss.item()), ("answer", answer_loss.item())):
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
        if store is not None:
            sum_gradients(trainee, stage)
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer, share in zip(run.optimizers, (1.0, stage.adamw_share), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * stage.rate(step)
            optimizer.step()
        bar.set_postfix({name: f"{value:.3f}" for name, value in averages.items()}, refresh=False)
        bar.update()
        progress["step"], progress["batches"] = step + 1, progress["batches"] + stage.batches
        progress["samples"] += stage.batches * stage.batch_size
        if (step + 1) % 50 == 0:
            run.log(**{name: round(value, 4) for name, value in averages.items()})
        if run.rank == 0 and ((step + 1) % recipe.validate_every == 0 or step + 1 == stage.steps):
            report = validate(trainee, encoder, recipe, stage)
            run.log(validation=report)
            bar.write(f"{stage.name} {step + 1}: {report}")
        progress["seconds"] += time.monotonic() - began
        began = time.monotonic()
        if began - run.saved > 60 * recipe.save_minutes:
            run.save()
    bar.close()


def train(rank: int, recipe: Recipe, output: Path, rendezvous: str | None = None) -> Trainee:
    """Run all stages as process `rank` of `recipe.processes`; alone when there is no rendezvous file."""
    torch.set_num_threads(1)
    store = None
    if rendezvous is not None:
        store = dist.FileStore(rendezvous, recipe.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.processes)
    trainee, encoder = load_untrained(recipe)
    run = Run(trainee, optimizers_of(trainee, recipe.weight_decay), output, rank)
    for number, stage in enumerate(recipe.stages):
        if number < run.progress["stage"]:
            continue
        run_stage(run, encoder, recipe, stage, store)
        run.progress.update(stage=number + 1, step=0)
        run.save()
    if rank == 0:
        export(trainee, Path(recipe.model), output / "model")
    if store is not None:
        dist.destroy_process_group()
    return trainee


def export(trainee: Trainee, model_folder: Path, output: Path) -> None:
    """Write model.safetensors (bfloat16) and the settings beside it: a folder for `from_pretrained`."""
    output.mkdir(parents=True, exist_ok=True)
    with_weights = trainee.model.to(torch.bfloat16)
    with_weights.save_pretrained(output)
    # The settings are those of the model folder, not a rewritten copy; its code files are taken too.
    for file in sorted(model_folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".py"):
            shutil.copyfile(file, output / file.name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument("--output", type=Path, required=True, help="folder for state, log and the trained model")
    args = parser.parse_args(argv)
    try:
        recipe = Recipe.load(args.config)
    except (RecipeError, OSError) as error:
        sys.exit(f"error: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        torch.multiprocessing.spawn(train, (recipe, args.output, rendezvous), nprocs=recipe.processes)
    print(f"{args.output / 'model'} holds the trained model")


if __name__ == "__main__":
    main()
