"""Whether a model answers in other software as it does in PyTorch, and what that costs: the one measure of all exports.

What is special:
- An export brings an object with the attributes of [`Runtime`], and nothing else.
- The reference answers first and goes before the other one is loaded, so that both need not fit into memory together.
- Two answers may differ where PyTorch itself was undecided: the type of the weights says by how much. What comes behind
  the first such token is not compared, since the two then read different texts.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minicpmv import examples
from minicpmv.errors import MiniCPMVError, require
from minicpmv.evaluate.answerers import Answerer, LocalModel
from minicpmv.files import read_json_lines


MOST_TOKENS = 48  # of an answer
SPEED_TOKENS = 33  # written to measure the speed
PACKED = {"fps": 3, "max_num_packing": 6, "force_packing": 6}  # six frames in one unit
PAGE_SIDE, PAGE_SLICES = 3, 9  # slices a side of the drawn page, and in all


class ParityError(MiniCPMVError):
    """An export does not answer as PyTorch does: the message says where."""


@dataclass(frozen=True)
class Case:
    """A conversation that ends with a question, and the options of the processor."""

    name: str
    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


class Runtime(Protocol):
    """Software that runs a model.

    `features` and `logits` may return None where the software does not show them; then they are not compared.
    """

    versions: dict[str, str]  # of the software, for the card
    answerer: Answerer  # who answers the questions of NanoBench

    def prompt_ids(self, case: Case) -> list[int]:
        """What the model reads."""

    def features(self, case: Case) -> np.ndarray | None:
        """Image features [units, Q, D], in the order of their slots."""

    def logits(self, case: Case, answer: Sequence[int]) -> np.ndarray | None:
        """Logits [n, V] from which each of the n tokens of an answer is chosen, the ones before it given."""

    def answer(self, case: Case, most: int, least: int = 0) -> list[int]:
        """Ids of the greedy answer with its closing token, at most `most`; fewer than `least` only where it ends."""


class ModelRuntime:
    """A model with the interface of this repository's own, wherever its parts run.

    Args:
        model, processor: as `minicpmv.load` returns them.
        versions: of the software, by name.
        tokenize: the software's own tokenizer, (text) -> ids, where it has one.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        versions: dict[str, str],
        batch_size: int = 8,
        tokenize: Callable[[str], list[int]] | None = None,
    ):
        self.model, self.processor, self.versions = model, processor, versions
        self.answerer: Answerer = LocalModel(model, processor, batch_size)
        self._tokenize = tokenize

    def _inputs(self, case: Case) -> Any:
        return self.processor.apply_chat_template(
            case.messages,
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **case.options,
        ).to(self.model.device)

    def prompt_ids(self, case: Case) -> list[int]:
        ids = self._inputs(case)["input_ids"][0].tolist()
        return ids if self._tokenize is None else self._tokenize(self.processor.tokenizer.decode(ids))

    def features(self, case: Case) -> np.ndarray:
        import torch

        inputs = self._inputs(case)
        visual = {name: inputs.get(name) for name in ("pixel_values", "tgt_sizes", "temporal_ids")}
        with torch.inference_mode():
            return self.model.get_image_features(**visual).pooler_output.float().cpu().numpy()

    def logits(self, case: Case, answer: Sequence[int]) -> np.ndarray:
        import torch

        inputs = self._inputs(case)
        given = torch.tensor([list(answer[:-1])], dtype=torch.long, device=self.model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            return self.model(**inputs, logits_to_keep=len(answer), use_cache=False).logits[0].float().cpu().numpy()

    def answer(self, case: Case, most: int, least: int = 0) -> list[int]:
        inputs = self._inputs(case)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        ids = self.model.generate(**inputs, max_new_tokens=most, min_new_tokens=least or None, **greedy)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()


def cases(processor: Any) -> list[Case]:
    """What is compared: the images and the video that come with the repository, the video packed, a page in nine slices,
    and a conversation about a video and an image.

    Raises:
        NoCloneError: the repository is not there.
        MissingPackageError: the page cannot be drawn.
    """
    require("evaluate", "matplotlib")
    from minicpmv.drawn.samples import bench_sample

    assets = examples.find_clone() / "assets"
    clip, clip_question = assets / examples.CLIP, examples.CLIP_QUESTIONS[0]
    found = [
        Case(name, _asked(assets / name, question))
        for name, questions in (*examples.IMAGES.items(), (examples.SUM[0], examples.SUM[1:]))
        for question in questions[-1:]
    ]
    found.append(Case("coffee.jpg", _asked(assets / "coffee.jpg", "What is in the image?")))
    found.append(Case(f"{clip.name}, packed", _asked(clip, clip_question), PACKED))
    page = bench_sample("fine_print", split="test", seed=0, index=0)
    side = PAGE_SIDE * processor.image_processor.scale_resolution
    asked = _asked(page.images[0].resize((side, side)), page.turns[0].question)
    found.append(Case("a page in nine slices", asked, {"max_slice_nums": PAGE_SLICES}))
    name, (question, *_) = "number.jpg", examples.IMAGES["number.jpg"]
    both = [*_asked(clip, clip_question), {"role": "assistant", "content": "right"}, *_asked(assets / name, question)]
    found.append(Case(f"{clip.name}, then {name}", both))
    return found


def _asked(medium: Any, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [medium, question]}]


# ---- what a runtime shows ----


@dataclass
class Seen:
    """What a runtime makes of a case."""

    prompt: list[int]
    features: np.ndarray | None
    answer: list[int]
    logits: np.ndarray | None  # of the reference's answer


@dataclass
class Record:
    """What a runtime makes of everything."""

    versions: dict[str, str]
    seen: dict[str, Seen]
    first_token: float  # seconds from the question to the first token, of the page in nine slices
    tokens_per_second: float  # of the tokens behind it
    bench: dict[str, dict[str, Any]]  # row -> {"value", "n", "answers"}


def observe(
    make: Callable[[], Runtime],
    asked: Sequence[Case],
    samples: int = 0,
    reference: Record | None = None,
    note: Callable[[str], None] = lambda what: None,
) -> Record:
    """Ask a runtime everything. It is made here, and gone afterwards.

    Args:
        asked: the cases.
        samples: questions of each row of NanoBench; 0 asks none.
        reference: what PyTorch made of it, whose answers the logits are those of; None for PyTorch itself.
        note: is told what is asked.
    """
    runtime = make()
    note(f"{len(asked)} conversations")
    seen = {}
    for case in asked:
        answer = runtime.answer(case, MOST_TOKENS)
        logits = runtime.logits(case, reference.seen[case.name].answer if reference else answer)
        seen[case.name] = Seen(runtime.prompt_ids(case), runtime.features(case), answer, logits)
    case = next((case for case in asked if "max_slice_nums" in case.options), asked[0])
    first_token = seconds_of(runtime, case, 1)
    # Once more, since software may keep what it has read, and then reads nothing the second time.
    short, long = seconds_of(runtime, case, 1), seconds_of(runtime, case, SPEED_TOKENS)
    speed = (SPEED_TOKENS - 1) / max(long - short, 1e-9)
    if samples:
        note(f"{samples} questions of each row of NanoBench")
    bench = ask_nanobench(runtime.answerer, samples) if samples else {}
    record = Record(dict(runtime.versions), seen, first_token, speed, bench)
    del runtime
    gc.collect()
    return record


def seconds_of(runtime: Runtime, case: Case, tokens: int) -> float:
    """Seconds that an answer of so many tokens takes."""
    begin = time.perf_counter()
    runtime.answer(case, tokens, tokens)
    return time.perf_counter() - begin


def ask_nanobench(answerer: Answerer, samples: int) -> dict[str, dict[str, Any]]:
    """`{row: {"metric", "value", "n", "answers": {sample: answer}}}` over all rows of NanoBench."""
    require("evaluate", "rapidfuzz", "matplotlib")
    from minicpmv.evaluate import harness
    from minicpmv.evaluate.suites import load_benchmark

    with tempfile.TemporaryDirectory() as folder:
        results = harness.measure(answerer, load_benchmark("nanobench"), Path(folder), name="", samples=samples)
        entries = [entry for entry in read_json_lines(Path(folder) / "samples.jsonl") if "answer" in entry]
    found = {}
    for row, summary in results["rows"].items():
        metric, value = next(iter(summary["mean"].items()))
        answers = {entry["index"]: entry["answer"] for entry in entries if entry["row"] == row}
        found[row] = {"metric": metric, "value": value, "n": summary["n"], "answers": answers}
    return found


# ---- what differs ----


@dataclass
class Difference:
    """How a case differs from the reference's."""

    case: str
    same_prompt: bool
    features: float | None  # relative error: |a - b| / |b|
    logits: float | None
    same_argmax: float | None  # share of the answer's tokens
    same_answer: bool
    preferred: float  # nats by which the reference preferred its own token where the answers part; 0 where they do not


def compare(case: str, reference: Seen, other: Seen) -> Difference:
    """Hold what a runtime makes of a case against the reference's."""
    preferred = 0.0
    pairs = enumerate(zip(reference.answer, other.answer, strict=False))
    place = next((place for place, (ours, theirs) in pairs if ours != theirs), None)
    if place is None and len(reference.answer) != len(other.answer):
        preferred = float("inf")  # one went on where the other stopped without its closing token
    elif place is not None:
        ours, theirs = reference.answer[place], other.answer[place]
        step = None if reference.logits is None else reference.logits[place]
        preferred = float("inf") if step is None else float(step[ours] - step[theirs])
    same_argmax = None
    if reference.logits is not None and other.logits is not None:
        same_argmax = float((reference.logits.argmax(-1) == other.logits.argmax(-1)).mean())
    return Difference(
        case,
        reference.prompt == other.prompt,
        relative_error(reference.features, other.features),
        relative_error(reference.logits, other.logits),
        same_argmax,
        reference.answer == other.answer,
        preferred,
    )


def relative_error(reference: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """|other - reference| / |reference|; infinite where their shapes differ, None where one is not there."""
    if reference is None or other is None:
        return None
    if reference.shape != other.shape:
        return float("inf")
    return float(np.linalg.norm(other - reference) / max(float(np.linalg.norm(reference)), 1e-30))


def faults(differences: Iterable[Difference], margin: float, feature_margin: float) -> list[str]:
    """What goes beyond what the types of the weights allow, in words; none where the export may count as done."""
    found = []
    for each in differences:
        if not each.same_prompt:
            found.append(f"{each.case}: the prompt has other tokens")
        if each.features is not None and each.features > feature_margin:
            found.append(
                f"{each.case}: image features differ by {each.features:.1g}, and {feature_margin:g} is allowed"
            )
        if each.preferred > margin:
            found.append(
                f"{each.case}: the answer differs where PyTorch preferred its own by {each.preferred:.2f} nats, and "
                f"{margin:g} are allowed"
            )
    return found


@dataclass
class Parity:
    """What `hold` has found: for the card, and for JSON beside it."""

    name: str  # of the export
    type: str
    bytes: int
    margin: float
    feature_margin: float
    versions: dict[str, str]
    reference: str  # its type
    differences: list[Difference]
    faults: list[str]
    first_token: tuple[float, float]  # seconds: of the reference, of the export
    tokens_per_second: tuple[float, float]
    bench: dict[str, dict[str, Any]]  # row -> metric, n, before, after, same (share of equal answers)


def hold(
    reference: Record,
    runtime: Callable[[], Runtime],
    asked: Sequence[Case],
    *,
    name: str,
    type: str,
    size: int,
    margin: float,
    feature_margin: float,
    samples: int = 0,
    reference_type: str = "",
    note: Callable[[str], None] = lambda what: None,
) -> Parity:
    """Hold a runtime against what [`observe`] has seen of PyTorch.

    Args:
        runtime: makes it.
        asked, samples, note: as of the reference.
        name, type, size: of the export: how it is called, how its weights are stored, its bytes.
        margin: nats by which PyTorch may have preferred its own token where the answers part.
        feature_margin: relative error that image features may have.
        reference_type: how PyTorch held the weights.
    """
    ours, theirs = reference, observe(runtime, asked, samples, reference, note)
    differences = [compare(case, ours.seen[case], theirs.seen[case]) for case in ours.seen]
    bench = {}
    for row, before in ours.bench.items():
        after = theirs.bench[row]
        same = [after["answers"].get(index) == answer for index, answer in before["answers"].items()]
        bench[row] = {
            "metric": before["metric"],
            "n": before["n"],
            "before": before["value"],
            "after": after["value"],
            "same": sum(same) / len(same),
        }
    return Parity(
        name,
        type,
        size,
        margin,
        feature_margin,
        ours.versions | theirs.versions,
        reference_type,
        differences,
        faults(differences, margin, feature_margin),
        (ours.first_token, theirs.first_token),
        (ours.tokens_per_second, theirs.tokens_per_second),
        bench,
    )
