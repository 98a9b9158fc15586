"""Vision tower of MiniCPM-V 4.5: SigLIP2-400M read as NaViT.

What is special:
- Slices of unequal size run packed: their patches stand one after the other in a single sequence, nothing is padded.
- Attention stays inside a slice: one variable-length kernel call with flash attention, else one call for each run of
  equally long slices (sdpa, eager, flex).
- The position table is 70 x 70; a slice of n patches a side reads it by bucketing n evenly spaced coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward

from .configuration_minicpmv import MiniCPMVVisionConfig


@lru_cache(maxsize=512)
def position_buckets(num_patches: int, table_side: int) -> np.ndarray:
    """Rows (or columns) of the position table that a side of `num_patches` patches reads, as an array [num_patches].

    The float32 steps and the tiny margin are those the checkpoint was trained with; `arange(n) / n` gives other
    buckets at sides 25, 49, 50, 55 and 58.
    """
    step = float(np.float32(1) / np.float32(num_patches))
    coordinates = torch.arange(0, 1 - 1e-6, step, dtype=torch.float32, device="cpu")
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side, dtype=torch.float32, device="cpu")
    return torch.bucketize(coordinates, boundaries, right=True).numpy()


def position_ids(tgt_sizes: Sequence[tuple[int, int]], table_side: int) -> np.ndarray:
    """Ids in the position table of all patches of slices of `tgt_sizes` (rows, columns), packed: int64 array [patches]."""
    ids = []
    for rows, columns in tgt_sizes:
        row_ids = position_buckets(rows, table_side) * table_side
        ids.append((row_ids[:, None] + position_buckets(columns, table_side)).reshape(-1))
    return np.concatenate(ids)


def equal_runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first patch, slices, patches of each) of every run of equally long slices in a packed sequence."""
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append((start, count, length))
        start += count * length
    return runs


@dataclass(frozen=True, eq=False)
class PackedSlices:
    """Where the slices of one packed sequence lie."""

    runs: list[tuple[int, int, int]]  # see `equal_runs`
    cu_seqlens: Tensor  # int32 [slices + 1], the first patch of every slice, then the end
    max_length: int  # patches of the longest slice


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention over [B, H, L, d] without gradients, a few heads at a time; returns [B, L, H, d].

    In 16-bit floats on a CPU this takes half the time of the fused kernel: the scores of a few heads stay in the cache,
    and blocks below 32 MB are reused by the allocator, where larger ones cost a page fault for every 4 KB.
    """
    output = torch.empty_like(query)
    heads = max(1, 2**22 // (query.shape[2] * key.shape[2]))
    for index in range(len(query)):
        for first in range(0, query.shape[1], heads):
            some = (index, slice(first, first + heads))
            scores = torch.matmul(query[some] * scaling, key[some].transpose(1, 2))
            output[some] = torch.matmul(torch.softmax(scores, dim=-1), value[some])
    return output.transpose(1, 2)


class MiniCPMVVisionEmbeddings(nn.Module):
    """Patches to vectors, plus the learned position of each."""

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__()
        self.embed_dim = config.hidden_size
        self.patch_size = config.patch_size
        self.num_patches_per_side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(self.num_patches_per_side**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, tgt_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """pixel_values: one strip [3, P, P * patches] -> [1, patches, D]."""
        patches = self.patch_embedding(pixel_values[None])  # [1, D, 1, patches]
        ids = torch.from_numpy(position_ids(tgt_sizes, self.num_patches_per_side)).to(pixel_values.device)
        return patches[:, :, 0].transpose(1, 2) + self.position_embedding(ids)


class MiniCPMVVisionAttention(nn.Module):
    """Multi-head self-attention, over a padded batch [B, L, D] or over packed slices [1, patches, D]."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        packed: PackedSlices | None = None,
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Returns the output [B, L, D] and the weights: of a padded batch [B, H, L, L], of packed slices a list of
        [H, patches, patches], None unless the attention is eager."""
        batch, length, _ = hidden_states.shape
        states = [proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        implementation = self.config._attn_implementation
        if packed is None:
            output, weights = self._attend(states, (batch, length), attention_mask)
        elif "flash" in implementation:
            lengths = {"cu_seq_lens_q": packed.cu_seqlens, "cu_seq_lens_k": packed.cu_seqlens}
            lengths |= {"max_length_q": packed.max_length, "max_length_k": packed.max_length}
            output, weights = self._attend(states, (1, length), None, **lengths)
        else:
            outputs, weights = [], []
            # Split in one go: gradients of many slices would each fill a tensor as long as all of them.
            sizes = [count * run_length for _, count, run_length in packed.runs]
            runs = zip(*(state[0].split(sizes) for state in states), strict=True)
            for run, (_, count, run_length) in zip(runs, packed.runs, strict=True):
                run_output, run_weights = self._attend(run, (count, run_length), None)
                outputs.append(run_output)
                weights.extend(run_weights if run_weights is not None else ())
            output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        output = self.out_proj(output.view(batch, length, self.embed_dim))
        return output, weights if output_attentions else None

    def _attend(self, states, shape, attention_mask, **kwargs):
        """Attention of `shape` (sequences, length) on flat projections; the output is [sequences * length, D]."""
        query, key, value = (state.view(*shape, self.num_heads, self.head_dim).transpose(1, 2) for state in states)
        implementation = self.config._attn_implementation
        runs_faster_in_parts = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        is_plain = implementation == "sdpa" and attention_mask is None and not torch.is_grad_enabled()
        if is_plain and runs_faster_in_parts:
            return cpu_attention(query, key, value, self.scaling).reshape(-1, self.embed_dim), None
        attention = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, is_causal=False, **kwargs
        )
        return output.reshape(-1, self.embed_dim), weights


class MiniCPMVVisionMLP(nn.Module):
    chunk_size = 1024  # patches at a time on a CPU without gradients: the wide activations then stay in the cache

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled():
            return self.fc2(self.activation(self.fc1(hidden_states)))
        chunks = hidden_states.split(self.chunk_size, dim=1)
        return torch.cat([self.fc2(self.activation(self.fc1(chunk))) for chunk in chunks], dim=1)


class MiniCPMVVisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__()
        self.self_attn = MiniCPMVVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MiniCPMVVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Arguments and weights as of the attention."""
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights


class MiniCPMVVisionEncoder(nn.Module):
    """The stack of layers. Exporters call it on a padded batch with an additive mask, the tower on packed slices."""

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([MiniCPMVVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **packing,
    ) -> BaseModelOutput | tuple:
        hidden_states = inputs_embeds
        all_hidden_states: tuple = (inputs_embeds,)
        all_attentions: tuple = ()
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, attention_mask, output_attentions, **packing)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class MiniCPMVVisionTransformer(PreTrainedModel):
    """The vision tower: slices of any size to one vector a patch."""

    config_class = MiniCPMVVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["MiniCPMVVisionEncoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniCPMVVisionConfig):
        super().__init__(config)
        self.embeddings = MiniCPMVVisionEmbeddings(config)
        self.encoder = MiniCPMVVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses this from the text of the module, by a pattern that is not the same in all its versions.
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def forward(
        self,
        pixel_values: Sequence[Tensor],
        tgt_sizes: Sequence[tuple[int, int]],
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Encode slices.

        Args:
            pixel_values: one tensor [3, P, P * patches] a slice.
            tgt_sizes: (rows, columns) in patches of every slice.
            output_attentions, output_hidden_states: None: as the config says. Attentions need the eager kernel.

        Returns:
            `last_hidden_state` and `hidden_states` are packed, [all patches, D]; each entry of `attentions` is a list
            with one tensor [H, patches, patches] a slice.

        Raises:
            ValueError: when a slice does not hold rows * columns patches, or another kernel is asked for attentions.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager'; the tower runs "
                f"{self.config._attn_implementation!r}. Call model.set_attn_implementation('eager') first."
            )
        lengths = [rows * columns for rows, columns in tgt_sizes]
        for index, (pixels, length) in enumerate(zip(pixel_values, lengths, strict=True)):
            if pixels.shape[-1] != length * self.config.patch_size:
                raise ValueError(
                    f"Slice {index} is {pixels.shape[-1]} pixels long, but tgt_sizes {tuple(tgt_sizes[index])} with "
                    f"patch size {self.config.patch_size} need {length * self.config.patch_size}."
                )
        strip = torch.cat(list(pixel_values), dim=-1).to(self.dtype)
        if self.device.type != "meta":  # weights that are offloaded come to the input, not the input to them
            strip = strip.to(self.device)
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32).to(strip.device)
        outputs = self.encoder(
            self.embeddings(strip, tgt_sizes),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            packed=PackedSlices(equal_runs(lengths), cu_seqlens, max(lengths)),
        )
        if output_hidden_states:
            outputs.hidden_states = tuple(state[0] for state in outputs.hidden_states)
        outputs.last_hidden_state = self.post_layernorm(outputs.last_hidden_state)[0]
        return outputs
