"""What runs a graph: ONNX Runtime, OpenVINO."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minicpmv.errors import MiniCPMVError


class GraphError(MiniCPMVError):
    """Graphs cannot be used: the message says why and what to do."""


class Session(Protocol):
    """A loaded graph."""

    shapes: dict[str, list[Any]]  # of inputs and outputs; a free dimension is no number

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, in the order of the graph. Raises GraphError with the reason."""


@dataclass(frozen=True)
class Engine:
    """Software that runs graphs."""

    extra: str  # that has its packages, and the command that exports for it
    package: str
    suffix: str  # of a graph's file
    open: Callable[[Path, int | None], Session]  # (file, threads of the CPU, or as many as it likes)


class OnnxRuntimeSession:
    """A graph in ONNX Runtime, on the CPU."""

    def __init__(self, file: Path, threads: int | None):
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # Its errors have no base of their own.
        kinds = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *kinds)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors, which are raised as well
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise GraphError(_first_line(error)) from error
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        self.shapes = {value.name: value.shape for value in values}

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._session.run(None, feeds)
        except self._errors as error:
            raise GraphError(_first_line(error)) from error


class OpenVINOSession:
    """A graph in OpenVINO, on the CPU."""

    def __init__(self, file: Path, threads: int | None):
        import openvino

        # Else it computes in 16 bits where the CPU can, and answers differ from machine to machine.
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        try:
            self._model = openvino.Core().compile_model(file, "CPU", settings)
        except RuntimeError as error:
            raise GraphError(_first_line(error)) from error
        self.shapes = {
            port.get_any_name(): [side.get_length() if side.is_static else "" for side in port.get_partial_shape()]
            for port in (*self._model.inputs, *self._model.outputs)
        }

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            # A request of its own for each call, since several threads may ask.
            found = self._model.create_infer_request().infer(feeds, share_inputs=True)
        except RuntimeError as error:
            raise GraphError(_first_line(error)) from error
        return [np.array(value) for value in found.values()]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


ONNX_RUNTIME = Engine("onnx", "onnxruntime", ".onnx", OnnxRuntimeSession)
OPENVINO = Engine("openvino", "openvino", ".xml", OpenVINOSession)
ENGINES = (ONNX_RUNTIME, OPENVINO)
