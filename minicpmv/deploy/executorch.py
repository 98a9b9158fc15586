"""Writes a checkpoint as a program for ExecuTorch, which runs it on phones: tower, resampler, embeddings, and the language model
with room for what it has read.

What is special:
- One file with four methods. What the XNNPACK library knows runs there, the rest in ExecuTorch's own kernels.
- The exporter holds the whole model in memory, and copies it: three times the checkpoint in float32.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minicpmv.deploy.folder import check_new, whole_folder, write_card
from minicpmv.deploy.quiet import quiet
from minicpmv.deploy.reference import Reference, open_runtime
from minicpmv.deploy.source import Checkpoint, ExportError
from minicpmv.errors import require
from minicpmv.files import write_whole
from minicpmv.runtimes.executorch import EXTRA, FIGURES, FILE, MOST_FRAMES, MOST_TOKENS, PACKAGE
from minicpmv.runtimes.graphs import LEAST_SIDE


GROUP = 32  # weights of 4 bits that share a scale
LEAST_TOKENS = 1024  # of room: a page in nine slices with its answer, by which an export is compared


@dataclass(frozen=True)
class ProgramType:
    """How matrices are stored. Margins are those of `parity.hold`."""

    is_small: bool  # language model in 4 bits, embeddings and tower in 8; products of integers
    margin: float
    feature_margin: float


TYPES = {"fp32": ProgramType(False, 0.05, 1e-2), "8da4w": ProgramType(True, 1.5, 5e-2)}

USE = """\
```text
minicpmv ask IMAGE "What is in the image?" -m {folder}
```

runs it on this machine, as do `minicpmv chat`, `evaluate` and `serve`. On a phone, `{file}` is loaded by ExecuTorch's `Module` with its XNNPACK
backend; `{figures}` says what it has room for, and `docs/deployment.md` of the repository how its methods are called. The small files are the
checkpoint's own."""


def export(
    model: str | Path,
    output: Path,
    kind: str,
    *,
    tokens: int = 2048,
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write a checkpoint as a program and hold it against PyTorch.

    Args:
        model: folder of the checkpoint.
        output: the new folder.
        kind: of `TYPES`.
        tokens: of prompt and answer that the program has room for.
        samples: questions of each row of NanoBench.
        is_checked: False leaves out the comparison.
        note: is told what happens.

    Returns:
        the folder.

    Raises:
        CheckpointError, ExportError, OutputError, MissingPackageError: before anything is written.
        ParityError: the answers differ beyond what the type allows; the files stay in a folder whose name says so.
    """
    require(EXTRA, PACKAGE, "torchao")
    checkpoint, output = Checkpoint(model), Path(output).expanduser()
    checkpoint.check_rope()
    limit = checkpoint.config["max_position_embeddings"]
    if not LEAST_TOKENS <= tokens <= limit:
        raise ExportError(f"--tokens {tokens} is out of range: take {LEAST_TOKENS} to {limit}")
    check_new(output, program_bytes(checkpoint, TYPES[kind].is_small))
    name = f"{checkpoint.folder.name}-{kind}"
    with whole_folder(output) as stage:
        write(checkpoint, TYPES[kind], tokens, stage, note)
        if is_checked:
            Reference(checkpoint, samples, note).check(
                stage,
                partial(open_runtime, stage, PACKAGE),
                name,
                partial(_write_card, stage, checkpoint, name, stage),
                "export another type",
                type=kind,
                size=(stage / FILE).stat().st_size,
                margin=TYPES[kind].margin,
                feature_margin=TYPES[kind].feature_margin,
            )
        _write_card(stage, checkpoint, name, output)
    return output


def program_bytes(checkpoint: Checkpoint, is_small: bool) -> int:
    """About how many bytes the weights take."""
    four, eight = (0.5 + 4 / GROUP, 1.0) if is_small else (4.0, 4.0)  # of 4 bits with a scale in float32
    total = 0.0
    for name in checkpoint.files:
        if name.startswith("resampler."):
            each = 4.0
        elif "embed_tokens" in name:
            each = eight + (four if checkpoint.is_tied else 0)
        else:
            each = four if name.startswith("llm.") else eight
        total += int(np.prod(checkpoint.shape(name))) * each
    return int(total)


@quiet()
def write(
    checkpoint: Checkpoint,
    kind: ProgramType,
    tokens: int,
    folder: Path,
    note: Callable[[str], None] = lambda what: None,
) -> None:
    """Write the program, with the checkpoint's small files."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from minicpmv.checkpoint import load
    from minicpmv.deploy.executorch_graphs import graphs

    model, processor = load(checkpoint.folder, dtype=torch.float32, device_map=None)
    side = processor.image_processor.scale_resolution // processor.image_processor.patch_size
    # A slice whose sides are 500 to 1 has a third more than a square one.
    most_patches = max(LEAST_SIDE, 4 * side**2 // 3 + 1)
    parts = graphs(model, most_patches, tokens, kind.is_small)
    if kind.is_small:
        _quantize(model)
    traced = {}
    for name, part in parts.items():
        note(f"Tracing {name}")
        inputs, changes = part.example()
        with torch.no_grad():
            traced[name] = torch.export.export(part.eval(), inputs, dynamic_shapes=changes)
    note("Lowering")
    lowered = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
    lowered.to_executorch().save(str(folder / FILE))
    figures = {"tokens": tokens, "tokens_per_call": MOST_TOKENS, "patches": most_patches, "frames": MOST_FRAMES}
    write_whole(folder / FIGURES, json.dumps(figures, indent=1) + "\n")
    checkpoint.copy_small_files(folder)


def _quantize(model: Any) -> None:
    """Matrices of the language model in 4 bits, those of the tower in 8; their inputs in 8, measured anew for each token. Of the
    resampler, whose attention is none of the layers that are known here, the first matrix alone."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_

    # Apart from the embeddings, which are another part.
    model.llm.lm_head.weight = torch.nn.Parameter(model.llm.lm_head.weight.detach().clone())
    four = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    eight = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    for part, config in ((model.llm, four), (model.vpm, eight), (model.resampler, eight)):
        quantize_(part, config)


def _write_card(folder: Path, checkpoint: Checkpoint, name: str, output: Path) -> None:
    base = f"`{checkpoint.folder.name}`, a MiniCPM-V 4.5, as a program for ExecuTorch, written by `minicpmv export executorch`."
    write_card(folder, "executorch", name, base, USE.format(folder=output.name, file=FILE, figures=FIGURES), [name])
