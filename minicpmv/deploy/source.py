"""The checkpoint that an export starts from."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minicpmv.checkpoint import check_name, source_of
from minicpmv.errors import MiniCPMVError
from minicpmv.files import read_json


# What the folder of a checkpoint holds besides weights, their index and its card.
SMALL_FILES = ("*.py", "*.json", "*.jinja", "*.txt")
NO_SMALL_FILES = ("model.safetensors.index.json", "constraints.txt")


class ExportError(MiniCPMVError):
    """A checkpoint cannot be written in another format: the message says why and what to do."""


class Checkpoint:
    """The files of a checkpoint, whose tensors are read one at a time.

    Raises:
        CheckpointError: the folder holds no model.
        ExportError: it is none, or its weights are not whole ones in safetensors.
    """

    def __init__(self, folder: str | Path):
        if not Path(folder).expanduser().is_dir():
            raise ExportError(f"{folder} is no folder here: get the checkpoint first, with minicpmv fetch")
        check_name(folder)
        self.folder = Path(source_of(folder)["pretrained_model_name_or_path"])
        self.config = read_json(self.folder / "config.json")
        if self.config.get("model_type") != "minicpmv" or "vision_config" not in self.config:
            raise ExportError(
                f"{folder} is a {self.config.get('model_type')}, not a MiniCPM-V 4.5: name another checkpoint"
            )
        if "quantization_config" in self.config:
            raise ExportError(f"{folder} is quantized already: name the checkpoint that it was made from")
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = read_json(index)["weight_map"]
        elif (self.folder / "model.safetensors").is_file():
            with self._file("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ExportError(
                f"{folder} has no model.safetensors: load and save it once with transformers, which writes it"
            )
        self.is_tied = bool(self.config.get("tie_word_embeddings"))

    def check_rope(self) -> None:
        """Refuse positions that are scaled, which no export writes.

        Raises:
            ExportError: they are.
        """
        if found := self.config.get("rope_scaling"):
            raise ExportError(f"rope_scaling ({found}) is not written: export the checkpoint without it")

    def _open(self, name: str) -> Any:
        if name not in self.files:
            raise ExportError(f"{self.folder} has no weight {name}: it is not a whole MiniCPM-V 4.5")
        return self._file(self.files[name])

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, "pt")
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{self.folder / name} is damaged ({error}): get it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> Any:
        """The `torch.dtype` that a tensor is stored in."""
        with self._open(name) as file:
            return file.get_slice(name)[:0].dtype

    def stored(self, name: str) -> Any:
        """A tensor as `torch.Tensor`, in the type that it is stored in."""
        with self._open(name) as file:
            return file.get_tensor(name)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        return self.stored(name).float().numpy()

    def copy_small_files(self, folder: Path) -> None:
        """Copy configuration, processor, tokenizer and code: all that a model needs besides its weights."""
        for pattern in SMALL_FILES:
            for file in self.folder.glob(pattern):
                if file.is_file() and file.name not in NO_SMALL_FILES:
                    shutil.copyfile(file, folder / file.name)
