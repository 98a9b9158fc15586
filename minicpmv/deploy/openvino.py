"""Writes a checkpoint for OpenVINO, by way of its ONNX graphs.

What is special:
- Integers stay those of ONNX Runtime's quantizer, which OpenVINO reads, so both answer from the same weights.
"""

from collections.abc import Callable
from pathlib import Path

from minicpmv.deploy import onnx
from minicpmv.deploy.onnx import GraphType, Target
from minicpmv.runtimes.graph_engines import ONNX_RUNTIME, OPENVINO
from minicpmv.runtimes.graphs import NAMES


TYPES = {
    "f16": GraphType(None, None, "float32", 0.05, 5e-3),  # whole in ONNX, and 16 bits in OpenVINO's own files
    "int8": onnx.TYPES["int8"],
    "int4": onnx.TYPES["int4"],
}


def convert(folder: Path, kind: str) -> None:
    """Make OpenVINO's files of the ONNX graphs in a folder, which go."""
    import openvino

    core = openvino.Core()
    for name in NAMES:
        source = folder / f"{name}{ONNX_RUNTIME.suffix}"
        openvino.save_model(core.read_model(source), folder / f"{name}{OPENVINO.suffix}", compress_to_fp16=True)
        for file in folder.glob(f"{source.name}*"):
            file.unlink()


TARGET = Target(OPENVINO, "OpenVINO", "openvino", TYPES, convert)


def export(
    model: str | Path,
    output: Path,
    kind: str,
    *,
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write a checkpoint for OpenVINO and hold it against PyTorch; arguments and errors as of [`minicpmv.deploy.onnx.export`].

    Args:
        kind: of `TYPES`.
    """
    return onnx.export(model, output, kind, target=TARGET, samples=samples, is_checked=is_checked, note=note)
