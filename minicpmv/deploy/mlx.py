"""Writes a checkpoint for MLX, which runs it on Macs.

What is special:
- Weights are read and stored one tensor at a time; what is written is held in memory until all of it is there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minicpmv.deploy.folder import check_new, whole_folder, write_card
from minicpmv.deploy.reference import Reference, open_runtime
from minicpmv.deploy.source import Checkpoint
from minicpmv.errors import require
from minicpmv.runtimes.mlx import EXTRA, FILE, PACKAGE


GROUP = 64  # values of a row that share a scale and an offset
LANGUAGE_LAYERS = "llm.layers."


@dataclass(frozen=True)
class MLXType:
    """How matrices are stored, in bits; None is bfloat16. Margins are those of `parity.hold`."""

    layers: int | None  # of the language model
    others: int | None  # embeddings, head, tower and resampler, where an error costs more
    margin: float
    feature_margin: float


TYPES = {
    "bf16": MLXType(None, None, 0.1, 2e-2),
    "8bit": MLXType(8, 8, 0.3, 5e-2),
    "4bit": MLXType(4, 8, 1.5, 5e-2),
}

# Parts of the checkpoint's names, and what they are called here.
NAMES = {
    "vpm.embeddings.": "vpm.",
    "vpm.encoder.": "vpm.",
    "vpm.position_embedding.weight": "vpm.position_embedding",
    "llm.model.": "llm.",
    "resampler.proj": "resampler.proj.weight",
}

USE = """\
```text
minicpmv ask IMAGE "What is in the image?" -m {folder}
minicpmv chat -m {folder}
```

runs it, as do `minicpmv evaluate` and `minicpmv serve`, on the GPU of a Mac, and elsewhere on the CPU. All weights are in `{file}`, and
`minicpmv/runtimes/mlx_model.py` shows what they are. The small files are the checkpoint's own."""


def export(
    model: str | Path,
    output: Path,
    kind: str,
    *,
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write a checkpoint for MLX and hold it against PyTorch.

    Args:
        model: folder of the checkpoint.
        output: the new folder.
        kind: of `TYPES`.
        samples: questions of each row of NanoBench.
        is_checked: False leaves out the comparison, where PyTorch has no memory for the checkpoint.
        note: is told what happens.

    Returns:
        the folder.

    Raises:
        CheckpointError, ExportError, OutputError, MissingPackageError: before anything is written.
        ParityError: the answers differ beyond what the type allows; the files stay in a folder whose name says so.
    """
    require(EXTRA, PACKAGE)
    checkpoint, output = Checkpoint(model), Path(output).expanduser()
    checkpoint.check_rope()
    sizes = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.files)
    check_new(output, sizes * ((TYPES[kind].layers or 15) + 1) // 8)
    name = f"{checkpoint.folder.name}-{kind}"
    with whole_folder(output) as stage:
        note(f"Writing {name}")
        write(checkpoint, TYPES[kind], stage)
        if is_checked:
            Reference(checkpoint, samples, note).check(
                stage,
                partial(open_runtime, stage, PACKAGE),
                name,
                partial(_write_card, stage, checkpoint, name, stage),
                "choose a type with more bits",
                type=kind,
                size=(stage / FILE).stat().st_size,
                margin=TYPES[kind].margin,
                feature_margin=TYPES[kind].feature_margin,
            )
        _write_card(stage, checkpoint, name, output)
    return output


def write(checkpoint: Checkpoint, kind: MLXType, folder: Path) -> None:
    """Write the weights, with the checkpoint's small files."""
    import mlx.core as mx

    buckets, heads = _facts(checkpoint)
    arrays = {"vpm.buckets": mx.array(buckets)}
    for name, values in _tensors(checkpoint):
        bits = kind.layers if name.startswith(LANGUAGE_LAYERS) else kind.others
        is_matrix = values.ndim == 2 and name.endswith(".weight") and values.shape[1] % GROUP == 0
        array = mx.array(values).astype(mx.bfloat16)
        stored = {name: array}
        if bits and is_matrix:
            # Rounded from the whole values; scales and offsets are stored as everything else is.
            weight, scales, biases = mx.quantize(mx.array(values), GROUP, bits)
            base = name.removesuffix("weight")
            stored = {name: weight, f"{base}scales": scales, f"{base}biases": biases}
            stored = {key: value if key == name else value.astype(mx.bfloat16) for key, value in stored.items()}
        mx.eval(list(stored.values()))
        arrays |= stored
    figures = {
        "format": "mlx",
        "group": GROUP,
        "resampler_heads": heads,
        "rope_theta": checkpoint.config["rope_theta"],
        "longest_side": buckets.shape[1],
    }
    mx.save_safetensors(str(folder / FILE), arrays, {name: str(value) for name, value in figures.items()})
    checkpoint.copy_small_files(folder)


def _facts(checkpoint: Checkpoint) -> tuple[np.ndarray, int]:
    """Rows of the position table that each side reads, uint8 [longest + 1, longest]; and the heads of the resampler."""
    import torch
    from transformers import AutoConfig, AutoModel

    from minicpmv.deploy.position_table import buckets_of
    from minicpmv.runtimes.graphs import longest_side

    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    return buckets_of(model.vpm, longest_side(config)), model.resampler.attn.num_heads


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """All weights, by their names here, float32."""
    for name in checkpoint.files:
        values = checkpoint.tensor(name)
        for theirs, ours in NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if name == "vpm.patch_embedding.weight":
            values = values.reshape(len(values), -1)
        elif name == "resampler.proj.weight":
            values = values.T
        if ".attn.in_proj_" in name:  # of queries, keys and values, one behind the other
            base, _, part = name.partition("in_proj_")
            yield from ((f"{base}{of}_proj.{part}", rows) for of, rows in zip("qkv", np.split(values, 3), strict=True))
            continue
        yield name, values
        if name == "llm.embed_tokens.weight" and checkpoint.is_tied:
            yield "llm.lm_head.weight", values


def _write_card(folder: Path, checkpoint: Checkpoint, name: str, output: Path) -> None:
    base = f"`{checkpoint.folder.name}`, a MiniCPM-V 4.5, for MLX, written by `minicpmv export mlx`."
    write_card(folder, "mlx", name, base, USE.format(folder=output.name, file=FILE), [name])
