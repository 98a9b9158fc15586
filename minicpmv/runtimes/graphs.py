"""The three graphs of an exported model, in whatever runs them: numpy arrays in, numpy arrays out.

What is special:
- The tower's graph takes units of one size at a time; units of several sizes are sorted here, and their features come back
  in the order in which the units were given.
- Keys and values of what has been read belong to the caller, who may cut, copy and forget them.
"""

import itertools
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minicpmv.errors import require
from minicpmv.runtimes.graph_engines import ENGINES, Engine, GraphError


VISION, EMBEDDING, DECODER = NAMES = ("vision_encoder", "embed_tokens", "decoder_model")
LEAST_SIDE = 256  # patches a side that the table of positions has room for, or more where slices can be longer


class Unit(NamedTuple):
    """Slices that share their slots: one of an image, or the same one of each frame in a group."""

    strips: Sequence[np.ndarray]  # float32 [3, P, P * patches], one a frame
    size: tuple[int, int]  # (rows, columns) in patches, of each
    temporal_ids: Sequence[int]  # one a frame, tenths of a second; [-1] for an image


States = list[np.ndarray]  # keys and values of every layer, in turn: float32 [B, H, past, d]


def longest_side(config: Any) -> int:
    """Patches a side that the tower's graph reads: those of a slice in a single row, at least."""
    slices = config.slice_config
    return max(LEAST_SIDE, (slices.scale_resolution // slices.patch_size) ** 2)


def engine_of(folder: Path) -> Engine | None:
    """What runs the graphs in a folder; None where there are none."""
    return next((engine for engine in ENGINES if (folder / f"{DECODER}{engine.suffix}").is_file()), None)


def check(folder: Path) -> Engine:
    """Refuse a folder that cannot be loaded before anything heavy is imported. Returns what runs it.

    Raises:
        MissingPackageError: the software is not installed.
        GraphError: a file is not there.
    """
    engine = engine_of(folder) or ENGINES[0]
    require(engine.extra, engine.package)
    for name in (
        *(f"{name}{engine.suffix}" for name in NAMES),
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    ):
        if not (folder / name).is_file():
            raise GraphError(
                f"{folder} has no {name}: export the checkpoint again, with minicpmv export {engine.extra}"
            )
    return engine


class Graphs:
    """The graphs of a folder.

    Attributes:
        hidden_size, vocab_size: width of embeddings and of logits.
        versions: of the software that runs them.

    Args:
        threads: those of the CPU; as many as the software likes for None.

    Raises:
        GraphError: a file is damaged.
        MissingPackageError: the software is not installed.
    """

    def __init__(self, folder: Path, threads: int | None = None):
        engine = check(folder)
        self._files = {name: folder / f"{name}{engine.suffix}" for name in NAMES}
        self._sessions = {}
        for name, file in self._files.items():
            try:
                self._sessions[name] = engine.open(file, threads)
            except GraphError as error:
                raise GraphError(f"{file} cannot be loaded ({error}): export the checkpoint again") from error
        shapes = self._sessions[DECODER].shapes
        self._states = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        self.folder, self.versions = folder, {engine.package: version(engine.package)}
        self.hidden_size, self.vocab_size = shapes["inputs_embeds"][-1], shapes["logits"][-1]

    def files(self) -> list[Path]:
        """Graphs and weights, by name."""
        return sorted(file for name in NAMES for file in self.folder.glob(f"{name}.*"))

    def encode(self, units: Sequence[Unit], most: int = 16) -> np.ndarray:
        """Features of units, float32 [units, Q, D].

        Args:
            most: slices that go through the tower at a time.

        Raises:
            GraphError: a slice is longer than the graph can read, or the software gives features of fewer units.
        """

        def shape(place: int) -> tuple[tuple[int, int], int]:
            return units[place].size, len(units[place].strips)

        found: dict[int, np.ndarray] = {}
        for (size, frames), group in itertools.groupby(sorted(range(len(units)), key=shape), key=shape):
            places = list(group)
            step = max(1, most // frames)
            for start in range(0, len(places), step):
                some = [units[place] for place in places[start : start + step]]
                pictures = np.stack([np.stack([_picture(strip, size) for strip in unit.strips]) for unit in some])
                times = np.array([list(unit.temporal_ids) for unit in some], dtype=np.int64)
                (features,) = self._call(VISION, {"pixel_values": pictures, "temporal_ids": times})
                if len(features) != len(some):  # seen of OpenVINO's int8 where ONEDNN_MAX_CPU_ISA holds it back
                    software = " ".join(next(iter(self.versions.items())))
                    raise GraphError(
                        f"{self._files[VISION]} gave features of {len(features)} images for {len(some)}: {software} computes "
                        "this type wrongly on this CPU; take another version of it or another type, and unset variables such "
                        "as ONEDNN_MAX_CPU_ISA"
                    )
                found |= dict(zip(places[start : start + step], features, strict=True))
        return np.stack([found[place] for place in range(len(units))])

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int64 [B, L] -> float32 [B, L, D]."""
        return self._call(EMBEDDING, {"input_ids": ids})[0]

    def no_states(self, batch: int = 1) -> States:
        """Keys and values of nothing."""
        return [np.zeros((batch, shape[1], 0, shape[3]), np.float32) for shape in self._states.values()]

    def decode(
        self,
        inputs_embeds: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        logit_places: np.ndarray,
        states: States,
    ) -> tuple[np.ndarray, States]:
        """Read embeddings [B, L, D] behind what `states` hold: logits [B, kept, V], and the states of all.

        Args:
            attention_mask: int64 [B, past + L], 0 for padding.
            position_ids: int64 [B, L].
            logit_places: int64 [kept] of 0 .. L - 1.
        """
        feeds = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logit_places": logit_places,
        }
        logits, *states = self._call(DECODER, feeds | dict(zip(self._states, states, strict=True)))
        return logits, states

    def _call(self, name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._sessions[name].run({key: np.ascontiguousarray(value) for key, value in feeds.items()})
        except GraphError as error:
            shapes = {key: value.shape for key, value in feeds.items() if not key.startswith("past")}
            raise GraphError(f"{self._files[name]} cannot read {shapes}: {error}") from error


def _picture(strip: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The patches of a slice [3, P, P * patches] where they belong: [3, P * rows, P * columns]."""
    rows, columns = size
    channels, patch, _ = strip.shape
    patches = strip.reshape(channels, patch, rows, columns, patch)
    return patches.transpose(0, 2, 1, 3, 4).reshape(channels, rows * patch, columns * patch)
