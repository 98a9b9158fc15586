"""A model.pte in ExecuTorch: slices, units, tokens and rows of embeddings in, features and logits out.

What is special:
- The methods of a program share their memory here, keys and values among it: so each conversation has a program of its own.
"""

import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpmv.errors import MiniCPMVError
from minicpmv.files import read_json


if TYPE_CHECKING:
    from minicpmv.runtimes.language_model import Part

EXTRA, PACKAGE = "executorch", "executorch"
FILE = "model.pte"
FIGURES = "executorch.json"  # what the program has room for
TOWER, RESAMPLER, EMBEDDING, DECODER = ("vision_encoder", "resampler", "token_embedding", "text_decoder")
MOST_FRAMES = 6  # of a unit
MOST_TOKENS = 256  # that are read in one call
SMALL_FILES = (FIGURES, "config.json", "preprocessor_config.json", "tokenizer.json")


class ExecuTorchError(MiniCPMVError):
    """A program cannot be used: the message says why and what to do."""


ERROR = ExecuTorchError


def open_parts(folder: Path, config: Any) -> "tuple[ExecuTorchParts, ExecuTorchReader]":
    """What a folder holds.

    Raises:
        ExecuTorchError: the program is damaged.
    """
    return ExecuTorchParts(folder / FILE), ExecuTorchReader(folder / FILE, read_json(folder / FIGURES)["tokens"])


class ExecuTorchParts:
    """Tower, resampler and embeddings of a program.

    Raises:
        ExecuTorchError: the program is damaged.
    """

    error = ExecuTorchError

    def __init__(self, file: Path):
        self.file, self.versions, self._program = file, {PACKAGE: version(PACKAGE)}, Program(file)

    def files(self) -> list[Path]:
        """What holds the weights."""
        return [self.file]

    def tower(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A slice [3, P, P * patches] of (rows, columns) patches to float32 [patches, D']."""
        channels, patch, _ = pixels.shape
        patches = pixels.reshape(channels, patch, -1, patch).transpose(2, 0, 1, 3)
        return self._program.run(TOWER, patches, np.array(size))

    def resample(self, states: np.ndarray, size: tuple[int, int], temporal_ids: Sequence[int]) -> np.ndarray:
        """States of a unit [frames, patches, D'] to features float32 [Q, D]."""
        return self._program.run(RESAMPLER, states, np.array(size), np.array(temporal_ids))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] to float32 [n, D]."""
        parts = [ids[start : start + MOST_TOKENS] for start in range(0, len(ids), MOST_TOKENS)]
        return np.concatenate([self._program.run(EMBEDDING, part) for part in parts])


class ExecuTorchReader:
    """The language model of a program, with the states of several conversations.

    Args:
        room: tokens of a conversation that the program has room for.
    """

    software, error = "ExecuTorch", ExecuTorchError
    most_sequences = 64

    def __init__(self, file: Path, room: int):
        self.name, self._file, self._room = file.name, file, room
        self.sequences = self.cells = 0
        self._programs: list[Program] = []

    def reserve(self, sequences: int, cells: int) -> None:
        """Make room for so many conversations; tokens have the room that the program was made with."""
        self._programs += [Program(self._file) for _ in range(sequences - len(self._programs))]
        self.sequences, self.cells = sequences, max(cells, self._room)

    def read(self, parts: "Sequence[Part]") -> list[np.ndarray]:
        """Read the parts; returns the logits [wanted, V] of each.

        Raises:
            ExecuTorchError: there is no room for them.
        """
        longest = max(part.start + len(part.rows) for part in parts)
        if longest > self._room:
            raise ExecuTorchError(
                f"{self._file} has room for {self._room} tokens, and a conversation has {longest}: ask about less, or export "
                "the checkpoint again with more --tokens"
            )
        return [np.concatenate([*self._read(part)]) for part in parts]

    def _read(self, part: "Part") -> Any:
        for begin in range(0, len(part.rows), MOST_TOKENS):
            rows, wanted = (column[begin : begin + MOST_TOKENS] for column in (part.rows, part.wanted))
            places = np.flatnonzero(wanted)
            positions = np.arange(part.start + begin, part.start + begin + len(rows))
            # The program returns one line of logits at least.
            asked = places if len(places) else np.array([0])
            yield self._programs[part.sequence].run(DECODER, rows, positions, asked)[: len(places)]


class Program:
    """A loaded program, whose methods share their memory.

    Raises:
        ExecuTorchError: the file is damaged.
    """

    def __init__(self, file: Path):
        from executorch.runtime import Runtime

        self._file, self._lock = file, threading.Lock()
        try:
            self._program = Runtime.get().load_program(file)
        except RuntimeError as error:
            raise ExecuTorchError(
                f"{file} cannot be loaded ({_reason(error)}): export the checkpoint again"
            ) from error

    def run(self, method: str, *inputs: np.ndarray) -> np.ndarray:
        """What a method makes of arrays, float32 or int64.

        Raises:
            ExecuTorchError: they are larger than the program has room for.
        """
        import torch

        tensors = [torch.from_numpy(np.ascontiguousarray(value)) for value in inputs]
        try:
            with self._lock:
                (output,) = self._program.load_method(method).execute(tensors)
        except (RuntimeError, KeyError) as error:
            shapes = [tuple(value.shape) for value in inputs]
            raise ExecuTorchError(f"{self._file} cannot read {shapes} in {method}: {_reason(error)}") from error
        return output.numpy()


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
