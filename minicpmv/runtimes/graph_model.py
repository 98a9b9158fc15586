"""Graphs as modules of PyTorch: they stand where the model's own tower, resampler and language model stand.

So everything above them stays as it is: prompts, packed videos, slices, sampling, thoughts, streams, sessions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from minicpmv.runtimes.graph_engines import GraphError
from minicpmv.runtimes.graphs import Graphs, Unit
from minicpmv.runtimes.language_model import CACHE_FIELD


class GraphTower(nn.Module):
    """In place of the tower: hands the pixels on, since one graph holds tower and resampler."""

    def forward(
        self,
        pixel_values: Sequence[Tensor],
        tgt_sizes: Sequence[tuple[int, int]],
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Strips [3, P, P * patches] to patches [all patches, 3, P, P]."""
        if output_attentions or output_hidden_states:
            raise _refusal("hidden states and attentions of the tower")
        patches = [pixels.unflatten(-1, (-1, pixels.shape[1])).permute(2, 0, 1, 3) for pixels in pixel_values]
        return BaseModelOutput(last_hidden_state=torch.cat(patches))


class GraphResampler(nn.Module):
    """In place of the resampler."""

    def __init__(self, graphs: Graphs):
        super().__init__()
        self._graphs = graphs

    def forward(
        self, hidden_states: Tensor, tgt_sizes: Sequence[tuple[int, int]], temporal_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """Patches [all patches, 3, P, P] to features [units, Q, D]."""
        counts = [rows * columns for rows, columns in tgt_sizes]
        strips = iter(part.permute(1, 2, 0, 3).flatten(2) for part in hidden_states.float().cpu().split(counts))
        sizes, units = iter(tgt_sizes), []
        for ids in temporal_ids:
            own = [next(sizes) for _ in ids]
            units.append(Unit([next(strips).numpy() for _ in ids], own[0], ids))
        return torch.from_numpy(self._graphs.encode(units, max(1, len(tgt_sizes)))).to(hidden_states.device)


class GraphEmbedding(nn.Module):
    """In place of the embeddings."""

    def __init__(self, graphs: Graphs):
        super().__init__()
        self._graphs = graphs

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., D]."""
        rows = self._graphs.embed(ids.reshape(1, -1).cpu().numpy())
        return torch.from_numpy(rows).view(*ids.shape, -1).to(ids.device)


class GraphForCausalLM(nn.Module):
    """The language model; called as `Qwen3ForCausalLM` is, it returns logits and the cache.

    Raises:
        GraphError: the graphs are those of another model than the configuration's.
    """

    def __init__(self, graphs: Graphs, config: Any):
        super().__init__()
        found, wanted = (graphs.vocab_size, graphs.hidden_size), (config.vocab_size, config.hidden_size)
        if found != wanted:
            raise GraphError(
                f"{graphs.folder} has graphs with {found[0]} tokens of width {found[1]}, but its config.json says "
                f"{wanted[0]} and {wanted[1]}: export the checkpoint again"
            )
        self.config, self._graphs, self.versions = config, graphs, graphs.versions
        self.embed_tokens = GraphEmbedding(graphs)
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # by which a model tells device and type

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None  # they are in the graph

    def get_decoder(self) -> nn.Module:
        raise _refusal("the hidden states")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # The files' own bytes, which tell one model from another.
        for file in self._graphs.files():
            # "c": the arrays count as writable, which torch wants to be sure of; nothing is written.
            destination[f"{prefix}{file.name}"] = torch.from_numpy(np.memmap(file, np.uint8, "c"))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over a batch [B, L, D] behind what the cache holds; logits [B, kept, V].

        Raises:
            GraphError: what the graph cannot give is asked for.
        """
        asked = {"a loss": labels is not None, "attentions": output_attentions, "hidden states": output_hidden_states}
        for what, is_asked in asked.items():
            if is_asked:
                raise _refusal(what)
        cache = past_key_values if cache is None else cache
        if not (cache is None or isinstance(cache, DynamicCache)):
            raise _refusal(f"a {type(cache).__name__}")
        rows = inputs_embeds.detach().float().cpu().numpy()
        batch, length = rows.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        states = self._graphs.no_states(batch)
        if cache is not None and past:
            states = [part.cpu().numpy() for layer in cache.layers for part in (layer.keys, layer.values)]
        mask = np.ones((batch, past + length), np.int64)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < past + length:
                raise GraphError(f"the graph takes a mask of {mask.shape}, not {tuple(attention_mask.shape)}")
            mask = attention_mask[:, : past + length].long().cpu().numpy()
        places = np.broadcast_to(np.arange(past, past + length), (batch, length))
        if position_ids is not None:
            places = position_ids.long().cpu().expand(batch, -1).numpy()
        kept = torch.arange(length)
        kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else kept[logits_to_keep.cpu()]
        logits, states = self._graphs.decode(rows, mask, places, kept.numpy(), states)
        device = inputs_embeds.device
        if cache is not None:
            tensors = [torch.from_numpy(part).to(device) for part in states]
            for place, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
                if past:
                    cache.layers[place].keys, cache.layers[place].values = keys, values
                else:
                    cache.update(keys, values, place)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits).to(device), **{CACHE_FIELD: cache})


def _refusal(what: str) -> GraphError:
    return GraphError(f"an exported model gives logits alone: for {what} load the checkpoint itself")
