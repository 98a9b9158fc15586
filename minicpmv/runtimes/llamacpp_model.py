"""The language model of a GGUF file in llama.cpp, as a module of PyTorch.

What is special:
- Embeddings of tokens are read from the file, a row at a time: the table takes no memory.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minicpmv.runtimes.gguf_file import GGUFError, GGUFFile, StoredTensor
from minicpmv.runtimes.language_model import History, RememberingForCausalLM
from minicpmv.runtimes.llamacpp import PACKAGES, LlamaCpp, dequantized


class FileEmbedding(nn.Module):
    """The embeddings of tokens, from their table in a file."""

    def __init__(self, table: StoredTensor):
        super().__init__()
        self._table = table  # [V, D], on the disk

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> float32 [..., D]."""
        distinct, places = np.unique(ids.cpu().numpy(), return_inverse=True)
        rows = dequantized(self._table, distinct)
        return torch.from_numpy(rows[places.reshape(ids.shape)]).to(ids.device)


class LlamaCppForCausalLM(RememberingForCausalLM):
    """The language model of a GGUF file.

    Args:
        file: the language model.
        config: that of the whole model.
        threads: those of the CPU; as many as torch takes for None.

    Raises:
        GGUFError: the file is damaged, or that of another model.
        LlamaCppError: llama.cpp cannot load it.
    """

    def __init__(self, file: Path, config: Any, threads: int | None = None):
        tensors = GGUFFile(file).tensors
        if (table := tensors.get("token_embd.weight")) is None:
            raise GGUFError(f"{file} has no token_embd.weight: it is no language model")
        llama = LlamaCpp(file, threads or torch.get_num_threads())
        found, wanted = (llama.vocab_size, llama.hidden_size), (config.vocab_size, config.hidden_size)
        if found != wanted:
            raise GGUFError(
                f"{file} has {found[0]} tokens of width {found[1]}, but the config.json beside it says {wanted[0]} and "
                f"{wanted[1]}: put it beside the files of its own checkpoint"
            )
        super().__init__(llama, FileEmbedding(table), config, {name: version(name) for name in PACKAGES})
        self.file, self._llama, self._tensors = file, llama, tensors

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by llama.cpp's own tokenizer, control tokens among them."""
        return self._llama.tokenize(text)

    def save_states(self, ids: list[int], inputs_embeds: Tensor, file: Path) -> None:
        """Read a prompt and write its states into a file, which a llama-server of the same llama.cpp restores.

        Args:
            ids: the tokens of the prompt [L].
            inputs_embeds: what stands in their places [1, L, D], image features among them.
        """
        rows = inputs_embeds.detach().float().cpu()
        places = np.arange(rows.shape[1])
        history = History(rows[0].numpy(), places, self._numbers(rows)[0].numpy(), places == len(places) - 1)
        with self._lock:
            self._read([history])
            sequence = max(range(len(self._known)), key=lambda place: self._known[place].used)
            self._llama.save(sequence, ids, file)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # The file's own bytes, which tell one model from another.
        for name, tensor in self._tensors.items():
            destination[f"{prefix}{name}"] = torch.from_numpy(tensor.data)
