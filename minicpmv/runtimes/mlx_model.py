"""Tower, resampler and language model as modules of MLX. Parameters have the names of the checkpoint, where it has them.

What is special:
- Slices and conversations are read one at a time, so nothing is padded.
- Keys and values are written where they belong; going on from an earlier place forgets what lies behind it.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn


STEP = 256  # room for keys and values comes in multiples


class Attention(nn.Module):
    """Multi-head attention, of a slice with itself or of queries with a unit."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def __call__(self, query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        """query [L, D], key and value [S, D] -> [L, D]."""
        query, key, value = (
            project(states).reshape(1, len(states), self.heads, -1).transpose(0, 2, 1, 3)
            for project, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        attended = mx.fast.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5)
        return self.out_proj(attended.transpose(0, 2, 1, 3).reshape(query.shape[2], -1))


class VisionMLP(nn.Module):
    def __init__(self, dim: int, wide: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, wide), nn.Linear(wide, dim)

    def __call__(self, states: mx.array) -> mx.array:
        return self.fc2(nn.gelu_approx(self.fc1(states)))


class VisionLayer(nn.Module):
    def __init__(self, dim: int, wide: int, heads: int, eps: float):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.self_attn, self.mlp = Attention(dim, heads), VisionMLP(dim, wide)

    def __call__(self, states: mx.array) -> mx.array:
        normed = self.layer_norm1(states)
        states = states + self.self_attn(normed, normed, normed)
        return states + self.mlp(self.layer_norm2(states))


class Tower(nn.Module):
    """A slice to one vector a patch."""

    def __init__(self, config: Any, layers: int, longest: int):
        super().__init__()
        dim, patch, side = config.hidden_size, config.patch_size, config.image_size // config.patch_size
        self.side = side
        self.patch_embedding = nn.Linear(config.num_channels * patch * patch, dim)
        self.position_embedding = mx.zeros((side * side, dim))
        self.buckets = mx.zeros((longest + 1, longest), mx.uint8)  # row of the table for each patch of a side
        self.layers = [
            VisionLayer(dim, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
            for _ in range(layers)
        ]
        self.post_layernorm = nn.LayerNorm(dim, config.layer_norm_eps)

    def __call__(self, pixels: mx.array, size: tuple[int, int]) -> mx.array:
        """pixels [3, P, P * patches] of (rows, columns) patches -> [patches, D']."""
        channels, patch, _ = pixels.shape
        patches = (
            pixels.reshape(channels, patch, -1, patch).transpose(2, 0, 1, 3).reshape(-1, channels * patch * patch)
        )
        of_row, of_column = (self.buckets[count, :count].astype(mx.int32) for count in size)
        places = (of_row[:, None] * self.side + of_column).flatten()
        states = self.patch_embedding(patches.astype(self.position_embedding.dtype)) + self.position_embedding[places]
        for layer in self.layers:
            states = layer(states)
        return self.post_layernorm(states)


class Resampler(nn.Module):
    """The patches of a unit to image features."""

    def __init__(self, queries: int, dim: int, heads: int, kv_dim: int):
        super().__init__()
        self.query = mx.zeros((queries, dim))
        self.kv_proj = nn.Linear(kv_dim, dim, bias=False)
        self.attn = Attention(dim, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(dim, 1e-6) for _ in range(3))
        self.proj = nn.Linear(dim, dim, bias=False)

    def __call__(self, states: mx.array, size: tuple[int, int], temporal_ids: list[int]) -> mx.array:
        """states [frames, patches, D'], temporal_ids one a frame, [-1] for an image -> [Q, D]."""
        values = self.ln_kv(self.kv_proj(states))  # [frames, patches, D]
        (rows, columns), dim = size, values.shape[-1]
        by_row, by_column = (_sincos(range(count), dim // 2) for count in size)
        halves = np.tile(by_column, (rows, 1)), np.repeat(by_row, columns, axis=0)
        positions = np.concatenate(halves, axis=1)[None]
        if temporal_ids[0] >= 0:
            positions = positions + _sincos(temporal_ids, dim)[:, None]
        keys = values + mx.array(positions).astype(values.dtype)
        attended = self.attn(self.ln_q(self.query), keys.reshape(-1, dim), values.reshape(-1, dim))
        return self.proj(self.ln_post(attended))


def _sincos(places: Any, dim: int) -> np.ndarray:
    """[n] -> float32 [n, dim], sines first; angles in float32, as the checkpoint learned them."""
    frequencies = (10000.0 ** -(np.arange(dim // 2) / (dim / 2))).astype(np.float32)
    angles = (np.asarray(places, np.float32)[:, None] * frequencies).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Cache:
    """Keys and values of a layer, of which the first `length` count."""

    def __init__(self) -> None:
        self.length = 0
        self.states: list[mx.array] = []

    def write(self, *new: mx.array) -> list[mx.array]:
        """Put keys and values [1, H, L, d] behind what counts; returns those of all."""
        start, self.length = self.length, self.length + new[0].shape[2]
        room = self.states[0].shape[2] if self.states else 0
        if self.length > room:
            batch, heads, _, width = new[0].shape
            more = mx.zeros((batch, heads, -(-self.length // STEP) * STEP - room, width), new[0].dtype)
            self.states = [mx.concatenate([part, more], axis=2) for part in self.states] or [more, more + 0]
        for part, states in zip(self.states, new, strict=True):
            part[:, :, start : self.length] = states
        return [part[:, :, : self.length] for part in self.states]


class LanguageAttention(nn.Module):
    def __init__(self, config: Any, base: float):
        super().__init__()
        width = self.width = config.head_dim
        dim, inner, shared = config.hidden_size, config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj, self.o_proj = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(dim, shared, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.rope = nn.RoPE(width, base=base)

    def __call__(self, states: mx.array, cache: Cache) -> mx.array:
        """states [L, D] behind what the cache holds -> [L, D]."""

        def split(projected: mx.array) -> mx.array:
            return projected.reshape(1, len(states), -1, self.width)

        heads = self.q_norm(split(self.q_proj(states))), self.k_norm(split(self.k_proj(states)))
        query, key = (self.rope(part.transpose(0, 2, 1, 3), offset=cache.length) for part in heads)
        keys, values = cache.write(key, split(self.v_proj(states)).transpose(0, 2, 1, 3))
        mask = "causal" if len(states) > 1 else None
        attended = mx.fast.scaled_dot_product_attention(query, keys, values, scale=self.width**-0.5, mask=mask)
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(len(states), -1))


class LanguageMLP(nn.Module):
    def __init__(self, dim: int, wide: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, wide, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(wide, dim, bias=False)

    def __call__(self, states: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(states)) * self.up_proj(states))


class LanguageLayer(nn.Module):
    def __init__(self, config: Any, base: float):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )
        self.self_attn = LanguageAttention(config, base)
        self.mlp = LanguageMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, states: mx.array, cache: Cache) -> mx.array:
        states = states + self.self_attn(self.input_layernorm(states), cache)
        return states + self.mlp(self.post_attention_layernorm(states))


class LanguageModel(nn.Module):
    """Qwen3."""

    def __init__(self, config: Any, base: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [LanguageLayer(config, base) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, rows: mx.array, caches: list[Cache], wanted: mx.array) -> mx.array:
        """Rows of embeddings [L, D] behind what the caches hold -> logits [wanted, V]."""
        for layer, cache in zip(self.layers, caches, strict=True):
            rows = layer(rows, cache)
        return self.lm_head(self.norm(rows[wanted]))


class Model(nn.Module):
    """All parts.

    Args:
        config: of the checkpoint.
        heads: of the resampler.
        base: of the rotary positions.
        longest: patches a side that the tower reads.
    """

    def __init__(self, config: Any, heads: int, base: float, longest: int):
        super().__init__()
        vision = config.vision_config
        layers = vision.num_hidden_layers - bool(config.drop_vision_last_layer)
        self.vpm = Tower(vision, layers, longest)
        self.resampler = Resampler(config.query_num, config.hidden_size, heads, vision.hidden_size)
        self.llm = LanguageModel(config, base)
