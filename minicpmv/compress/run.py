"""Checkpoint in, smaller checkpoint out, with a report beside it.

What is special:
- Sizes are chosen by importance alone; what stays of the chosen one is then fitted to what goes ([`minicpmv.compress.refit`]).
- The folder appears when everything in it is whole: cut, written, loaded again by `AutoModel`, and measured as it was loaded.
- A folder with a config.json alone can be cut in a dry run: shapes on the meta device go the same road, and nothing is written.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minicpmv.checkpoint import CheckpointError, load, source_of
from minicpmv.compress import plan, refit, vocabulary
from minicpmv.compress.importance import (
    Importance,
    answer_loss,
    encode,
    measure_importance,
    with_queries,
)
from minicpmv.compress.plan import Curves, Target
from minicpmv.compress.shapes import KINDS, CompressionError, Shape, check, measure, shape_of
from minicpmv.compress.surgery import Kept, cut, first
from minicpmv.data.load import some_conversations
from minicpmv.errors import require
from minicpmv.files import read_json, write_whole


REPORT, CARD, PLOT = "compression.json", "README.md", "sensitivity.png"
Note = Callable[[str], None]


@dataclass
class Settings:
    """What to cut, and by what to judge."""

    sizes: dict[str, int] = field(default_factory=dict)  # given by the user: {kind: size}
    targets: Sequence[Target] = ()
    milliseconds: float | None = None  # most that a question about one image may take here
    kinds: Sequence[str] = plan.AUTOMATIC  # that targets may cut
    corpus: str | None = None  # whose tokens stay; None: the vocabulary stays whole
    data: str | None = None  # conversations to measure on; None: drawn ones
    conversations: int = 32  # for importance, and as many more for the loss
    samples: int = 0  # questions of each row of NanoBench
    compares_sparsity: bool = False

    @property
    def searches(self) -> bool:
        return bool(self.targets) or self.milliseconds is not None

    @property
    def free_kinds(self) -> list[str]:
        """What targets decide about: what they may cut, but where a size is given."""
        return [kind for kind in self.kinds if kind not in self.sizes]


@dataclass
class Report:
    """What was cut, and what came of it. Losses, times and NanoBench are None or empty where there were no weights."""

    before: dict[str, Any]  # "shape", "sizes", "loss", "milliseconds"
    after: dict[str, Any]
    curves: Curves | None = None
    shares: dict[str, list[float]] = field(default_factory=dict)  # see Importance.kept_shares
    bench: dict[str, dict[str, Any]] = field(default_factory=dict)  # row -> metric, before, after, n
    sparsity: dict[str, float] = field(default_factory=dict)  # loss with half of the weights zero, for comparison only

    def rows(self) -> list[tuple[str, str, str]]:
        """The table of the report: (what, before, after)."""
        found = []
        for name in KINDS:
            pair = self.before["shape"][name], self.after["shape"][name]
            if pair[0] != pair[1]:
                found.append((name, f"{pair[0]:,}", f"{pair[1]:,}"))
        for name, title in TITLES.items():
            before, after = self.before["sizes"][name], self.after["sizes"][name]
            found.append((title, f"{before:,}", f"{after:,} ({100 * after / max(before, 1):.1f} %)"))
        for name, title in {"loss": "loss", "milliseconds": "milliseconds a question"}.items():
            if self.after.get(name) is not None:
                found.append((title, f"{self.before[name]:.4g}", f"{self.after[name]:.4g}"))
        return found


TITLES = {
    "parameters": "parameters",
    "llm_parameters": "of the language model",
    "tower_parameters": "of the tower",
    "resampler_parameters": "of the resampler",
    "bytes": "bytes of weights",
    "flops_per_image": "FLOPs an image of one slice",
    "flops_per_token": "FLOPs a written token",
}


def compress(
    name: str | Path, output: Path | None, settings: Settings, note: Note = lambda what: None, dry_run: bool = False
) -> Report:
    """Cut a checkpoint.

    Args:
        name: the folder of the checkpoint.
        output: where the smaller one goes, a folder that is not there yet.
        note: hears what is being done.
        dry_run: shapes and sizes alone, of a folder that may have no weights; nothing is written.

    Raises:
        CompressionError: something cannot be cut as asked, or `output` cannot be written.
        CheckpointError: `name` holds no model.
    """
    _check(settings, dry_run)
    if dry_run:
        return _dry_run(name, settings, note)
    if output is None or not is_free(output):
        raise CompressionError(f"{output} is there already: name a folder that is not, for the smaller checkpoint")
    if settings.samples:
        require("evaluate", "rapidfuzz", "matplotlib")
    if settings.searches:
        require("evaluate", "matplotlib")
    model, processor = load(name)
    check(model.config, replace(shape_of(model.config), **settings.sizes))
    work = Work(model, processor, settings, note)
    stage = output.with_name(f"unfinished-{output.name}")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        curves = work.sensitivity() if settings.searches else None
        if curves is not None:
            plan.draw(curves, work.saved_share, stage / PLOT)
        shape = work.choose(curves)
        kept = work.kept(shape)
        kept, changed = work.fitted(kept)
        note("writing the smaller model")
        write(stage, model, processor, kept, changed)
        smaller, its_processor = load(stage)
        report = work.compare(smaller, its_processor, shape, kept, curves)
        _write_report(stage, output.name, Path(name).resolve().name, report, settings)
        os.replace(stage, output)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return report


def is_free(folder: Path) -> bool:
    """Whether a folder is not there, or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _check(settings: Settings, dry_run: bool) -> None:
    if not (settings.sizes or settings.searches or settings.corpus):
        raise CompressionError(
            "nothing is to be cut: give a target such as --target-parameters 75%, a size such as --mlp 384, or a corpus"
        )
    if unknown := [kind for kind in settings.kinds if kind not in plan.AUTOMATIC]:
        raise CompressionError(f"{', '.join(unknown)} is nothing that a target can cut: {', '.join(plan.AUTOMATIC)}")
    if settings.milliseconds is not None and settings.targets:
        raise CompressionError("give a target of parameters or of time, not both")
    if settings.milliseconds is not None and dry_run:
        raise CompressionError("a dry run has no weights whose time could be measured: give a target of parameters")
    if settings.conversations < 1:
        raise CompressionError(f"{settings.conversations} conversations measure nothing: give at least 1")


class Work:
    """A model on the way to a smaller one: what is measured of it, each thing once."""

    def __init__(self, model: Any, processor: Any, settings: Settings, note: Note):
        self.model, self.processor, self.settings, self.note = model, processor, settings, note
        self.whole = shape_of(model.config)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Conversations: the first half for importance, the second for the loss."""
        return some_conversations(self.settings.data, 2 * self.settings.conversations)

    @cached_property
    def importance(self) -> Importance:
        self.note(f"weighing everything on {self.settings.conversations} conversations")
        return measure_importance(self.model, self._batches(self.processor, self.whole.queries, held_out=False))

    @cached_property
    def vocabulary_ids(self) -> list[int] | None:
        if self.settings.corpus is None:
            return None
        self.note(f"reading {self.settings.corpus}")
        return corpus_ids(self.settings.corpus, self.processor)

    def kept(self, shape: Shape) -> Kept:
        """What stays of the model in a shape."""
        import torch

        kept = self.importance.choose(self.model.config, shape)
        if self.vocabulary_ids is not None:
            kept = replace(kept, vocabulary=torch.tensor(self.vocabulary_ids))
        return kept

    @cached_property
    def start(self) -> Shape:
        """The model with the sizes that were given, and the vocabulary of the corpus."""
        sizes = dict(self.settings.sizes)
        if self.vocabulary_ids is not None:
            sizes["vocabulary"] = len(self.vocabulary_ids)
        return replace(self.whole, **sizes)

    def sensitivity(self) -> Curves:
        """The loss of each cut that the targets may make, alone."""
        targets = self.settings.targets or [EVERYTHING]
        kinds = [kind for kind in self.settings.free_kinds if any(kind in target.kinds for target in targets)]
        return plan.sensitivity(self.start, kinds, self.loss_of, self.note)

    def choose(self, curves: Curves | None) -> Shape:
        """The shape to cut to."""
        shape = self.start
        if self.settings.milliseconds is not None:
            path = list(plan.steps(shape, list(curves or ()), self._flops_of_question, curves))
            shape = plan.choose_by_time(path, self.seconds_of, self.settings.milliseconds / 1000)
        elif self.settings.targets:
            shape = reach(self.settings.targets, self.model, shape, list(curves or ()), curves)
        self.note(f"cut to {', '.join(f'{kind} {size}' for kind, size in shape)}")
        return shape

    def saved_share(self, kind: str, size: int) -> float:
        """The share of all parameters that a cut saves, alone."""
        smaller = measure(self.model, replace(self.start, **{kind: size}))
        return 1 - smaller.parameters / measure(self.model, self.start).parameters

    def loss_of(self, shape: Shape) -> float:
        """The loss of the model in a shape, on conversations that importance was not measured on."""
        kept = self.importance.choose(self.model.config, shape)
        return answer_loss(cut(self.model, kept), self._batches(self.processor, shape.queries))

    def seconds_of(self, shape: Shape) -> float:
        kept = self.importance.choose(self.model.config, shape)
        return self._seconds(cut(self.model, kept), self.processor)

    def fitted(self, kept: Kept) -> tuple[Kept, dict[str, Any]]:
        """What stays, and the weights that make up for what goes."""
        self.note("fitting what stays to what goes")
        return refit.fitted(self.model, kept, self._batches(self.processor, self.whole.queries, held_out=False))

    def compare(self, smaller: Any, processor: Any, shape: Shape, kept: Kept, curves: Curves | None) -> Report:
        """Hold the smaller model, as it was loaded, against the one that it was cut from."""
        self.note("measuring both")
        sides = []
        for model, of in ((self.model, self.processor), (smaller, processor)):
            found: dict[str, Any] = {"shape": asdict(shape_of(model.config)), "sizes": asdict(measure(model))}
            found["loss"] = answer_loss(model, self._batches(of, model.config.query_num))
            found["milliseconds"] = 1000 * self._seconds(model, of)
            sides.append(found)
        report = Report(sides[0], sides[1], curves)
        report.shares = {
            kind: values
            for kind, values in self.importance.kept_shares(kept).items()
            if dict(shape)[kind] < dict(self.whole)[kind]
        }
        if self.settings.samples:
            self.note(f"{self.settings.samples} questions of each row of NanoBench")
            report.bench = bench(self.model, self.processor, smaller, processor, self.settings.samples)
        if self.settings.compares_sparsity:
            from minicpmv.compress.sparsity import compare

            self.note("zeros, for comparison")
            parts = [self._batches(self.processor, self.whole.queries, held_out) for held_out in (False, True)]
            report.sparsity = compare(self.model, *parts)
        return report

    def _batches(self, processor: Any, queries: int, held_out: bool = True) -> list[dict[str, Any]]:
        half = self.settings.conversations
        return encode(processor, self.rows[half:] if held_out else self.rows[:half], queries)

    def _flops_of_question(self, shape: Shape) -> float:
        sizes = measure(self.model, shape)
        return sizes.flops_per_image + plan.ANSWER_TOKENS * sizes.flops_per_token

    def _seconds(self, model: Any, processor: Any) -> float:
        with_image = next(row for row in self.rows if any(_images(row)))
        (batch,) = encode(processor, [with_image], model.config.query_num)
        prompt = int((batch.pop("labels")[0] != -100).nonzero()[0])
        inputs = {**batch, **{name: batch[name][:, :prompt] for name in ("input_ids", "attention_mask")}}
        return plan.seconds_of_question(model, inputs)


EVERYTHING = Target(None, 1.0, True)


def reach(targets: Sequence[Target], model: Any, start: Shape, kinds: Sequence[str], curves: Curves | None) -> Shape:
    """The shape that meets targets, those of parts first.

    Raises:
        CompressionError: one cannot be met.
    """
    whole, shape = measure(model), start
    for target in sorted(targets, key=lambda target: target.part is None):
        chosen = [kind for kind in kinds if kind in target.kinds and dict(shape)[kind] == dict(start)[kind]]
        cost = partial(_parameters, model, target)
        shape = plan.choose(shape, chosen, cost, target.limit(whole), curves)
    return shape


def _parameters(model: Any, target: Target, shape: Shape) -> float:
    return target.of(measure(model, shape))


def corpus_ids(corpus: str, processor: Any) -> list[int]:
    """The ids of the tokens that a corpus, and the chat template, need."""
    tokenizer = processor.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = read_json(Path(folder) / vocabulary.TOKENIZER_FILE)
    used = vocabulary.used_ids(tokenizer, vocabulary.templates(processor))
    used |= vocabulary.used_ids(tokenizer, vocabulary.corpus_texts(corpus, processor))
    return vocabulary.kept_ids(settings, used)


def write(folder: Path, model: Any, processor: Any, kept: Kept, changed: Mapping[str, Any]) -> None:
    """Write the smaller checkpoint: weights, code, processor, tokenizer."""
    smaller = cut(model, kept, changed)
    smaller.save_pretrained(folder)
    with with_queries(processor, smaller.config.query_num):
        processor.save_pretrained(folder)
    if len(kept.vocabulary) < model.config.vocab_size:
        vocabulary.cut_files(folder, kept.vocabulary.tolist())


def bench(model: Any, processor: Any, smaller: Any, its_processor: Any, samples: int) -> dict[str, dict[str, Any]]:
    """`{row: {"metric", "before", "after", "n"}}` over all rows of NanoBench."""
    from minicpmv.evaluate import harness
    from minicpmv.evaluate.answerers import LocalModel
    from minicpmv.evaluate.suites import load_benchmark

    found: dict[str, dict[str, Any]] = {}
    for side, pair in (("before", (model, processor)), ("after", (smaller, its_processor))):
        with tempfile.TemporaryDirectory() as folder:
            results = harness.measure(
                LocalModel(*pair), load_benchmark("nanobench"), Path(folder), name="", samples=samples
            )
        for row, summary in results["rows"].items():
            metric, value = next(iter(summary["mean"].items()))
            found.setdefault(row, {"metric": metric, "n": summary["n"]})[side] = value
    return found


def _dry_run(name: str | Path, settings: Settings, note: Note) -> Report:
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    source = source_of(name)
    if not (Path(name).expanduser() / "config.json").is_file():
        raise CheckpointError(f"{name} holds no config.json: name the folder of a checkpoint")
    config = AutoConfig.from_pretrained(**source)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=config.dtype or torch.bfloat16)
    start = replace(shape_of(model.config), **settings.sizes)
    check(model.config, start)
    ids = None
    if settings.corpus is not None:
        note(f"reading {settings.corpus}")
        ids = corpus_ids(settings.corpus, AutoProcessor.from_pretrained(**source))
        start = replace(start, vocabulary=len(ids))
    shape = reach(settings.targets, model, start, settings.free_kinds, None)
    kept = first(model.config, shape)
    if ids is not None:
        kept = replace(kept, vocabulary=torch.tensor(ids))
    smaller = cut(model, kept)
    return Report(
        {"shape": asdict(shape_of(model.config)), "sizes": asdict(measure(model))},
        {"shape": asdict(shape_of(smaller.config)), "sizes": asdict(measure(smaller))},
    )


def _write_report(folder: Path, name: str, base: str, report: Report, settings: Settings) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    write_whole(folder / REPORT, json.dumps(asdict(report), indent=1) + "\n")
    environment = Environment(
        loader=PackageLoader("minicpmv.compress", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("card.md.jinja").render(
        name=name,
        base=base,
        rows=report.rows(),
        conversations=settings.conversations,
        data=settings.data or "drawn here",
        samples=settings.samples,
        bench=report.bench,
        shares=report.shares,
        sparsity=report.sparsity,
        curves=report.curves,
    )
    write_whole(folder / CARD, card.rstrip() + "\n")


def _images(row: Mapping[str, Any]) -> list[Any]:
    return [
        part
        for message in row["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
