"""A whole step for a GPU: all its batches as a few flat tensors, and the losses of the network on them.

What is special:
- a small network is bound by the starts of its kernels. So the batches of a step go through it together, whatever their
  layouts; views, units and rows stand side by side, padded in the few groups that cost least (`cheapest_groups`);
- what a GPU would be waited for (lengths, places, positions) is counted by the processes that draw: the forward pass reads
  nothing back. Pixels travel as bytes;
- the losses are those of the batches one by one: a token weighs what it weighs in its own batch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicpmv.data.collator import IGNORED
from minicpmv.drawn.samples import Mixture
from minicpmv.train.nano.batches import Example, SampleEncoder, joined_labels, mean_weights, training_examples


# What one more group costs, in tokens of padding: about what a GPU does in the time that its kernels take to start.
GROUP_COSTS = {"tower": 16_000, "resampler": 2_000, "answers": 12_000}
LONGEST_SIDE = 256  # patches of a slice
LONGEST_TIME = 4096  # tenths of a second


def cheapest_groups(lengths: Sequence[int], group_cost: int) -> list[list[int]]:
    """Cut sequences, sorted by length, into groups that are padded to their longest: indices of the members of each.

    The padded tokens of all groups, and `group_cost` for each, are as few as possible.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    sizes, starts = np.unique([lengths[i] for i in order], return_index=True)
    ends = np.append(starts[1:], len(order))
    best, cuts = np.zeros(len(sizes) + 1), [0] * (len(sizes) + 1)
    for stop in range(1, len(sizes) + 1):  # the last of these groups takes the sizes from `cut` to `stop`
        costs = best[:stop] + (ends[stop - 1] - starts[:stop]) * sizes[stop - 1] + group_cost
        cuts[stop] = int(costs.argmin())
        best[stop] = costs[cuts[stop]]
    groups, stop = [], len(sizes)
    while stop:
        groups.append(order[starts[cuts[stop]] : ends[stop - 1]])
        stop = cuts[stop]
    return groups[::-1]


def padded_group(lengths: Sequence[int]) -> dict[str, Any]:
    """How packed sequences stand in a padded tensor [B, L]: its `shape`, the flat `place` of each token, the `lengths`."""
    longest = -(-max(lengths) // 8) * 8  # kernels with a mask want multiples of 8
    place = np.concatenate([np.arange(length) + longest * i for i, length in enumerate(lengths)])
    return {"shape": (len(lengths), longest), "place": torch.from_numpy(place), "lengths": torch.tensor(lengths)}


def spans(lengths: Sequence[int], chosen: Sequence[int]) -> np.ndarray:
    """The places of the tokens of the `chosen` ones of packed sequences."""
    starts = list(accumulate(lengths, initial=0))
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])


def packed_step(encoder: SampleEncoder, batches: list[list[Example]], tower_views: int) -> dict[str, Any]:
    """The batches of one step, for [`packed_losses`].

    Args:
        tower_views: batches with more views than that do not teach the tower.
    """
    examples = [example for batch in batches for example in batch]
    learns = [sum(len(example.tgt_sizes) for example in batch) <= tower_views for batch in batches for _ in batch]
    views = [
        (pixels, tuple(size), does_learn)
        for example, does_learn in zip(examples, learns, strict=True)
        for pixels, size in zip(example.pixel_values, torch.as_tensor(example.tgt_sizes).tolist(), strict=True)
    ]
    units = [unit for example in examples for unit in example.temporal_ids]
    lengths = [rows * columns for _, (rows, columns), _ in views]
    # In the order of the tower: those that teach it, then the others, each in groups of like length.
    groups = []
    for does_learn in (True, False):
        own = [i for i, view in enumerate(views) if view[2] == does_learn]
        if own:
            found = cheapest_groups([lengths[i] for i in own], GROUP_COSTS["tower"])
            groups += [(does_learn, [own[i] for i in group]) for group in found]
    order = [i for _, group in groups for i in group]
    patches = spans(lengths, order)
    image_processor = encoder.collator.processor.image_processor
    step: dict[str, Any] = {
        "pixels": bytes_of_patches([views[i][0] for i in order], image_processor),
        "tower": [padded_group([lengths[i] for i in group]) | {"learns": does_learn} for does_learn, group in groups],
        "labels": {name: labels[patches] for name, labels in joined_labels(examples).items()},
    }
    weights = [mean_weights(joined_labels(batch), len(batches)) for batch in batches]
    step["weights"] = {name: torch.cat([part[name] for part in weights])[patches] for name in step["labels"]}
    frames = [frame for unit in units for frame in unit]
    step |= {name: torch.from_numpy(place) for name, place in grid_places([views[i][1] for i in order]).items()}
    step["time"] = torch.tensor([frames[i] for i in order]).repeat_interleave(
        torch.tensor([lengths[i] for i in order])
    )
    # Of each patch in the order of the samples, where it stands in the order of the tower.
    in_tower = np.empty_like(patches)
    in_tower[patches] = np.arange(len(patches))
    views_before = list(accumulate(map(len, units), initial=0))
    unit_lengths = [sum(lengths[a:b]) for a, b in pairwise(views_before)]
    unit_groups = cheapest_groups(unit_lengths, GROUP_COSTS["resampler"])
    step["resampler"] = [
        padded_group([unit_lengths[i] for i in group])
        | {"source": torch.from_numpy(in_tower[spans(unit_lengths, group)])}
        for group in unit_groups
    ]
    unit_place = np.empty(len(units), dtype=np.int64)
    unit_place[[i for group in unit_groups for i in group]] = np.arange(len(units))
    step["answers"] = answer_groups(encoder, batches, unit_place)
    return step


def grid_places(sizes: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """For each patch of packed views of `sizes` (rows, columns): its row and column, and how many of both its view has."""
    return {
        "row": np.concatenate([np.arange(rows).repeat(columns) for rows, columns in sizes]),
        "column": np.concatenate([np.tile(np.arange(columns), rows) for rows, columns in sizes]),
        "rows": np.concatenate([np.full(rows * columns, rows) for rows, columns in sizes]),
        "columns": np.concatenate([np.full(rows * columns, columns) for rows, columns in sizes]),
    }


def answer_groups(
    encoder: SampleEncoder, batches: list[list[Example]], unit_place: np.ndarray
) -> list[dict[str, Any]]:
    """Rows for the language model, in groups of like length: `ids` [B, L], the `slots` of the `visual` rows among the
    flat [B * L], the places of `written` tokens there (of the tokens before them), which are `wanted`, and `weights`."""
    rows = []
    first = 0
    queries = encoder.collator.processor.image_processor.image_feature_size
    for batch in batches:
        count = sum(label != IGNORED for example in batch for label in example.labels)
        for example in batch:
            taken = len(example.temporal_ids)
            visual = (unit_place[first : first + taken, None] * queries + np.arange(queries)).ravel()
            rows.append((example, visual, 1 / (count * len(batches))))
            first += taken
    groups = []
    for chosen in cheapest_groups([len(example.input_ids) for example, _, _ in rows], GROUP_COSTS["answers"]):
        own = [rows[i] for i in chosen]
        group = padded_group([len(example.input_ids) for example, _, _ in own])
        size, longest = group["shape"]
        ids = np.full((size, longest), encoder.collator.processor.tokenizer.pad_token_id)
        labels = np.full((size, longest), IGNORED)
        weights = np.empty(size, dtype=np.float32)
        for place, (example, _, weight) in enumerate(own):
            ids[place, : len(example.input_ids)] = example.input_ids
            labels[place, : len(example.labels)] = example.labels
            weights[place] = weight
        slots = (ids == encoder.collator.processor.image_token_id).ravel().nonzero()[0]
        visual = np.concatenate([visual for _, visual, _ in own])
        if len(slots) != len(visual):
            raise ValueError(f"the prompts have {len(slots)} image slots, but the images give {len(visual)} tokens")
        written = (labels[:, 1:] != IGNORED).nonzero()
        group = {
            "ids": ids,
            "slots": slots,
            "visual": visual,
            "written": written[0] * longest + written[1],
            "wanted": labels[:, 1:][written],
            "weights": weights[written[0]],
        }
        groups.append({name: torch.from_numpy(value) for name, value in group.items()})
    return groups


def bytes_of_patches(strips: list[Tensor], image_processor: Any) -> Tensor:
    """Strips [3, P, P * patches] as the bytes that they were before they were normalized: uint8 [patches, 3, P, P]."""
    strip = torch.cat(strips, dim=-1)
    mean, std = (
        torch.tensor(values)[:, None, None] * 255 for values in (image_processor.norm_mean, image_processor.norm_std)
    )
    pixels = strip.mul_(std).add_(mean).round_().to(torch.uint8)
    return pixels.unflatten(-1, (-1, image_processor.patch_size)).permute(2, 0, 1, 3).contiguous()


@dataclass
class PackedSteps(torch.utils.data.Dataset):
    """The steps of a stage, each drawn and packed when it is asked for; any number, below 0 too, is a step to draw."""

    encoder: SampleEncoder
    mixture: Mixture
    size: int
    seed: int
    first_batch: int  # of the stage
    batches: int
    tower_views: int

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        """A step as one buffer and what lies where in it: see [`unbundled`]."""
        first = self.first_batch + number * self.batches
        batches = [
            training_examples(self.encoder, self.mixture, self.size, self.seed, first + i) for i in range(self.batches)
        ]
        return bundled(packed_step(self.encoder, batches, self.tower_views))


@dataclass(frozen=True)
class Piece:
    """Where a tensor lies in a buffer."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


def bundled(value: Any) -> tuple[Tensor, Any]:
    """The tensors in lists and dicts as one buffer of bytes, which is handed over and copied at once, and a [`Piece`] in
    the place of each."""
    parts: list[Tensor] = []

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(part) for name, part in value.items()}
        if isinstance(value, list):
            return [placed(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        flat = value.contiguous().flatten().view(torch.uint8)
        piece = Piece(sum(map(len, parts)), value.dtype, value.shape)
        parts.append(F.pad(flat, (0, -len(flat) % 16)))  # aligned for every type
        return piece

    layout = placed(value)
    return torch.cat(parts), layout


def unbundled(buffer: Tensor, layout: Any) -> Any:
    """What [`bundled`] was given, as views of the buffer."""
    if isinstance(layout, dict):
        return {name: unbundled(buffer, part) for name, part in layout.items()}
    if isinstance(layout, list):
        return [unbundled(buffer, part) for part in layout]
    if not isinstance(layout, Piece):
        return layout
    size = layout.shape.numel() * layout.dtype.itemsize
    return buffer[layout.start : layout.start + size].view(layout.dtype).view(layout.shape)


# --- On the device ---


class Tables:
    """What the forward pass looks up, on its device: positions of patches and times, and how pixels are normalized."""

    def __init__(self, trainee: torch.nn.Module, image_processor: Any, device: torch.device):
        tower, resampler = trainee.model.vpm, trainee.model.resampler
        tower_code, resampler_code = (sys.modules[type(part).__module__] for part in (tower, resampler))
        side = tower.embeddings.num_patches_per_side
        buckets = torch.zeros(LONGEST_SIDE + 1, LONGEST_SIDE, dtype=torch.long)
        for count in range(1, LONGEST_SIDE + 1):
            buckets[count, :count] = torch.from_numpy(tower_code.position_buckets(count, side))
        self.buckets = buckets.to(device)
        axis = resampler_code.sincos_positions(np.arange(LONGEST_SIDE), resampler.embed_dim // 2)
        times = resampler_code.sincos_positions(np.arange(LONGEST_TIME), resampler.embed_dim)
        self.axis = torch.from_numpy(axis).to(device)
        self.times = torch.cat([torch.zeros(1, resampler.embed_dim), torch.from_numpy(times)]).to(device)
        mean, std = (
            torch.tensor(values, device=device)[:, None, None] * 255
            for values in (image_processor.norm_mean, image_processor.norm_std)
        )
        self.mean, self.std = mean, std


def packed_losses(
    trainee: torch.nn.Module, step: dict[str, Any], tables: Tables, answers: bool = True
) -> tuple[Tensor, Tensor]:
    """The dense loss and the answer loss (0 without answers) of a [`packed_step`] on the device of `tables`: means over
    the batches."""
    model = trainee.model
    patches = tower_states(model.vpm, step, tables)
    dense, _ = trainee.tower_heads(patches, step["labels"], step["weights"])
    answer = torch.zeros((), device=patches.device)
    if not answers:
        return dense, answer
    places = torch.cat([tables.axis[step["column"]], tables.axis[step["row"]]], dim=-1)
    places = places + tables.times[step["time"] + 1]
    tokens = visual_tokens(model.resampler, patches, places, step)
    read = read_patches(trainee.reader, tokens.unflatten(0, (-1, model.resampler.num_queries)), places, step)
    dense = dense + trainee.reader_heads(read, step["labels"], step["weights"])[0]
    for group in step["answers"]:
        embeddings = model.get_input_embeddings()(group["ids"])
        rows = tokens.index_select(0, group["visual"]).to(embeddings.dtype)
        embeddings = embeddings.flatten(0, 1).index_copy(0, group["slots"], rows).view_as(embeddings)
        # Causal, and padded on the right: no mask is needed. In this form nothing looks for one.
        no_mask = {"full_attention": None}
        states = model.llm.model(inputs_embeds=embeddings, attention_mask=no_mask, use_cache=False).last_hidden_state
        logits = model.llm.lm_head(states.flatten(0, 1).index_select(0, group["written"])).float()
        answer = answer + (F.cross_entropy(logits, group["wanted"], reduction="none") * group["weights"]).sum()
    return dense, answer


def tower_states(tower: torch.nn.Module, step: dict[str, Any], tables: Tables) -> Tensor:
    """The tower's output [patches, D], in the order of the step."""
    embeddings, first = tower.embeddings, tower.embeddings.patch_embedding
    pixels = ((step["pixels"].float() - tables.mean) / tables.std).flatten(1)
    rows, columns = tables.buckets[step["rows"], step["row"]], tables.buckets[step["columns"], step["column"]]
    positions = rows * embeddings.num_patches_per_side + columns
    outputs, start = [], 0
    for group in step["tower"]:
        part = slice(start, start := start + len(group["place"]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and group["learns"]):
            states = F.linear(pixels[part], first.weight.flatten(1), first.bias)
            states = padded(states + embeddings.position_embedding(positions[part]), group)
            states = tower.encoder(states, key_mask(group, states.shape[1])).last_hidden_state
            outputs.append(tower.post_layernorm(states.flatten(0, 1).index_select(0, group["place"])))
    return torch.cat(outputs)


def visual_tokens(resampler: torch.nn.Module, patches: Tensor, places: Tensor, step: dict[str, Any]) -> Tensor:
    """The tokens of all units, flat [units * Q, D], in the order of the step's groups."""
    attention = resampler.attn
    values = resampler.ln_kv(resampler.kv_proj(patches))
    keys = values + places
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query = F.linear(resampler.ln_q(resampler.query), weights[0], biases[0])
    keys, values = F.linear(keys, weights[1], biases[1]), F.linear(values, weights[2], biases[2])

    def heads(states: Tensor) -> Tensor:  # [B, L, D] -> [B, H, L, d]
        return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    outputs = []
    for group in step["resampler"]:
        own_keys, own_values = (padded(states.index_select(0, group["source"]), group) for states in (keys, values))
        queries = query.expand(len(own_keys), -1, -1)
        attended = F.scaled_dot_product_attention(
            heads(queries), heads(own_keys), heads(own_values), attn_mask=key_mask(group, queries.shape[1])
        )
        outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return resampler.ln_post(attention.out_proj(torch.cat(outputs))) @ resampler.proj


def read_patches(reader: torch.nn.Module, tokens: Tensor, places: Tensor, step: dict[str, Any]) -> Tensor:
    """What the tokens [units, Q, D] tell of each patch [patches, D], in the order of the tower."""
    groups = step["resampler"]
    outputs = []
    for group, own_tokens in zip(groups, tokens.split([group["shape"][0] for group in groups]), strict=True):
        read = reader(own_tokens, padded(places.index_select(0, group["source"]), group))
        outputs.append(read.flatten(0, 1).index_select(0, group["place"]))
    read = torch.cat(outputs)
    return torch.empty_like(read).index_copy(0, torch.cat([group["source"] for group in groups]), read)


def padded(states: Tensor, group: dict[str, Any]) -> Tensor:
    """Packed [tokens, D] -> [B, L, D], with zeros in the padding."""
    size, longest = group["shape"]
    empty = states.new_zeros(size * longest, states.shape[-1])
    return empty.index_copy(0, group["place"], states).unflatten(0, (size, longest))


def key_mask(group: dict[str, Any], queries: int) -> Tensor:
    """What is added to scores [B, 1, queries, L]: 0 where a key is, minus infinity in the padding."""
    lengths, (_, longest) = group["lengths"], group["shape"]
    device = lengths.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    is_padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    mask = torch.zeros(is_padding.shape, dtype=dtype, device=lengths.device).masked_fill_(is_padding, -torch.inf)
    return mask[:, None, None].expand(-1, -1, queries, -1).contiguous()
