"""Train nano: a small model of the same architecture, from scratch, on images that the repository draws.

    python -m minicpmv.train.nano --config recipes/nano/pretraining.yaml --output DIR [--weights DIR] [--minutes N [--finish]]

What is special:
- stages: first the tower alone learns what lies under each patch (dense labels cost nothing, since we draw), then
  resampler and language model learn conversations, with the dense loss kept beside;
- the resampler's queries start spread over the image, each looking at one spot (`spread_queries`), and a reader that exists in
  training alone asks the tokens what lies at each place, so that they carry it before an answer needs it;
- on a CPU one single-threaded process a core. Each takes the next batch of a step as soon as it is free: on shared cores
  much faster than threads, which wait for each other in every operation. On a GPU one process trains, all batches of a
  step at once (`packed`), and all other cores draw;
- the gradients of a step are summed in the order of its batches, whoever made them: on a CPU the weights are, bit for bit,
  the same from any number of processes, and from a run that was killed and goes on from `DIR/state.pt`. On a GPU it goes on
  too, but attention with a mask has no backward pass there that gives the same bits twice;
- a stage may begin with more layers than the one before (`growth`).

What it leaves in DIR: the trained model in `model/`, the log and its curves.
"""

import argparse
import copy
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from minicpmv.checkpoint import attend_without_plans
from minicpmv.drawn.samples import Mixture, make_sample
from minicpmv.errors import one_line_errors
from minicpmv.files import read_json, read_json_lines, write_whole
from minicpmv.train.common.curves import draw
from minicpmv.train.common.errors import ArgumentsError, TrainingError
from minicpmv.train.common.precision import fast_products
from minicpmv.train.nano.batches import DrawnBatches, SampleEncoder, layout_key, single_turns
from minicpmv.train.nano.growth import deepened, layer_counts
from minicpmv.train.nano.muon import BatchedMuon
from minicpmv.train.nano.packed import PackedSteps, Tables, packed_losses, unbundled
from minicpmv.train.nano.trainee import Trainee, spread_queries


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
    tower_views: int = (
        10**9
    )  # the tower learns from batches with up to so many views: more cost more than they teach it
    adamw_share: float = 0.4  # learning rate of AdamW, as a share of Muon's
    layers: dict[str, int] = field(default_factory=dict)  # of "llm" and "tower", from this stage on
    warmup: int = 100
    decay: float = 0.2  # share of the steps in which the learning rate falls
    again: int = (
        0  # every other step repeats the one drawn so many draws before: for a GPU that is faster than the drawing
    )

    def __post_init__(self):
        self.learning_rate = float(self.learning_rate)  # YAML takes 1e-3, without a point, for text

    def rate(self, step: int, time_left: float = 1.0) -> float:
        """The learning rate of a step; `time_left` is the share of the time that is left, where time is what ends it."""
        left = min(time_left, (self.steps - step) / self.steps) / max(1 / self.steps, self.decay)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, max(0.05, left))

    def drawn_step(self, step: int) -> int:
        """The number of the draw that a step learns from."""
        return step // 2 - self.again * (step % 2) if self.again else step

    def loss(self, dense: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return answer + (self.dense_weight if self.answers else 1.0) * dense


@dataclass
class Recipe:
    stages: list[Stage]
    model: str = "nano"  # folder with config and processors
    weights: str | None = None  # folder of the weights to begin with; from nothing without it
    seed: int = 0
    first_batch: int = 0  # a later run counts on, so that it draws other samples
    processes: int = 2  # on a CPU
    compiles: bool = False  # on a CPU: twice as fast there, and takes a C++ compiler
    weight_decay: float = 0.1
    save_minutes: float = 4.0
    validate_every: int = 200
    validation_samples: int = 240

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a recipe.

        Raises:
            ArgumentsError: it cannot be read, names a field that does not exist, or lacks one.
        """
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
            stages = [
                Stage(**{**stage, "mixture": Mixture.read(stage.get("mixture", {}), path)})
                for stage in fields["stages"]
            ]
            return cls(**{**fields, "stages": stages})
        except OSError as error:
            raise ArgumentsError(f"--config: {path} cannot be read: {error.strerror}") from error
        except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
            raise ArgumentsError(f"{path}: {error}; fields are those of Recipe, Stage and Mixture") from error


class Validation:
    """Samples of the validation set as a stage's mixture has them, drawn once."""

    def __init__(self, encoder: SampleEncoder, recipe: Recipe, stage: Stage):
        samples = [make_sample("validation", recipe.seed, i, stage.mixture) for i in range(recipe.validation_samples)]
        asked = [single for sample in samples for single in (single_turns(sample) if stage.answers else [sample])]
        self.examples = [(encoder.encode(sample), sample.turns[0].task) for sample in asked]
        self.examples.sort(key=lambda pair: layout_key(pair[0]))
        self.encoder, self.answers = encoder, stage.answers

    @torch.no_grad()
    def report(self, trainee: Trainee) -> dict:
        """Share of foreground patches named right and, with answers, of questions answered right (each asked alone).

        An answer counts when every word of it is the most likely one after the words before: what greedy search gives.
        """
        named = foreground = 0
        right: dict[str, list[bool]] = {}
        trainee.eval()
        for start in range(0, len(self.examples), 64):
            part = self.examples[start : start + 64]
            batch = to_device(self.encoder.batch([example for example, _ in part]), trainee.device)
            with fast_products(trainee.device):
                _, _, kinds, right_rows = trainee(batch, self.answers)
            kind_labels = batch["patch_labels"]["kind"]
            thing = kind_labels > 0
            named += int((kinds.argmax(-1) == kind_labels)[thing].sum())
            foreground += int(thing.sum())
            if self.answers:
                for (_, task), row in zip(part, right_rows.tolist(), strict=True):
                    right.setdefault(task, []).append(row)
        trainee.train()
        report = {"patches": round(named / max(1, foreground), 3)}
        if right:
            report["answers"] = round(sum(map(sum, right.values())) / sum(map(len, right.values())), 3)
            report |= {task: round(sum(rows) / len(rows), 2) for task, rows in sorted(right.items())}
        return report


def to_device(value: Any, device: torch.device) -> Any:
    """A batch, its tensors in lists and all, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [to_device(part, device) for part in value]
    return value


def optimizers_of(trainee: Trainee, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, which learns from fewer images so; AdamW for all else."""
    inner: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        is_table = any(part in name for part in ("embedding", "embed_tokens", "query", "lm_head", "heads."))
        (inner if parameter.ndim == 2 and not is_table else other).append(parameter)
    muon = BatchedMuon(inner, lr=0.0, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(other, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def packs_steps(device: torch.device) -> bool:
    """Whether all batches of a step go through the network at once: on a CPU each fits its caches better alone."""
    return device.type != "cpu"


def model_options(device: torch.device) -> dict[str, Any]:
    # Eager on a CPU, because the backward pass of its flash kernel is slow on sequences this short.
    attention = "sdpa" if packs_steps(device) else "eager"
    return {"trust_remote_code": True, "dtype": torch.float32, "attn_implementation": attention}


def load_start(recipe: Recipe, device: torch.device) -> tuple[Trainee, SampleEncoder]:
    """The model at the beginning of a run, from nothing or from the recipe's weights; and the encoder of its samples."""
    torch.manual_seed(recipe.seed)
    if recipe.weights is not None:
        model = AutoModel.from_pretrained(recipe.weights, **model_options(device))
    else:
        config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=True)
        model = AutoModel.from_config(config, **model_options(device))
        spread_queries(model.resampler)
    processor = AutoProcessor.from_pretrained(recipe.model, trust_remote_code=True)
    return Trainee(model).train(), SampleEncoder(processor)


def ready(trainee: Trainee, recipe: Recipe, device: torch.device) -> Trainee:
    """The trainee on its device; on a CPU its layers are compiled if the recipe says so. On a GPU that took over a minute of ten."""
    trainee.to(device)
    trainee.model.config.vision_batch_size = 4096  # memory is no concern here, and whole batches are faster
    if recipe.compiles and device.type == "cpu":
        for layer in trainee.model.llm.model.layers:
            layer.compile(dynamic=True)
        for layer in trainee.model.vpm.encoder.layers:
            layer.mlp.compile(dynamic=True)
    return trainee


def grow(trainee: Trainee, layers: dict[str, int], device: torch.device) -> Trainee:
    """The same trainee with more layers, which change nothing yet."""
    grown = Trainee(deepened(trainee.model, layers, **model_options(device))).train()
    helpers = {name: part for name, part in trainee.state_dict().items() if not name.startswith("model.")}
    grown.load_state_dict(grown.state_dict() | helpers)
    return grown


class Gradients:
    """The gradients of one step, batch by batch, to be summed in order."""

    def __init__(self, trainee: Trainee, stage: Stage):
        used = (
            trainee.parameters()
            if stage.answers
            else [*trainee.model.vpm.parameters(), *trainee.tower_heads.parameters()]
        )
        self.parameters = list(used)
        self.batches: dict[int, torch.Tensor] = {}
        self.count = stage.batches

    def take(self, batch: int) -> None:
        """Move the gradients of the backward pass that was to those of a batch."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.batches[batch] = torch.cat([part.flatten() for part in parts])
        for parameter in self.parameters:
            parameter.grad = None

    def sum(self, is_shared: bool) -> None:
        """Set each parameter's gradient to the sum over all batches of all processes."""
        size = sum(parameter.numel() for parameter in self.parameters)
        total = torch.zeros(size, device=self.parameters[0].device)
        for batch in range(self.count):
            part = self.batches.get(batch)
            if is_shared:  # adding zeros changes no bit
                part = torch.zeros(size) if part is None else part
                dist.all_reduce(part)
            assert part is not None  # every batch was made by somebody
            total += part
        self.batches.clear()
        for parameter, summed in zip(self.parameters, total.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = summed.view_as(parameter)


class Run:
    """A run: the model and its optimizers as they stand, and what it keeps on disk: `state.pt`, from which it goes on,
    `log.jsonl`, `curves.png`. Only process 0 writes."""

    def __init__(self, recipe: Recipe, output: Path, rank: int, device: torch.device):
        self.recipe, self.output, self.rank, self.device = recipe, output, rank, device
        self.progress: dict[str, Any] = {
            **{"stage": 0, "name": "", "step": 0, "batches": recipe.first_batch, "samples": 0, "seconds": 0.0}
        }
        self.saved = time.monotonic()
        trainee, self.encoder = load_start(recipe, device)
        state = None
        if (output / "state.pt").exists():
            state = torch.load(output / "state.pt", weights_only=True, map_location="cpu")
            trainee = grow(trainee, state["layers"], device)
            trainee.load_state_dict(state["trainee"])
            self.progress = state["progress"]
        self.take(trainee)
        if state is not None:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.log_file = output / "log.jsonl"
        if rank == 0:  # what was logged after the last save is about to be done, and logged, again
            entries = [entry for entry in self.entries() if entry["samples"] <= self.progress["samples"]]
            write_whole(self.log_file, "".join(json.dumps(entry) + "\n" for entry in entries))

    def take(self, trainee: Trainee) -> None:
        self.trainee = ready(trainee, self.recipe, self.device)
        self.optimizers = optimizers_of(trainee, self.recipe.weight_decay)

    def enter(self, stage: Stage) -> None:
        """Before the first step of a stage, or where it goes on: the layers that it asks for."""
        if layer_counts(self.trainee.model) != layer_counts(self.trainee.model) | stage.layers:
            self.take(grow(self.trainee, stage.layers, self.device))

    def entries(self) -> list[dict]:
        return read_json_lines(self.log_file) if self.log_file.exists() else []

    def draw(self) -> None:
        names = {
            "dense": "dense loss",
            "answer": "answer loss",
            "patches": "patches named right",
            "answers": "answers right",
        }
        points = [
            {"step": entry["samples"]}
            | {names[name]: value for name, value in (entry | entry.get("validation", {})).items() if name in names}
            for entry in self.entries()
        ]
        draw(points, self.output / "curves.png", unit="samples")

    def save(self) -> None:
        self.saved = time.monotonic()
        if self.rank == 0:
            partial = self.output / "state.partial"
            state = {"trainee": self.trainee.state_dict(), "progress": self.progress}
            state["layers"] = layer_counts(self.trainee.model)
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save(state, partial)
            partial.replace(self.output / "state.pt")  # a run that dies here leaves the older state whole
            self.draw()

    def log(self, **entry) -> None:
        if self.rank == 0:
            entry = {key: self.progress[key] for key in ("stage", "name", "step", "samples")} | entry
            entry["minutes"] = round(self.progress["seconds"] / 60, 2)
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


Batches = Iterator[tuple[int, dict[str, Any]]]


def taken_batches(drawn: DrawnBatches, stage: Stage, first_step: int, store: dist.Store | None) -> Iterator[Batches]:
    """For each step from `first_step` on, the batches that fall to this process, with their places in the step.

    `store` hands them out (None: there is one process), and each is drawn where it is used.
    """

    def of(step: int) -> Batches:
        place = -1
        while (place := place + 1 if store is None else store.add(f"{stage.name}/{step}", 1) - 1) < stage.batches:
            yield place, drawn[stage.drawn_step(step) * stage.batches + place]

    for step in range(first_step, stage.steps):
        yield of(step)


def stand_back(worker: int) -> None:
    """Drawing waits for the process that trains, where both want a core."""
    os.nice(5)


def packed_ahead(steps: PackedSteps, numbers: Sequence[int], device: torch.device) -> Iterator[dict[str, Any]]:
    """The steps of these numbers, on their device, drawn ahead by all cores but the one that trains.

    A number that comes again is not drawn again: its step stays on the device until then.
    """
    workers, is_cuda = max(1, (os.cpu_count() or 2) - 1), device.type == "cuda"
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers, "prefetch_factor": 4, "pin_memory": is_cuda}
    options["worker_init_fn"] = stand_back
    drawn = iter(DataLoader(steps, sampler=list(dict.fromkeys(numbers)), **options))
    left, kept = Counter(numbers), {}
    for number in numbers:
        left[number] -= 1
        if number not in kept:
            buffer, layout = next(drawn)
            kept[number] = buffer.to(device, non_blocking=True), layout
        yield unbundled(*(kept[number] if left[number] else kept.pop(number)))


def learned_steps(run: Run, stage: Stage, store: dist.Store | None) -> Iterator[torch.Tensor | None]:
    """The steps of a stage that are left: each leaves its gradients in the parameters, and the means [2] of its dense and
    answer losses are given (None from a process that made no batch)."""
    trainee, progress = run.trainee, run.progress
    first_step, first_batch = progress["step"], progress["batches"] - progress["step"] * stage.batches
    source = (run.encoder, stage.mixture, stage.batch_size, run.recipe.seed, first_batch)
    if packs_steps(run.device):
        tables = Tables(trainee, run.encoder.collator.processor.image_processor, run.device)
        packed = PackedSteps(*source, stage.batches, stage.tower_views)
        numbers = [stage.drawn_step(step) for step in range(first_step, stage.steps)]
        for step in packed_ahead(packed, numbers, run.device):
            with fast_products(run.device):
                dense, answer = packed_losses(trainee, step, tables, stage.answers)
                stage.loss(dense, answer).backward()
            yield torch.stack([dense.detach(), answer.detach()])
        return
    gradients = Gradients(trainee, stage)
    drawn = DrawnBatches(*source, stage.steps * stage.batches)
    for batches in taken_batches(drawn, stage, first_step, store):
        losses = []
        for place, batch in batches:
            with fast_products(run.device), sdpa_kernel(SDPBackend.MATH):
                views = sum(len(sizes) for sizes in batch["tgt_sizes"])
                dense, answer, _, _ = trainee(batch, stage.answers, views <= stage.tower_views)
                (stage.loss(dense, answer) / stage.batches).backward()
            gradients.take(place)
            losses.append(torch.stack([dense.detach(), answer.detach()]))
        gradients.sum(is_shared=store is not None)
        yield torch.stack(losses).mean(0) if losses else None


def finite_losses(averages: torch.Tensor, run: Run, stage: Stage, step: int) -> dict[str, float]:
    """The means of the dense and, where answers are learned, the answer loss.

    Raises:
        TrainingError: one of them is no number.
    """
    dense, answer = averages.tolist()
    if not math.isfinite(dense + answer):
        raise TrainingError(
            f"Stage {stage.name}, step {step}: the loss is {dense + answer}. The state of an earlier step stays in "
            f"{run.output}. Lower the learning_rate ({stage.learning_rate}) or lengthen the warmup ({stage.warmup})."
        )
    return {"dense": round(dense, 4)} | ({"answer": round(answer, 4)} if stage.answers else {})


def run_stage(run: Run, stage: Stage, store: dist.Store | None, deadline: float, finishes: bool) -> bool:
    """The steps of a stage that are left, until `deadline`; returns whether the stage is done, as it is then with `finishes`."""
    run.enter(stage)
    run.progress["name"] = stage.name
    trainee, progress, recipe = run.trainee, run.progress, run.recipe
    bar = tqdm(initial=progress["step"], total=stage.steps, desc=stage.name, disable=run.rank > 0)
    averages = None  # of the dense and the answer loss; on a GPU they are read now and then, because reading waits
    start = began = time.monotonic()
    validation = Validation(run.encoder, recipe, stage) if run.rank == 0 else None
    for step, losses in enumerate(learned_steps(run, stage, store), progress["step"]):
        if losses is not None:
            averages = losses if averages is None else averages.lerp(losses, 0.02)
        if averages is not None and (run.device.type == "cpu" or (step + 1) % 10 == 0):
            means = finite_losses(averages, run, stage, step)
            bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
            if (step + 1) % 50 == 0:
                run.log(**means)
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        rate = stage.rate(step, max(0.0, deadline - began) / max(1.0, deadline - start) if finishes else 1.0)
        for optimizer, share in zip(run.optimizers, (1.0, stage.adamw_share), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * rate
            optimizer.step()
        trainee.zero_grad()
        bar.update()
        progress["step"], progress["batches"] = step + 1, progress["batches"] + stage.batches
        progress["samples"] += stage.batches * stage.batch_size
        is_late = torch.tensor(float(time.monotonic() > deadline))
        if store is not None:  # all stop after the same step
            dist.all_reduce(is_late, dist.ReduceOp.MAX)
        is_last = step + 1 == stage.steps or bool(is_late and finishes)
        if validation is not None and ((step + 1) % recipe.validate_every == 0 or is_last):
            report = validation.report(trainee)
            run.log(validation=report)
            bar.write(f"{stage.name} {step + 1}: {report}")
        progress["seconds"] += time.monotonic() - began
        began = time.monotonic()
        if is_late or began - run.saved > 60 * recipe.save_minutes:
            if averages is not None:
                finite_losses(averages, run, stage, step)
            run.save()
        if is_late and not finishes:
            return False
        if is_last:
            break
    bar.close()
    return True


def train(
    rank: int,
    recipe: Recipe,
    output: Path,
    rendezvous: str | None = None,
    minutes: float = math.inf,
    finishes: bool = False,
) -> Trainee | None:
    """Run all stages as process `rank` of `recipe.processes`; alone when there is no rendezvous file.

    Returns the trained model with its heads, or None where `minutes` were over before. With `finishes` the last stage ends
    with the minutes.
    """
    deadline = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    store = None
    if rendezvous is not None:
        store = dist.FileStore(rendezvous, recipe.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.processes)
    run = Run(recipe, output, rank, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for number, stage in enumerate(recipe.stages):
        if number < run.progress["stage"]:
            continue
        if not run_stage(run, stage, store, deadline, finishes and stage is recipe.stages[-1]):
            return None
        run.progress.update(stage=number + 1, step=0)
        run.save()
    if rank == 0:
        export(run.trainee.model, Path(recipe.model), output / "model")
    if store is not None:
        dist.destroy_process_group()
    return run.trainee


def export(model: PreTrainedModel, model_folder: Path, output: Path) -> None:
    """Write model.safetensors (bfloat16) and the settings beside it: a folder for `from_pretrained`, whole or not at all."""
    draft = output.with_name(output.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(draft)
    # The settings are those of the model folder, not a rewritten copy, but for its depth; its code files are taken too.
    for file in sorted(model_folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".py"):
            shutil.copyfile(file, draft / file.name)
    settings = read_json(draft / "config.json")
    counts = layer_counts(model)
    settings["num_hidden_layers"] = settings["max_window_layers"] = counts["llm"]
    settings["vision_config"]["num_hidden_layers"] = counts["tower"]
    (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    draft.replace(output)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv.train.nano", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="Recipe (YAML).")
    parser.add_argument("--output", type=Path, required=True, help="Folder for state, log and the trained model.")
    parser.add_argument("--weights", help="Folder of the weights to begin with, in place of the recipe's.")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="Stop after so many; the same command then goes on."
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="End with the minutes, and not only stop: the learning rate of the last stage falls by the clock where its "
        "steps would take longer, and the model is written. Such a run cannot be repeated bit for bit.",
    )
    args = parser.parse_args(argv)
    if args.finish and math.isinf(args.minutes):
        parser.error("--finish needs --minutes: when to end")
    with one_line_errors():
        recipe = Recipe.load(args.config)
    if args.weights is not None:
        recipe = replace(recipe, weights=args.weights)
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the cores are taken
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # all but attention: two runs stay close
        torch.utils.deterministic.fill_uninitialized_memory = False
        attend_without_plans()  # plans were five sixths of the time
        train(0, recipe, args.output, None, args.minutes, args.finish)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rendezvous = str(Path(folder) / "rendezvous")
            arguments = (recipe, args.output, rendezvous, args.minutes, args.finish)
            torch.multiprocessing.spawn(train, arguments, nprocs=recipe.processes)
    if not is_trained(recipe, args.output):
        raise SystemExit(
            f"{args.minutes:g} minutes are over; {args.output} holds the state, and the same command goes on"
        )
    print(f"{args.output / 'model'} holds the trained model")


def is_trained(recipe: Recipe, output: Path) -> bool:
    progress = torch.load(output / "state.pt", weights_only=True, map_location="cpu")["progress"]
    return progress["stage"] == len(recipe.stages)
