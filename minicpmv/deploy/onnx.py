"""Writes a checkpoint as ONNX graphs: tower with resampler, embeddings, and the language model with its cache.

What is special:
- Weights go from the checkpoint into the files one at a time.
- A folder gets its name when it is whole and held against PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minicpmv.deploy.folder import check_new, whole_folder, write_card
from minicpmv.deploy.quiet import quiet
from minicpmv.deploy.reference import Reference, open_runtime
from minicpmv.deploy.source import Checkpoint
from minicpmv.errors import require
from minicpmv.runtimes.graph_engines import ONNX_RUNTIME, Engine
from minicpmv.runtimes.graphs import DECODER, EMBEDDING, NAMES, VISION


if TYPE_CHECKING:
    import onnx_ir as ir

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # which make the graphs
LAYERS = "llm.model.layers."  # how the names of what a 4-bit type stores in 4 bits begin


@dataclass(frozen=True)
class GraphType:
    """How matrices are stored, in bits; None is float32. Margins are those of `parity.hold`."""

    layers: int | None  # of the language model
    others: int | None  # its head, the tower and the resampler, where an error costs more
    table: str  # of embeddings
    margin: float
    feature_margin: float


@dataclass(frozen=True)
class Target:
    """Software that graphs are written for."""

    engine: Engine
    name: str
    hub_name: str  # as the Hub calls it
    types: dict[str, GraphType]
    convert: Callable[[Path, str], None]  # (folder with ONNX graphs, type): makes of them what the software reads


TYPES = {
    "fp32": GraphType(None, None, "float32", 0.01, 1e-3),
    "int8": GraphType(8, 8, "float16", 0.3, 5e-2),
    "int4": GraphType(4, 8, "float16", 1.5, 5e-2),
}

ONNX = Target(ONNX_RUNTIME, "ONNX Runtime", "onnx", TYPES, lambda folder, kind: None)

USE = """\
```text
minicpmv ask IMAGE "What is in the image?" -m {folder}
minicpmv chat -m {folder}
```

runs it in {software}, as do `minicpmv evaluate` and `minicpmv serve`. The graphs are `{vision}` (images, and packed frames with their times, to
features), `{embedding}` and `{decoder}` (the language model behind keys and values that the caller keeps); `minicpmv/runtimes/graphs.py` shows how
they are called. The small files are the checkpoint's own."""


def export(
    model: str | Path,
    output: Path,
    kind: str,
    *,
    target: Target = ONNX,
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write a checkpoint as graphs and hold them against PyTorch.

    Args:
        model: folder of the checkpoint.
        output: the new folder.
        kind: of the target's types; of `TYPES` for ONNX Runtime.
        target: which software runs them.
        samples: questions of each row of NanoBench.
        is_checked: False leaves out the comparison, where PyTorch has no memory for the checkpoint.
        note: is told what happens.

    Returns:
        the folder.

    Raises:
        CheckpointError, ExportError, OutputError, MissingPackageError: before anything is written.
        ParityError: the answers differ beyond what the type allows; the files stay in a folder whose name says so.
    """
    require(target.engine.extra, *PACKAGES, target.engine.package)
    checkpoint, output = Checkpoint(model), Path(output).expanduser()
    checkpoint.check_rope()
    check_new(output, graph_bytes(checkpoint, target.types[kind]))
    name = f"{checkpoint.folder.name}-{kind}"
    with whole_folder(output) as stage:
        graphs = {}
        for graph in NAMES:
            note(f"Tracing {graph}")
            graphs[graph] = trace(checkpoint, graph)
        note(f"Writing {name}")
        write(checkpoint, graphs, target.types[kind], stage)
        target.convert(stage, kind)
        if is_checked:
            _compare(checkpoint, stage, name, kind, target, samples, note)
        _write_card(stage, checkpoint, name, output, target)
    return output


def graph_bytes(checkpoint: Checkpoint, kind: GraphType) -> int:
    """About how many bytes the weights take."""
    total = 0
    for name in checkpoint.files:
        values = int(np.prod(checkpoint.shape(name)))
        if "embed_tokens" in name:
            head = values * ((kind.others or 32) + 1) // 8 if checkpoint.is_tied else 0
            total += values * np.dtype(kind.table).itemsize + head
        else:
            bits = kind.layers if name.startswith(LAYERS) else kind.others
            total += values * ((bits or 31) + 1) // 8
    return total


def trace(checkpoint: Checkpoint, name: str) -> "ir.Model":
    """One of the graphs, without the values of weights."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    from minicpmv.deploy.onnx_graphs import DecoderGraph, EmbeddingGraph, VisionGraph
    from minicpmv.deploy.onnx_weights import trace as traced

    config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=True)
    with init_empty_weights(include_buffers=False):  # those are computed, not read
        model = AutoModel.from_config(config, trust_remote_code=True, attn_implementation="sdpa", dtype=torch.float32)
    graph = {VISION: VisionGraph, EMBEDDING: EmbeddingGraph, DECODER: DecoderGraph}[name]
    with quiet():
        return traced(graph(model))


def write(checkpoint: Checkpoint, graphs: dict[str, "ir.Model"], kind: GraphType, folder: Path) -> None:
    """Fill traced graphs and write them, with the checkpoint's small files."""
    from minicpmv.deploy import onnx_weights

    def read(name: str) -> np.ndarray:
        is_head = checkpoint.is_tied and name.endswith("lm_head.weight")
        return checkpoint.tensor("llm.model.embed_tokens.weight" if is_head else name)

    def bits_of(name: str) -> int | None:
        return kind.layers if name.startswith(LAYERS) else kind.others

    checkpoint.copy_small_files(folder)
    with quiet():
        for name, graph in graphs.items():
            # GPUs in browsers may not know float16, so positions stay float32; embeddings are looked up beside them.
            table = kind.table if name == EMBEDDING else "float32"
            onnx_weights.fill(graph, read, bits_of, table)
            onnx_weights.write(graph, folder / f"{name}{ONNX_RUNTIME.suffix}")


# ---- what is left beside it ----


def _compare(
    checkpoint: Checkpoint,
    stage: Path,
    name: str,
    kind: str,
    target: Target,
    samples: int,
    note: Callable[[str], None],
) -> None:
    """Hold what was written against PyTorch, and write down what was found.

    Raises:
        ParityError: the answers differ too much.
    """
    Reference(checkpoint, samples, note).check(
        stage,
        partial(open_runtime, stage, "onnx", target.engine.package),
        name,
        partial(_write_card, stage, checkpoint, name, stage, target),
        "choose a type with more bits",
        type=kind,
        size=sum(file.stat().st_size for graph in NAMES for file in stage.glob(f"{graph}.*")),
        margin=target.types[kind].margin,
        feature_margin=target.types[kind].feature_margin,
    )


def _write_card(folder: Path, checkpoint: Checkpoint, name: str, output: Path, target: Target) -> None:
    extra, suffix = target.engine.extra, target.engine.suffix
    base = f"`{checkpoint.folder.name}`, a MiniCPM-V 4.5, as graphs for {target.name}, written by `minicpmv export {extra}`."
    files = {"vision": VISION, "embedding": EMBEDDING, "decoder": DECODER}
    named = {part: f"{file}{suffix}" for part, file in files.items()}
    use = USE.format(folder=output.name, software=target.name, **named)
    write_card(folder, target.hub_name, name, base, use, [name])
