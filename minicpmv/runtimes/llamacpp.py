"""llama.cpp in this process, by its C interface: rows of embeddings in, logits out.

What is special:
- The library is the one inside the package xllamacpp, which needs no compiler. Its C interface has no stable layout, and
  a struct of another layout ends the process: the defaults of the library are read through ours before anything else.
- Whatever is read comes as embeddings, so that image features need no road of their own.
"""

import ctypes
import importlib.util
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpmv.errors import MiniCPMVError, require
from minicpmv.runtimes.gguf_file import StoredTensor


if TYPE_CHECKING:
    from minicpmv.runtimes.language_model import Part

EXTRA = "gguf"
PACKAGES = ("gguf", "xllamacpp")
BATCH = 2048  # most tokens of one call of the library
ERROR_LEVEL = 4  # of ggml's messages


class LlamaCppError(MiniCPMVError):
    """llama.cpp is another than the one that is known here, or cannot do what it is asked."""


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# What the library says of itself where our layout is its own.
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "op_offload": True,
    "kv_unified": False,
}

# name: (result, arguments)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_state_seq_save_file": (c_size_t, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_size_t]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, POINTER(c_float)],
    ),
}

_last_error: list[str] = []


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _keep_errors(level: int, text: bytes, _: Any) -> None:
    """The library's log: nothing is printed, and its last error is kept for ours."""
    if level == ERROR_LEVEL and text:
        _last_error[:] = [text.decode(errors="replace").strip()]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """llama.cpp with the types of its functions.

    Raises:
        MissingPackageError: the package is not installed.
        LlamaCppError: it is another llama.cpp than the one that is known here.
    """
    require(EXTRA, *PACKAGES)
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).glob("xllamacpp*.so")]
    if not files:
        raise LlamaCppError(f"xllamacpp {version('xllamacpp')} holds no library here: install another version of it")
    lib = ctypes.CDLL(str(files[0]))
    missing = [name for name in FUNCTIONS if not hasattr(lib, name)]
    for name in FUNCTIONS.keys() - set(missing):
        function = getattr(lib, name)
        function.restype, function.argtypes = FUNCTIONS[name]
    check_layout({} if missing else found_defaults(lib))
    lib.llama_log_set(_keep_errors, None)
    lib.llama_backend_init()
    return lib


def found_defaults(lib: ctypes.CDLL) -> dict[str, Any]:
    """The library's defaults, as they look through our layout."""
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    return {name: getattr(model, name) for name in MODEL_DEFAULTS} | {
        name: getattr(context, name) for name in CONTEXT_DEFAULTS
    }


def check_layout(found: dict[str, Any]) -> None:
    """Refuse a library whose structs are laid out otherwise: it would read its settings from the wrong places.

    Raises:
        LlamaCppError: names the first difference, and the versions that were tried.
    """
    for name, expected in (MODEL_DEFAULTS | CONTEXT_DEFAULTS).items():
        if found.get(name) != expected:
            raise LlamaCppError(
                f"xllamacpp {version('xllamacpp')} has another C interface than the one known here ({name} is "
                f"{found.get(name)}, not {expected}): pip install -c constraints.txt xllamacpp in a clone"
            )


class LlamaCpp:
    """A language model with the states of several sequences.

    Attributes:
        sequences, cells: how many sequences there is room for, and tokens in each.

    Raises:
        LlamaCppError: the file cannot be loaded.
    """

    software, error = "llama.cpp", LlamaCppError
    most_sequences = 256

    def __init__(self, file: Path, threads: int):
        self.name, self.lib, self.threads = file.name, library(), threads
        self.sequences = self.cells = 0
        _last_error.clear()
        self._model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())
        if not self._model:
            raise LlamaCppError(f"llama.cpp cannot load {file}{self._reason()}: export or fetch it again")
        self._free_model = weakref.finalize(self, self.lib.llama_model_free, self._model)
        self._context: Any = None
        self._free_context: Any = None
        self._vocabulary = self.lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(self._vocabulary)
        self.hidden_size: int = self.lib.llama_model_n_embd(self._model)

    def reserve(self, sequences: int, cells: int) -> None:
        """Make room anew; all states are forgotten.

        Raises:
            LlamaCppError: there is no memory for as many.
        """
        if self._free_context is not None:
            self._free_context()
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * cells, sequences
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        _last_error.clear()
        self._context, self.sequences, self.cells = None, 0, 0
        context = self.lib.llama_init_from_model(self._model, params)
        if not context:
            raise LlamaCppError(
                f"llama.cpp has no room for {sequences} conversations of {cells} tokens{self._reason()}: ask about less at "
                "once, or in smaller batches"
            )
        self._context, self.sequences, self.cells = context, sequences, cells
        # Before the model, whose finalizer was made earlier: they run in reverse order when Python ends.
        self._free_context = weakref.finalize(self, self.lib.llama_free, context)

    def read(self, parts: "Sequence[Part]") -> list[np.ndarray]:
        """Read the parts; returns the logits [wanted, V] of each.

        Raises:
            LlamaCppError: llama.cpp fails.
        """
        memory = self.lib.llama_get_memory(self._context)
        for part in parts:
            self.lib.llama_memory_seq_rm(memory, part.sequence, part.start, -1)
        rows = np.ascontiguousarray(np.concatenate([part.rows for part in parts]), dtype=np.float32)
        wanted = np.concatenate([part.wanted for part in parts]).astype(np.int8)
        positions = np.concatenate([np.arange(part.start, part.start + len(part.rows)) for part in parts])
        owners = np.repeat([part.sequence for part in parts], [len(part.rows) for part in parts])
        logits = [
            self._decode(*(column[start : start + BATCH] for column in (rows, wanted, positions, owners)))
            for start in range(0, len(rows), BATCH)
        ]
        counts = np.cumsum([int(part.wanted.sum()) for part in parts])[:-1]
        return np.split(np.concatenate(logits) if len(logits) > 1 else logits[0], counts)

    def _decode(self, rows: np.ndarray, wanted: np.ndarray, positions: np.ndarray, owners: np.ndarray) -> np.ndarray:
        count = len(rows)
        ids = np.ascontiguousarray(owners, dtype=np.int32)
        addresses = ids.ctypes.data + ids.itemsize * np.arange(count, dtype=np.uintp)
        ones, places = np.ones(count, dtype=np.int32), np.ascontiguousarray(positions, dtype=np.int32)
        batch = Batch(
            count,
            None,
            _pointer(rows, c_float),
            _pointer(places, c_int32),
            _pointer(ones, c_int32),
            _pointer(addresses, POINTER(c_int32)),
            _pointer(wanted, c_int8),
        )
        _last_error.clear()
        if status := self.lib.llama_decode(self._context, batch):
            raise LlamaCppError(f"llama.cpp could not read {count} tokens (status {status}{self._reason()})")
        found = np.empty((int(wanted.sum()), self.vocab_size), dtype=np.float32)
        for line, place in enumerate(np.flatnonzero(wanted)):
            found[line] = np.ctypeslib.as_array(
                self.lib.llama_get_logits_ith(self._context, int(place)), (self.vocab_size,)
            )
        return found

    def save(self, sequence: int, ids: Sequence[int], file: Path) -> None:
        """Write the states of a sequence into a file that a llama-server of the same llama.cpp restores into a slot.

        Args:
            ids: the tokens that they count for there.

        Raises:
            LlamaCppError: the file cannot be written.
        """
        tokens = (c_int32 * len(ids))(*ids)
        if not self.lib.llama_state_seq_save_file(self._context, str(file).encode(), sequence, tokens, len(ids)):
            raise LlamaCppError(f"llama.cpp cannot write {file}{self._reason()}: choose another place")

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by llama.cpp's own tokenizer; control tokens are read as such, and none is added."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])

    @staticmethod
    def _reason() -> str:
        return f" ({_last_error[0]})" if _last_error else ""


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(POINTER(kind))


@lru_cache
def _dequantizer(kind: int) -> Any:
    """The library's function for a type made of blocks (by ggml's number), or None: its names are those of the types."""
    from gguf import GGMLQuantizationType

    name = GGMLQuantizationType(kind).name.lower().replace("_k", "_K")
    function = getattr(library(), f"dequantize_row_{name}", None)
    if function is not None:
        function.restype, function.argtypes = None, [c_void_p, c_void_p, ctypes.c_int64]
    return function


def dequantized(tensor: StoredTensor, places: np.ndarray) -> np.ndarray:
    """The rows `places` of a table as float32 [n, D], by ggml's own code where it has some, which is faster than numpy."""
    if (function := _dequantizer(tensor.kind)) is None:
        return tensor.rows(places)
    data = tensor.data[places]  # uint8 [n, bytes of a row]
    rows = np.empty((len(data), tensor.width), dtype=np.float32)
    function(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows


def quantize(rows: np.ndarray, type_number: int, row_bytes: int) -> np.ndarray:
    """Rows [n, m] of float32 in a type that is made of blocks, by ggml's own code: uint8 [n, row_bytes]."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    output = np.empty((len(rows), row_bytes), dtype=np.uint8)
    library().ggml_quantize_chunk(
        type_number, _pointer(rows, c_float), output.ctypes.data, 0, len(rows), rows.shape[1], None
    )
    return output
