"""Distillation: a smaller model learns to write what a larger one would, token by token.

    minicpmv train distill --config recipes/distill.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.distill --config recipes/distill.yaml

What is special:
- teacher and student are models of this architecture with one tokenizer; widths, depths and the number of queries may
  differ. Where the teacher has more queries, its prompt gets more slots, and only positions of answers are compared;
- the answers are those of the rows, the teacher's, or the student's own (on-policy). Generated ones begin as the row's do:
  a row that thinks opens a thought, so thinking stays;
- the divergence is forward or reverse KL, or that of Jensen and Shannon. With `teacher_cache` the teacher reads a
  row the first time it comes, its `teacher_top_k` best tokens are stored, and once all rows are there it is not needed any
  more: all others count as one token;
- tower and resampler may be held to the teacher's, by the similarities of their patches and tokens to each other, so that
  widths need not agree (https://arxiv.org/abs/1907.09682).

Sources: https://arxiv.org/abs/1503.02531, https://arxiv.org/abs/2306.13649 (own answers, divergences).
"""

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed
from trl.models.utils import unwrap_model_for_generation

from minicpmv.checkpoint import attend_without_plans, source_of
from minicpmv.data.collator import IGNORED, ConversationCollator
from minicpmv.errors import one_line_errors
from minicpmv.train.common.arguments import (
    AdapterArguments,
    DataArguments,
    FreezeArguments,
    ModelArguments,
    option,
    parse,
)
from minicpmv.train.common.checkpoints import checkpoint_to_resume
from minicpmv.train.common.curves import LossCurves
from minicpmv.train.common.errors import ArgumentsError, TrainingError
from minicpmv.train.common.loading import load_model_and_processor
from minicpmv.train.common.names import check_model_name
from minicpmv.train.common.run import (
    RunArguments,
    check,
    collator_and_rows,
    load_data,
    save,
    set_up,
    train_and_evaluate,
)
from minicpmv.train.common.trainer import TrainerMixin


@dataclass
class DistillArguments(RunArguments, TrainingArguments):
    """The Trainer's own options, and what is to be learned from the teacher."""

    teacher: str | None = option(None, "The teacher: a model folder, or owner/name on the Hub.")
    answers: str = option(
        "rows",
        "Whose answers both read: the rows', the teacher's, or the student's own.",
        choices=["rows", "teacher", "own"],
    )
    divergence: str = option(
        "forward",
        "forward (the student covers all that the teacher may say), reverse (it says only what the teacher would), or jsd.",
        choices=["forward", "reverse", "jsd"],
    )
    temperature: float = option(1.0, "Both distributions are softened by it.")
    label_weight: float = option(0.0, "Weight of the cross-entropy of the answers beside the divergence.")
    tower_weight: float = option(0.0, "Weight of the difference of the towers.")
    resampler_weight: float = option(0.0, "Weight of the difference of the resamplers.")
    teacher_cache: str | None = option(
        None, "Folder of what the teacher said: written where it lacks rows and there is a teacher, else read."
    )
    teacher_top_k: int = option(64, "How many tokens of each position the cache keeps.")
    trust_remote_code: bool = option(False, "Run the code that models on the Hub bring.")
    max_new_tokens: int = option(256, "Most tokens of an answer that is generated.")
    max_length: int | None = option(None, "Maximum number of tokens of a sample (default: the model's positions).")

    def __post_init__(self):
        if self.teacher is None and self.teacher_cache is None:
            raise ArgumentsError(
                "teacher is missing: the folder of the larger model, or a teacher_cache that was written."
            )
        if self.teacher is not None:
            check_model_name(self.teacher)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ArgumentsError(f"temperature is {self.temperature}, but has to be more than 0.")
        if self.teacher_top_k < 1 or self.max_new_tokens < 1:
            raise ArgumentsError("teacher_top_k and max_new_tokens have to be at least 1.")
        if self.teacher_cache is not None:
            if self.answers != "rows":
                raise ArgumentsError(
                    f"answers: {self.answers} are new ones each time; a teacher_cache needs those of rows."
                )
            if self.tower_weight or self.resampler_weight:
                raise ArgumentsError(
                    "A teacher_cache holds tokens, not features: leave out tower_weight, resampler_weight."
                )
        self.prediction_loss_only = True  # evaluation needs no logits kept
        super().__post_init__()


# ---- the loss ----


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Mean divergence of log-probabilities [N, classes] of the student from the teacher's, in nats."""

    def kl(of: Tensor, other: Tensor) -> Tensor:
        return (of.exp() * (of - other).masked_fill(of == -torch.inf, 0)).sum(-1).mean()

    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    middle = torch.logsumexp(torch.stack([student, teacher]), 0) - math.log(2)
    return (kl(student, middle) + kl(teacher, middle)) / 2


def with_rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    """The log-probabilities [N, k + 1] of k tokens, and of all others as one."""
    top = log_probs.gather(-1, indices)
    rest = (1 - top.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([top, rest], -1)


def similarity_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How differently two models see which vectors are alike: mean squared difference of cosines, over units [n, D]."""
    gaps = []
    for own, other in zip(student, teacher, strict=True):
        own, other = normalize(own.float(), dim=-1), normalize(other.float(), dim=-1)
        gaps.append((own @ own.T - other @ other.T).pow(2).mean())
    return torch.stack(gaps).mean()


# ---- positions ----


def answer_positions(labels: Tensor) -> Tensor:
    """Where the next token is one of an answer: bool [B, L - 1]."""
    return labels[:, 1:] != IGNORED


def answer_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits [N, V] of all tokens of answers; other positions, but for those beside them, are not computed."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    is_answer = answer_positions(batch["labels"])
    columns = is_answer.any(0).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    return logits[is_answer[:, columns]].float()


def with_slots(batch: dict[str, Any], slot: int, own: int, other: int, padding: int) -> dict[str, Any]:
    """The batch as a model with `other` queries reads it: each run of `own` slots becomes one of `other`."""
    if own == other:
        return batch
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length, is_slot = int(mask.sum()), ids == slot
        ids, labels, is_slot = ids[:length], labels[:length], is_slot[:length]
        repeats = torch.ones_like(ids)
        place = (is_slot.cumsum(0) - 1) % own
        repeats[is_slot] = (place[is_slot] == 0).long() * other  # the first slot of a unit stands for all
        rows.append((ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)))
    return batch | padded(rows, padding)


def padded(rows: Sequence[tuple[Tensor, Tensor]], padding: int) -> dict[str, Tensor]:
    """Ids and labels of rows, as the collator pads them: on the right."""
    pad = nn.utils.rnn.pad_sequence
    ids, labels = zip(*rows, strict=True)
    lengths = torch.tensor([len(row) for row in ids], device=ids[0].device)
    mask = (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()
    return {
        "input_ids": pad(list(ids), batch_first=True, padding_value=padding),
        "labels": pad(list(labels), batch_first=True, padding_value=IGNORED),
        "attention_mask": mask,
    }


def prompts_of(batch: dict[str, Any], opening: Sequence[int]) -> list[Tensor]:
    """The ids of each row up to its last answer; of an answer that thinks, with the tokens that open its thought."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        is_answer = labels != IGNORED
        begins = (is_answer & ~is_answer.roll(1)).nonzero()[:, 0]
        start = int(begins[-1])
        if ids[start : start + len(opening)].tolist() == list(opening):
            start += len(opening)
        found.append(ids[:start])
    return found


# ---- what the teacher said ----


class TeacherCache:
    """The teacher's best tokens at every position of answers, a file a row, named by what the row says and shows."""

    def __init__(self, folder: str | Path, top_k: int):
        self.folder, self.top_k = Path(folder).expanduser(), top_k

    def file(self, ids: Tensor, labels: Tensor, pixels: Sequence[Tensor]) -> Path:
        key = hashlib.sha256()
        for tensor in (ids, labels, *pixels):
            key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return self.folder / f"{key.hexdigest()[:32]}.safetensors"

    def write(self, file: Path, logits: Tensor) -> None:
        """Store logits [N, V] of a row."""
        top = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        rest = torch.logsumexp(logits, -1)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")  # another process may write the same row
        save_file({"indices": top.indices.int().cpu(), "logits": top.values.cpu(), "total": rest.cpu()}, draft)
        draft.replace(file)

    def read(self, file: Path) -> dict[str, Tensor]:
        """What was stored of a row.

        Raises:
            TrainingError: nothing was.
        """
        if not file.is_file():
            raise TrainingError(f"{self.folder} lacks a row of the data: give the teacher once more, which adds it.")
        return load_file(file)


# ---- the trainer ----


def shown(batch: dict[str, Any], row: int) -> list[Tensor]:
    """The slices that one row shows, without padding, and the times of its frames."""
    if "pixel_values" not in batch:
        return []
    pixels, sizes = batch["pixel_values"][row], batch["tgt_sizes"][row]
    found = [
        piece[..., : int(size.prod()) * piece.shape[-2]]
        for piece, size in zip(pixels, sizes, strict=True)
        if size.prod()
    ]
    if "temporal_ids" in batch:
        times = batch["temporal_ids"][row]
        found.append(times[times >= 0])  # those of stills and padding depend on what else a batch shows
    return found


class Features:
    """Hears what flows through a model's resampler: patches of each slice, and tokens of each unit."""

    def __init__(self, model: nn.Module):
        self.slices: list[Tensor] = []
        self.units: list[Tensor] = []
        resampler = next(module for name, module in model.named_modules() if name.split(".")[-1] == "resampler")
        self._handle = resampler.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        patches, sizes = args[0], args[1]
        self.slices += patches.split([rows * columns for rows, columns in sizes])
        self.units += output.unbind()

    def stop(self) -> None:
        self._handle.remove()


class DistillationTrainer(TrainerMixin, Trainer):
    """Trainer whose loss is the distance from a teacher.

    Args:
        teacher: a model with the student's tokens; None where all is cached.
        args, kwargs: those of transformers' Trainer.
    """

    method = "distillation"

    def __init__(self, model: nn.Module, teacher: nn.Module | None, args: DistillArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the positions of a batch
        self.teacher: Any = None if teacher is None else teacher.to(args.device).eval().requires_grad_(False)
        self.cache: Any = TeacherCache(args.teacher_cache, args.teacher_top_k) if args.teacher_cache else None
        self.opening = self.processing_class.tokenizer("<think>\n", add_special_tokens=False)["input_ids"]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args, batch = self.args, dict(inputs)
        if args.answers != "rows" and model.training:
            batch = self._answered(model, batch)
        weighs_features = "pixel_values" in batch and bool(args.tower_weight or args.resampler_weight)
        with ExitStack() as hooks:
            heard = []
            for each in (model, self.teacher) if weighs_features else ():
                heard.append(Features(self.accelerator.unwrap_model(each)))
                hooks.callback(heard[-1].stop)
            logits = answer_logits(model, batch)
            student = log_softmax(logits / args.temperature, -1)
            if self.cache is None:
                teacher = log_softmax(self._teacher_logits(batch) / args.temperature, -1)
            else:
                student, teacher = self._cached(batch, student)
        # Its gradient shrinks with the square of the temperature.
        loss = divergence(student, teacher, args.divergence) * args.temperature**2
        if args.label_weight:
            labels = batch["labels"][:, 1:][answer_positions(batch["labels"])]
            loss = loss + args.label_weight * cross_entropy(logits, labels)
        if weighs_features:
            own, other = heard
            if args.tower_weight:
                loss = loss + args.tower_weight * similarity_gap(own.slices, other.slices)
            if args.resampler_weight:
                loss = loss + args.resampler_weight * similarity_gap(own.units, other.units)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, batch: dict[str, Any]) -> Tensor:
        teacher, own = self.teacher, self.processing_class.image_processor.image_feature_size
        slot, padding = self.processing_class.image_token_id, self.processing_class.tokenizer.pad_token_id
        return answer_logits(teacher, with_slots(batch, slot, own, teacher.config.query_num, padding))

    def _cached(self, batch: dict[str, Any], student: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the student and the teacher over the tokens that the cache keeps, and the rest as one."""
        files = []
        counts = answer_positions(batch["labels"]).sum(1).tolist()
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids, labels = batch["input_ids"][row][mask], batch["labels"][row][mask]
            files.append(self.cache.file(ids, labels, shown(batch, row)))
        if self.teacher is not None and not all(file.is_file() for file in files):
            for file, logits in zip(files, self._teacher_logits(batch).split(counts), strict=True):
                self.cache.write(file, logits)
        stored = [self.cache.read(file) for file in files]
        kept, total, indices = (
            torch.cat([row[name] for row in stored]).to(student.device) for name in ("logits", "total", "indices")
        )
        # At another temperature the rest is as if it were one token: what its own tokens were is gone.
        rest = total + (1 - (kept - total[:, None]).exp().sum(-1)).clamp(min=1e-6).log()
        teacher = log_softmax(torch.cat([kept, rest[:, None]], -1) / self.args.temperature, -1)
        return with_rest(student, indices.long()), teacher

    @torch.no_grad()
    def _answered(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with answers that the teacher, or the student itself, writes to the last question of each row."""
        tokenizer, slot = self.processing_class.tokenizer, self.processing_class.image_token_id
        prompts, padding = prompts_of(batch, self.opening), tokenizer.pad_token_id
        own = self.processing_class.image_processor.image_feature_size
        by_teacher = self.args.answers == "teacher"
        asked = padded([(ids, torch.full_like(ids, IGNORED)) for ids in prompts], padding) | {
            name: batch[name] for name in self.processing_class.visual_input_names if name in batch
        }
        if by_teacher:
            asked = with_slots(asked, slot, own, self.teacher.config.query_num, padding)
        lengths = asked["attention_mask"].sum(1)
        width = asked["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):  # generated tokens follow: padding goes to the left
            rows = [row.roll(width - int(length)) for row, length in zip(asked[name], lengths, strict=True)]
            asked[name] = torch.stack(rows)
        del asked["labels"]
        settings = {"max_new_tokens": self.args.max_new_tokens, "do_sample": not by_teacher}
        if by_teacher:
            written = self.teacher.generate(**asked, **settings)[:, width:]
        else:
            model.eval()
            with unwrap_model_for_generation(model, self.accelerator) as student:
                written = student.generate(**asked, **settings)[:, width:]
            model.train()
        rows = []
        for prompt, answer in zip(prompts, written, strict=True):
            ends = (answer == tokenizer.eos_token_id).nonzero()[:, 0]
            answer = answer[: int(ends[0]) + 1] if len(ends) else answer
            ids = torch.cat([prompt, answer])
            labels = ids.clone()
            labels[: len(prompt)] = IGNORED
            rows.append((ids, labels))
        return batch | padded(rows, padding)


# ---- the run ----


def load_teacher(args: DistillArguments, student: nn.Module, processor: Any, dtype: str | None) -> nn.Module | None:
    """The teacher; None where its words are all in a cache.

    Raises:
        ArgumentsError: it has other tokens than the student, or other numbers of queries where resamplers are compared.
    """
    if args.teacher is None:
        return None
    source = source_of(args.teacher, trust_remote_code=args.trust_remote_code)
    tokens = AutoProcessor.from_pretrained(**source).tokenizer.get_vocab()
    if tokens != processor.tokenizer.get_vocab():
        raise ArgumentsError(
            f"teacher: {args.teacher} has other tokens than the student, so their words cannot be compared. Cut its "
            "vocabulary in the same way first: minicpmv compress --vocabulary CORPUS."
        )
    teacher = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype or "auto")
    if args.resampler_weight and teacher.config.query_num != student.config.query_num:
        raise ArgumentsError(
            f"resampler_weight compares tokens of images, but the teacher has {teacher.config.query_num} of a slice and the "
            f"student {student.config.query_num}. Leave it out."
        )
    return teacher


def train(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: DistillArguments,
) -> DistillationTrainer:
    """Train, evaluate, and leave in `args.output_dir` the student or its adapter, processor, card and curves."""
    check(data_args, args)
    checkpoint = checkpoint_to_resume(args)
    found = load_data(data_args)
    set_seed(args.seed)  # an adapter starts from random weights
    model, processor = load_model_and_processor(model_args, adapter_args, freeze_args, args.trust_remote_code)
    teacher = load_teacher(args, model, processor, model_args.dtype)
    collator, train_dataset, eval_dataset = collator_and_rows(
        ConversationCollator, model, processor, data_args, args, found
    )
    trainer = DistillationTrainer(
        model,
        teacher,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    set_up(trainer, freeze_args, data_args)
    train_and_evaluate(trainer, checkpoint)
    save(trainer)
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, DistillArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        train(*parse(GROUPS, argv, "Distillation: a smaller model learns from a larger one."))


if __name__ == "__main__":
    main(sys.argv[1:])
