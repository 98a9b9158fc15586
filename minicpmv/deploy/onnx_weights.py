"""A module of `onnx_graphs` as an ONNX graph, whose weights come out of the checkpoint one at a time while it is written.

What is special:
- The module has no weights when it is traced, so an 8 B model takes as little memory as a small one.
- What the graph does to a weight before it uses it (transposing, splitting) is done here, once.
- Matrices are quantized by ONNX Runtime's own code, each as it is written.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from tqdm import tqdm


OPSET = 18
BLOCK = 32  # weights that share a scale
INT8_PRODUCTS = 4  # accuracy_level of MatMulNBits: values are rounded to 8 bits, too, where that is faster
LARGEST_FILE = 1_900_000_000  # bytes; beyond 2 GB protobuf has no numbers
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


@dataclass(frozen=True)
class Weight:
    """A weight, or what becomes of it, without its values."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # float32


def trace(module: Any) -> ir.Model:
    """The graph of a module of `onnx_graphs` whose parameters are on the device "meta"; they have no values in it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            with mode:
                value = torch.empty(parameter.shape, dtype=torch.float32)
            setattr(part, name, nn.Parameter(value, requires_grad=False))
    inputs, changes = module.example()
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
    with torch.no_grad():
        traced = torch.export.export(module.eval(), inputs, dynamic_shapes=changes, strict=False)
    program = torch.onnx.export(
        traced,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(module.inputs),
        output_names=list(module.outputs),
        dynamic_shapes=changes,  # for their names
        optimize=False,
        verbose=False,
    )
    for value in program.model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    program.optimize()
    for value in program.model.graph.inputs:
        if value.name in module.shapes:
            value.shape = ir.Shape(module.shapes[value.name])
    return program.model


def fill(
    model: ir.Model, read: Callable[[str], np.ndarray], bits_of: Callable[[str], int | None], table_type: str
) -> None:
    """Tell the weights of a traced graph where their values come from.

    Args:
        read: the tensor of a name, float32.
        bits_of: of the matrix of a name: 4, 8, or None where it stays float32.
        table_type: of tables that are looked up: "float32" or "float16".
    """
    graph = model.graph
    weights = {
        value: Weight(value.name, tuple(value.shape.numpy()), partial(read, value.name))
        for value in graph.initializers.values()
        if value.const_value is None
    }
    for node in list(graph):
        if node.op_type in ("Transpose", "Split") and (weight := weights.get(node.inputs[0])) is not None:
            weights |= zip(node.outputs, _made_of(weight, node), strict=True)
    moving = set(graph.inputs)
    for node in graph:
        if not moving.isdisjoint(node.inputs):
            moving.update(node.outputs)
    for node in list(graph):
        if node.op_type == "MatMul" and (matrix := weights.get(node.inputs[1])) is not None:
            # The resampler's queries are always the same. OpenVINO computes their product while it loads, with whole weights only.
            if (bits := bits_of(matrix.name)) is not None and node.inputs[0] in moving:
                _quantize(node, matrix, bits)
        elif node.op_type == "Gather" and table_type == "float16" and node.inputs[0] in weights:
            _halve(node, weights[node.inputs[0]])
    for value, weight in reversed(weights.items()):  # what was made of weights before these
        if not value.is_initializer():
            if value.uses():
                stored = _initializer(graph, value.name, weight.shape, np.float32, weight.read)
                ir.convenience.replace_all_uses_with(value, stored)
            node = value.producer()
            if node.graph is graph and not any(output.uses() for output in node.outputs):
                graph.remove(node, safe=True)
        elif value.uses():
            value.const_value = _lazy(value.name, weight.shape, np.float32, weight.read)
        else:
            del graph.initializers[value.name]
    _strip(model)


def _made_of(weight: Weight, node: ir.Node) -> list[Weight]:
    """What a node makes of a weight."""
    if node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints()
        shape = tuple(weight.shape[axis] for axis in order)
        return [Weight(weight.name, shape, lambda: np.ascontiguousarray(weight.read().transpose(order)))]
    axis, count = node.attributes["axis"].as_int(), len(node.outputs)
    shape = tuple(side // count if place == axis else side for place, side in enumerate(weight.shape))

    def part(place: int) -> np.ndarray:
        return np.split(weight.read(), count, axis)[place]

    return [Weight(weight.name, shape, partial(part, place)) for place in range(count)]


def _quantize(node: ir.Node, weight: Weight, bits: int) -> None:
    """Make a product with a matrix [rows, columns] one with integers, in blocks of rows that share a scale."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    rows, columns = weight.shape
    blocks = -(-rows // BLOCK)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_PRODUCTS, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)

    @lru_cache(maxsize=1)
    def quantized() -> tuple[np.ndarray, np.ndarray]:
        integers, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.read()))
        return integers, scales

    def integers() -> np.ndarray:
        return quantized()[0]

    def scales() -> np.ndarray:
        found = quantized()[1].reshape(-1)
        quantized.cache_clear()  # they are written last
        return found

    graph, name = node.graph, f"{weight.name}_{node.name}"  # parts of a weight have its name, too
    inputs = [
        node.inputs[0],
        _initializer(graph, f"{name}_Q{bits}", (columns, blocks, BLOCK * bits // 8), np.uint8, integers),
        _initializer(graph, f"{name}_scales", (columns * blocks,), np.float32, scales),
    ]
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": INT8_PRODUCTS}
    _replace(node, [ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)])


def _halve(node: ir.Node, weight: Weight) -> None:
    """Store a table in 16 bits; what is looked up becomes float32 again."""
    name = f"{weight.name}_half"
    table = _initializer(node.graph, name, weight.shape, np.float16, lambda: weight.read().astype(np.float16))
    looked_up = ir.node("Gather", [table, node.inputs[1]], dict(node.attributes))
    _replace(node, [looked_up, ir.node("Cast", looked_up.outputs, {"to": ir.DataType.FLOAT})])


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    old, made = node.outputs[0], new[-1].outputs[0]
    name, made.shape, made.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old], [made])
    made.name = name


def _initializer(
    graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]
) -> ir.Value:
    tensor = _lazy(name, shape, dtype, read)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _lazy(name: str, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]) -> ir.LazyTensor:
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    return ir.LazyTensor(lambda: ir.Tensor(read(), name=name), kind, ir.Shape(shape), name=name)


def _strip(model: ir.Model) -> None:
    """Take out what the exporter notes about its own run: stack traces with the paths of this machine among it."""
    model.metadata_props.clear()
    graph = model.graph
    graph.metadata_props.clear()
    graph.doc_string = model.doc_string = None
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def stored_bytes(model: ir.Model) -> int:
    """Bytes of the weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def write(model: ir.Model, file: Path) -> None:
    """Write a graph; its weights into a file of their own, one after the other, where one would be too large."""
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    size = stored_bytes(model)
    if size <= LARGEST_FILE:
        ir.save(model, file)
        return
    with tqdm(total=size, unit="B", unit_scale=True, desc=file.name, disable=not sys.stderr.isatty()) as bar:
        ir.save(
            model, file, external_data=f"{file.name}.data", callback=lambda tensor, info: bar.update(tensor.nbytes)
        )
