"""What nano's training trains: the model, with heads that name what lies under each patch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from minicpmv.data.collator import IGNORED
from minicpmv.drawn.drawing import BOX_BINS, COLOR_CLASSES, KIND_CLASSES
from minicpmv.train.nano.batches import mean_weights


@torch.no_grad()
def spread_queries(resampler: nn.Module) -> None:
    """Start each head of each query at one spot of the image, so that the tokens begin as a coarse map of it.

    The spots are the cells of a grid over an image of 8 x 10 patches; the heads of a query lie side by side. Part h of a
    query holds the sin-cos position of head h's spot, in the highest frequencies of that code, where near and far
    positions differ most; head h projects that part, and the same frequencies of the keys. From a random start the
    queries all see the same average, and it takes most of an hour until they part.
    """
    side = math.isqrt(resampler.num_queries)
    width, head_dim = resampler.embed_dim, resampler.attn.head_dim
    heads, fine, quarter = width // head_dim, head_dim // 4, width // 4  # `fine` sines and cosines of each axis
    chosen = torch.cat([torch.arange(fine) + quarter * part for part in range(4)])
    frequencies = 1 / 10000 ** (torch.arange(fine) / quarter)

    def code(spots):  # [N] -> [N, head_dim / 2]
        return torch.cat([torch.sin(spots[:, None] * frequencies), torch.cos(spots[:, None] * frequencies)], dim=1)

    rows = code((torch.arange(side) + 0.5) * 8 / side - 0.5)
    columns = code((torch.arange(side * heads) + 0.5) * 10 / (side * heads) - 0.5)
    pick = torch.zeros(2, width, width)  # of queries and of keys
    for head in range(heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        own = columns[head::heads]
        resampler.query[: side * side, part] = torch.cat([own.repeat(side, 1), rows.repeat_interleave(side, 0)], dim=1)
        pick[0, part, part] = torch.eye(head_dim)
        pick[1, torch.arange(head_dim) + head * head_dim, chosen] = 1
    noise = torch.randn_like(resampler.attn.in_proj_weight[: 2 * width]) * 0.01
    resampler.attn.in_proj_weight[: 2 * width] = pick.flatten(0, 1) + noise


# What the heads say of each patch: how many answers to choose from, and how often.
HEADS = {"kind": (len(KIND_CLASSES), 1), "color": (len(COLOR_CLASSES), 1), "box": (BOX_BINS, 4)}
TOKENS_AT_ONCE = {"cpu": 1200, "cuda": 40_000}


class Heads(nn.Module):
    """What lies under each patch, and where it begins and ends, read off its state by linear maps."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, math.prod(sizes)) for name, sizes in HEADS.items()})

    def forward(
        self, states: torch.Tensor, labels: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of all heads' losses on states [patches, D], and the logits of kinds [patches, classes]."""
        loss, logits = torch.zeros((), device=states.device), {}
        for name, (classes, _) in HEADS.items():
            logits[name] = self.heads[name](states).float().view(-1, classes)
            losses = F.cross_entropy(logits[name], labels[name].flatten(), ignore_index=IGNORED, reduction="none")
            loss = loss + (losses * weights[name].flatten()).sum()
        return loss, logits["kind"]


class Reader(nn.Module):
    """What the tokens of a unit tell of each place of it, and of each time.

    The language model can learn to say where a thing lies only from tokens that carry it, and they come to carry it only
    where it is used: each waits for the other. This makes the tokens begin.
    """

    def __init__(self, width: int):
        super().__init__()
        self.place = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """tokens [units, Q, D], positions of patches, in space and time, [units, patches, D] -> what is there [units, patches, D]."""
        return self.norm(self.attention(self.place(places), tokens, tokens, need_weights=False)[0])


class Trainee(nn.Module):
    """The model, with heads that say what lies under each patch, by the tower's output and by the tokens; only the model is
    kept in the end."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.tower_heads = Heads(model.config.vision_config.hidden_size)
        self.reader, self.reader_heads = Reader(model.config.hidden_size), Heads(model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self, batch: dict[str, Any], answers: bool = True, tower_learns: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the dense loss, the answer loss (0 without answers), the logits of kinds, and whether each answer
        token is the most likely one."""
        slices = [pixels for sample in batch["pixel_values"] for pixels in sample]
        sizes = [tuple(size) for sample in batch["tgt_sizes"] for size in sample.tolist()]
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower_learns):
            patches = self.patches(slices, sizes)
        labels = batch["patch_labels"]
        weights = mean_weights(labels)
        dense_loss, kinds = self.tower_heads(patches, labels, weights)
        if not answers:
            return dense_loss, torch.zeros((), device=kinds.device), kinds, None
        groups = [group for sample in batch["temporal_ids"] for group in sample]
        tokens = self.model.resampler(patches, sizes, groups)  # [units, Q, D]
        dense_loss = dense_loss + self.reader_heads(self.read(tokens, sizes, groups), labels, weights)[0]
        answer_loss, right = self.answer(batch, tokens)
        return dense_loss, answer_loss, kinds, right

    def read(self, tokens: torch.Tensor, sizes: list[tuple[int, int]], groups: list[list[int]]) -> torch.Tensor:
        """What the tokens [units, Q, D] tell of each patch [patches, D], in the order of the slices."""
        patches = iter([rows * columns for rows, columns in sizes])
        lengths = torch.tensor([sum(next(patches) for _ in group) for group in groups])
        places = self.model.resampler.positions(sizes, [time for group in groups for time in group], tokens.device)
        places = nn.utils.rnn.pad_sequence(places.split(lengths.tolist()), batch_first=True)
        is_patch = torch.arange(places.shape[1]) < lengths[:, None]
        return self.reader(tokens, places)[is_patch.to(tokens.device)]

    def patches(self, slices: list[torch.Tensor], sizes: list[tuple[int, int]]) -> torch.Tensor:
        """The tower's output [patches, D], in the order of the slices; equally long ones go through it side by side."""
        lengths = [rows * columns for rows, columns in sizes]
        order = sorted(range(len(sizes)), key=lambda i: lengths[i])
        states = self.model.vpm([slices[i] for i in order], [sizes[i] for i in order]).last_hidden_state
        pieces = dict(zip(order, states.split([lengths[i] for i in order]), strict=True))
        return torch.cat([pieces[i] for i in range(len(sizes))])

    def answer(self, batch: dict[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of the answers, and for each row whether it is what greedy search gives.

        Short conversations do not wait for long ones: rows of like length go through the language model together, as many
        as stay in the caches of a CPU.
        """
        units = [len(groups) for groups in batch["temporal_ids"]]
        visual = tokens.split(units)
        lengths = batch["attention_mask"].sum(1)
        at_once = max(1, TOKENS_AT_ONCE[tokens.device.type] // int(lengths.max()))
        total, count = 0.0, int((batch["labels"] != IGNORED).sum())
        right = torch.zeros(len(lengths), dtype=torch.bool, device=tokens.device)
        for rows in lengths.argsort(stable=True).split(at_once):
            longest = int(lengths[rows].max())
            ids, mask, labels = (batch[name][rows, :longest] for name in ("input_ids", "attention_mask", "labels"))
            images = {"image": torch.cat([visual[row] for row in rows])}
            # The head is half as large as a layer: it is asked only where an answer of some row is written.
            written = labels[:, 1:] != IGNORED
            kept = written.any(0).nonzero()[:, 0]
            wanted, written = labels[:, 1:][:, kept], written[:, kept]
            output = self.model(
                input_ids=ids, attention_mask=mask, mm_encoder_outputs=images, use_cache=False, logits_to_keep=kept
            )
            logits = output.logits.float()
            total = total + F.cross_entropy(logits[written], wanted[written], reduction="sum")
            right[rows] = ((logits.argmax(-1) == wanted) | ~written).all(1)
        return total / count, right
