"""The four parts of a model as ExecuTorch runs them, as modules that its exporter can trace: tower, resampler, embeddings, and
the language model with room for what it has read.

What is special:
- A part reads one slice, one unit, one conversation. Memory is planned for the largest inputs before anything runs, so only
  one length of each is free: patches, frames, tokens.
- Keys and values lie in the program: tokens are written to their places, and what lies behind them is hidden. So a conversation
  is cut by going on from an earlier place.
- Queries that share a key are rows of one product: repeating the keys for them would cost as much as reading the weights.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from minicpmv.deploy.position_table import buckets_of
from minicpmv.runtimes.executorch import DECODER, EMBEDDING, MOST_FRAMES, MOST_TOKENS, RESAMPLER, TOWER


class TowerGraph(nn.Module):
    """A slice to one vector a patch."""

    def __init__(self, model: Any, most_patches: int):
        super().__init__()
        self.vpm, self.most_patches = model.vpm, most_patches
        self.table_side = self.vpm.embeddings.num_patches_per_side
        self.register_buffer("buckets", torch.from_numpy(buckets_of(model.vpm, most_patches)), persistent=False)

    def forward(self, pixel_values: Tensor, size: Tensor) -> Tensor:
        """pixel_values [patches, 3, P, P] row by row, size int64 [2] of the slice: (rows, columns) -> [patches, D']."""
        embedding = self.vpm.embeddings.patch_embedding
        patches = nn.functional.linear(pixel_values.flatten(1), embedding.weight.flatten(1), embedding.bias)
        rows, columns = _rows_and_columns(patches.shape[0], size)  # len() would fix the number
        of_row, of_column = self.buckets.index_select(0, size).long()
        places = of_row.index_select(0, rows) * self.table_side + of_column.index_select(0, columns)
        states = patches + self.vpm.embeddings.position_embedding(places)
        for layer in self.vpm.encoder.layers:
            states = states + _self_attention(layer.self_attn, layer.layer_norm1(states))
            mlp = layer.mlp
            states = states + mlp.fc2(mlp.activation(mlp.fc1(layer.layer_norm2(states))))
        return self.vpm.post_layernorm(states)

    def example(self) -> tuple[tuple, tuple]:
        patch = self.vpm.embeddings.patch_size
        inputs = torch.zeros(20, 3, patch, patch), torch.tensor([4, 5])
        return inputs, ({0: Dim("patches", max=self.most_patches)}, None)


def _rows_and_columns(patches: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """In which row and column of a slice each of its patches is, int64 [patches]."""
    places = torch.arange(patches)
    rows = torch.div(places, size[1:], rounding_mode="floor")
    return rows, places - rows * size[1:]


def _self_attention(attention: nn.Module, states: Tensor) -> Tensor:
    """[patches, D'] -> [patches, D']."""
    query, key, value = (
        _heads(project(states), attention.num_heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return attention.out_proj(_attend(query, key, value))


def _heads(states: Tensor, heads: int) -> Tensor:
    """[L, H * d] -> [1, H, L, d]."""
    return states.unflatten(-1, (heads, -1)).transpose(0, 1)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, H, L, d] -> [L, H * d]."""
    return nn.functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)


class ResamplerGraph(nn.Module):
    """The patches of a unit to image features."""

    def __init__(self, model: Any, most_patches: int):
        super().__init__()
        self.resampler, self.most_patches = model.resampler, most_patches
        for name, dim in (("axis", self.resampler.embed_dim // 2), ("time", self.resampler.embed_dim)):
            frequencies = (10000.0 ** -(np.arange(dim // 2) / (dim / 2))).astype(np.float32)
            self.register_buffer(f"{name}_frequencies", torch.from_numpy(frequencies), persistent=False)

    def forward(self, states: Tensor, size: Tensor, temporal_ids: Tensor) -> Tensor:
        """states [frames, patches, D'], size int64 [2], temporal_ids int64 [frames], -1 for an image -> [Q, D]."""
        resampler, attention = self.resampler, self.resampler.attn
        values = resampler.ln_kv(resampler.kv_proj(states))  # [frames, patches, D]
        rows, columns = _rows_and_columns(states.shape[1], size)
        by_place = torch.cat([_sincos(columns, self.axis_frequencies), _sincos(rows, self.axis_frequencies)], dim=-1)
        times = _sincos(temporal_ids, self.time_frequencies) * (temporal_ids >= 0).float()[:, None]  # of a still: none
        keys = values + by_place[None] + times[:, None]
        inputs = resampler.ln_q(resampler.query), keys.flatten(0, 1), values.flatten(0, 1)
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        query, key, value = (
            _heads(nn.functional.linear(part, weight, bias), attention.num_heads)
            for part, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        return resampler.ln_post(attention.out_proj(_attend(query, key, value))) @ resampler.proj

    def example(self) -> tuple[tuple, tuple]:
        width = self.resampler.kv_proj.in_features
        frames, patches = Dim("frames", max=MOST_FRAMES), Dim("patches", max=self.most_patches)
        inputs = torch.zeros(3, 20, width), torch.tensor([4, 5]), torch.tensor([0, 3, 7])
        return inputs, ({0: frames, 1: patches}, None, {0: frames})


def _sincos(places: Tensor, frequencies: Tensor) -> Tensor:
    """[n] -> [n, 2 * frequencies], sines first."""
    angles = places.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class EmbeddingGraph(nn.Module):
    """Embeddings of tokens, in 8 bits with a scale for each token where `is_small`."""

    def __init__(self, model: Any, is_small: bool):
        super().__init__()
        table = model.llm.get_input_embeddings().weight.detach()
        self.is_small = is_small
        if is_small:
            scales = (table.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
            self.register_buffer("scales", scales, persistent=False)
            table = (table / scales).round().to(torch.int8)
        self.register_buffer("table", table, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [L] -> [L, D]."""
        rows = self.table.index_select(0, input_ids)
        return rows.float() * self.scales.index_select(0, input_ids) if self.is_small else rows

    def example(self) -> tuple[tuple, tuple]:
        return (torch.zeros(3, dtype=torch.long),), ({0: Dim("length", max=MOST_TOKENS)},)


class DecoderGraph(nn.Module):
    """The language model, with room for `room` tokens."""

    def __init__(self, model: Any, room: int):
        super().__init__()
        self.llm, self.room = model.llm, room
        config = self.llm.config
        self.heads, self.width = config.num_key_value_heads, config.head_dim
        self.group = config.num_attention_heads // self.heads  # queries that share a key
        for layer in range(config.num_hidden_layers):
            for part in ("keys", "values"):
                self.register_buffer(f"{part}_{layer}", torch.zeros(self.heads, room, self.width), persistent=False)

    def forward(self, inputs_embeds: Tensor, positions: Tensor, logit_places: Tensor) -> Tensor:
        """inputs_embeds [L, D] at positions int64 [L], which go on by one, behind what was read before them; logit_places
        int64 [kept] of 0 .. L - 1 -> logits [kept, V]."""
        decoder, states = self.llm.model, inputs_embeds
        cosines, sines = (part[0] for part in decoder.rotary_emb(states, positions[None]))  # [L, d]
        is_later = torch.arange(self.room)[None] > positions[:, None]
        mask = (is_later.float() * torch.finfo(torch.float32).min).repeat(self.group, 1)  # [group * L, room]
        for place, layer in enumerate(decoder.layers):
            attended = self._attention(
                layer.self_attn, place, layer.input_layernorm(states), cosines, sines, positions, mask
            )
            states = states + attended
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.llm.lm_head(decoder.norm(states.index_select(0, logit_places)))

    def _attention(
        self,
        attention: nn.Module,
        place: int,
        states: Tensor,
        cosines: Tensor,
        sines: Tensor,
        positions: Tensor,
        mask: Tensor,
    ) -> Tensor:
        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.width))  # [L, H, d]

        def turn(heads: Tensor) -> Tensor:
            # No chunk(): ExecuTorch's verifier takes the length of what is in a list of tensors, which fixes it.
            first, second = heads[..., : self.width // 2], heads[..., self.width // 2 :]
            return heads * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]

        query = turn(attention.q_norm(split(attention.q_proj(states)))).unflatten(1, (self.heads, self.group))
        query = query.permute(1, 2, 0, 3).flatten(1, 2)  # [H, group * L, d]
        new = turn(attention.k_norm(split(attention.k_proj(states)))), split(attention.v_proj(states))
        keys, values = (getattr(self, f"{part}_{place}") for part in ("keys", "values"))
        for kept, part in zip((keys, values), new, strict=True):
            kept.index_copy_(1, positions, part.transpose(0, 1))
        scores = query @ keys.transpose(1, 2) * attention.scaling + mask
        attended = (scores.softmax(-1) @ values).unflatten(1, (self.group, -1))  # [H, group, L, d]
        return attention.o_proj(attended.permute(2, 0, 1, 3).flatten(1))

    def example(self) -> tuple[tuple, tuple]:
        length, kept = Dim("length", max=MOST_TOKENS), Dim("kept", max=MOST_TOKENS)
        inputs = torch.zeros(3, self.llm.config.hidden_size), torch.arange(5, 8), torch.tensor([1, 2])
        return inputs, ({0: length}, {0: length}, {0: kept})


def graphs(model: Any, most_patches: int, room: int, is_small: bool) -> dict[str, nn.Module]:
    """All parts, by the name of their method."""
    return {
        TOWER: TowerGraph(model, most_patches),
        RESAMPLER: ResamplerGraph(model, most_patches),
        EMBEDDING: EmbeddingGraph(model, is_small),
        DECODER: DecoderGraph(model, room),
    }
