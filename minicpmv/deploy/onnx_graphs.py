"""The three graphs of a model in other runtimes, as modules that exporters can trace: tower with resampler, embeddings, and
the language model with its cache. Parameters have the names of the checkpoint.

What is special:
- The tower's graph takes whole pictures, of any number of rows and columns of patches, and any number of frames a unit: every
  position is computed inside, from the shapes and the temporal ids.
- The language model's graph tells the places whose logits are wanted, and so reads a long prompt without a table of all.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from minicpmv.deploy.position_table import buckets_of
from minicpmv.runtimes.graphs import longest_side


class Graph(nn.Module):
    """A module to be traced."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, tuple[str, ...]] = {}  # of inputs, where the tracer finds no good names for their dimensions

    def example(self) -> tuple[tuple, tuple]:
        """Inputs to trace with, and which of their dimensions may change."""
        raise NotImplementedError


class VisionGraph(Graph):
    """Pictures and packed frames of one size to image features."""

    inputs = ("pixel_values", "temporal_ids")
    outputs = ("image_features",)

    def __init__(self, model: Any):
        super().__init__()
        self.vpm, self.resampler = model.vpm, model.resampler
        config = model.config
        self.patch, self.heads = config.patch_size, model.resampler.attn.num_heads
        self.table_side = config.vision_config.image_size // config.patch_size
        self.register_buffer(
            "buckets", torch.from_numpy(buckets_of(model.vpm, longest_side(config))), persistent=False
        )
        for name, dim in (("axis", model.resampler.embed_dim // 2), ("time", model.resampler.embed_dim)):
            frequencies = (10000.0 ** -(np.arange(dim // 2) / (dim / 2))).astype(np.float32)
            self.register_buffer(f"{name}_frequencies", torch.from_numpy(frequencies), persistent=False)

    def forward(self, pixel_values: Tensor, temporal_ids: Tensor) -> Tensor:
        """pixel_values [units, frames, 3, P * rows, P * columns], temporal_ids [units, frames] -> [units, Q, D]."""
        units, frames = temporal_ids.shape
        patches = self.vpm.embeddings.patch_embedding(
            pixel_values.flatten(0, 1)
        )  # [units * frames, D', rows, columns]
        rows, columns = patches.shape[-2:]
        places = self._buckets(rows)[:, None] * self.table_side + self._buckets(columns)
        states = patches.flatten(2).transpose(1, 2) + self.vpm.embeddings.position_embedding(places.flatten())
        for layer in self.vpm.encoder.layers:
            states = states + layer.self_attn(layer.layer_norm1(states))[0]
            mlp = layer.mlp
            states = states + mlp.fc2(mlp.activation(mlp.fc1(layer.layer_norm2(states))))
        states = self.vpm.post_layernorm(states)

        resampler = self.resampler
        values = resampler.ln_kv(resampler.kv_proj(states)).unflatten(
            0, (units, frames)
        )  # [units, frames, patches, D]
        by_row = _sincos(torch.arange(rows), self.axis_frequencies)
        by_column = _sincos(torch.arange(columns), self.axis_frequencies)
        halves = by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)
        times = _sincos(temporal_ids, self.time_frequencies) * (temporal_ids >= 0)[..., None]  # of a still: none
        keys = values + torch.cat(halves, dim=-1).flatten(0, 1) + times[:, :, None]
        attention = resampler.attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        query, key, value = (
            self._heads(nn.functional.linear(states, weight, bias))
            for states, weight, bias in zip(
                (resampler.ln_q(resampler.query)[None], keys.flatten(1, 2), values.flatten(1, 2)),
                weights,
                biases,
                strict=True,
            )
        )
        query = query.expand(units, -1, -1, -1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return resampler.ln_post(attention.out_proj(attended)) @ resampler.proj

    def example(self) -> tuple[tuple, tuple]:
        units, frames, rows, columns = (Dim(name) for name in ("units", "frames", "rows", "columns"))
        pictures = torch.zeros(2, 3, 3, 4 * self.patch, 5 * self.patch)
        times = torch.tensor([[0, 1, 2], [3, 4, 5]])
        pictures_change = {0: units, 1: frames, 3: self.patch * rows, 4: self.patch * columns}
        return (pictures, times), (pictures_change, {0: units, 1: frames})

    def _buckets(self, count: int) -> Tensor:
        """Rows of the position table that a side reads, int64 [count]."""
        line = self.buckets.index_select(0, torch.full((1,), count, dtype=torch.int64))
        return line[0, :count].long()

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _sincos(places: Tensor, frequencies: Tensor) -> Tensor:
    """[...] -> [..., 2 * frequencies], sines first."""
    angles = places.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class EmbeddingGraph(Graph):
    """Embeddings of tokens."""

    inputs = ("input_ids",)
    outputs = ("inputs_embeds",)

    def __init__(self, model: Any):
        super().__init__()
        self.llm = model.llm

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, L] -> [B, L, D]."""
        return self.llm.model.embed_tokens(input_ids)

    def example(self) -> tuple[tuple, tuple]:
        return (torch.zeros(2, 3, dtype=torch.long),), ({0: Dim("batch"), 1: Dim("length")},)


class DecoderGraph(Graph):
    """The language model behind what its cache holds."""

    shapes = {"attention_mask": ("batch", "past + length")}

    def __init__(self, model: Any):
        super().__init__()
        self.llm, self.layers = model.llm, model.config.num_hidden_layers
        pairs = [(layer, part) for layer in range(self.layers) for part in ("key", "value")]
        pasts = [f"past_key_values.{layer}.{part}" for layer, part in pairs]
        self.inputs = ("inputs_embeds", "attention_mask", "position_ids", "logit_places", *pasts)
        self.outputs = ("logits", *(f"present.{layer}.{part}" for layer, part in pairs))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_places: Tensor,
        pasts: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """inputs_embeds [B, L, D], attention_mask [B, past + L], position_ids [B, L], logit_places [kept] of 0 .. L - 1, and
        keys and values [B, H, past, d] of every layer -> logits [B, kept, V], and keys and values of past + L."""
        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(pasts[2 * layer], pasts[2 * layer + 1], layer)
        length, past = inputs_embeds.shape[1], pasts[0].shape[2]
        # Additive and of four dimensions, so that transformers makes none.
        is_later = torch.arange(past + length)[None] > torch.arange(past, past + length)[:, None]
        is_hidden = is_later[None, None] | (attention_mask == 0)[:, None, None]
        mask = is_hidden.to(inputs_embeds.dtype) * torch.finfo(inputs_embeds.dtype).min
        output = self.llm.model(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        )
        logits = self.llm.lm_head(output.last_hidden_state.index_select(1, logit_places))
        return (logits, *(states for layer in cache.layers for states in (layer.keys, layer.values)))

    def example(self) -> tuple[tuple, tuple]:
        config, length, past = self.llm.config, 3, 5
        shape = (2, config.num_key_value_heads, past, config.head_dim)
        inputs = (
            torch.zeros(2, length, config.hidden_size),
            torch.ones(2, past + length, dtype=torch.long),
            torch.arange(past, past + length).repeat(2, 1),
            torch.tensor([1, 2]),
            [torch.zeros(shape) for _ in range(2 * self.layers)],
        )
        batch, new, old, kept = (Dim(name) for name in ("batch", "length", "past", "kept"))
        changes = ({0: batch, 1: new}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: new}, {0: kept})
        return inputs, (*changes, [{0: batch, 2: old}] * (2 * self.layers))
