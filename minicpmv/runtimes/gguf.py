"""GGUF files of this architecture: which tensors they hold under which names, and how they are found and read.

A model is two files: the language model, and "mmproj" with the vision tower and the resampler. Beside them lie the small
files of the checkpoint (config.json, processor, tokenizer, code), of which a GGUF file has no place for all.

What is special:
- llama.cpp's tower has a position table of 70 x 70 rows, read by rules of its own; a smaller one is spread over it, and
  found again in it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minicpmv.runtimes.gguf_file import GGUFError, GGUFFile


TABLE_SIDE = 70  # of llama.cpp's position table
LARGEST_SIDE = 32  # patches a side that are thought of where a smaller table is spread
CELLS = "minicpmv.position_cells"  # field of the tower's file: which row of the checkpoint's table each row repeats
MMPROJ = "mmproj"  # general.type of the file with the tower, and how its name begins
SUFFIX = ".gguf"

# Parts of the checkpoint's names, and what they are called in GGUF.
LANGUAGE_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LANGUAGE_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOWER_NAMES = {
    "vpm.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vpm.embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "vpm.post_layernorm.weight": "v.post_ln.weight",
    "vpm.post_layernorm.bias": "v.post_ln.bias",
    "resampler.query": "resampler.query",
    "resampler.kv_proj.weight": "resampler.kv.weight",
    "resampler.attn.out_proj.weight": "resampler.attn.out.weight",
    "resampler.attn.out_proj.bias": "resampler.attn.out.bias",
    **{
        f"resampler.ln_{part}.{kind}": f"resampler.ln_{part}.{kind}"
        for part in ("q", "kv", "post")
        for kind in ("weight", "bias")
    },
}
TOWER_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
SWAPS = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
POSITIONS, POSITIONS_IN_FILE = "vpm.embeddings.position_embedding.weight", "v.position_embd.weight"
PROJECTION, PROJECTION_IN_FILE = "resampler.proj", "resampler.proj.weight"  # transposed there
IN_PROJECTION = "resampler.attn.in_proj"  # three tensors there
POSITIONS_OF_KEYS = "resampler.pos_embed_k"  # has to be there, and is not read


def language_names(layers: int, is_tied: bool) -> dict[str, str]:
    """`{name in the file: name in the checkpoint}` of the language model, in the order of the file."""
    names = {"token_embd.weight": "llm.model.embed_tokens.weight"}
    for layer in range(layers):
        for ours, theirs in LANGUAGE_LAYER_NAMES.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"llm.model.layers.{layer}.{ours}.weight"
    names["output_norm.weight"] = "llm.model.norm.weight"
    return names if is_tied else names | {"output.weight": "llm.lm_head.weight"}


def tower_names(layers: int) -> dict[str, str]:
    """`{name in the file: name in the checkpoint}` of the tower and the resampler, apart from those that are laid out
    otherwise there."""
    names = {theirs: ours for ours, theirs in TOWER_NAMES.items()}
    for layer in range(layers):
        for ours, theirs in TOWER_LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"v.blk.{layer}.{theirs}.{kind}"] = f"vpm.encoder.layers.{layer}.{ours}.{kind}"
    return names


# ---- the position table ----


def cells_to_buckets(side: int, native_side: int, buckets_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Which row of a table of `side` each row of llama.cpp's table has to repeat, so that both are read alike: int [70].

    There the patch i of n reads row floor(70 i / n); here it reads row `buckets_of(n)[i]`. Where two sides want different
    rows in one place, `native_side` (patches a side of a square slice) is heard first, then the smaller one.
    """
    if side == TABLE_SIDE:
        return np.arange(TABLE_SIDE)
    cells = np.arange(TABLE_SIDE) * side // TABLE_SIDE  # where no side asks
    for count in [*range(LARGEST_SIDE, 0, -1), native_side]:
        cells[TABLE_SIDE * np.arange(count) // count] = buckets_of(count)
    return cells


def spread_positions(table: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The position table [side * side, D] as llama.cpp's: [4900, D]."""
    side = round(len(table) ** 0.5)
    return table.reshape(side, side, -1)[cells][:, cells].reshape(TABLE_SIDE**2, -1)


def gathered_positions(table: np.ndarray, cells: np.ndarray, side: int) -> np.ndarray:
    """The table [side * side, D] that was spread to [4900, D].

    Raises:
        GGUFError: some of its rows are nowhere in it.
    """
    places = [np.flatnonzero(cells == row) for row in range(side)]
    if not all(len(found) for found in places):
        raise GGUFError(
            f"the tower's position table of {TABLE_SIDE} x {TABLE_SIDE} rows cannot stand for one of {side} x {side}: "
            f"the {MMPROJ} file belongs to another model"
        )
    first = np.array([found[0] for found in places])
    return table.reshape(TABLE_SIDE, TABLE_SIDE, -1)[first][:, first].reshape(side * side, -1)


# ---- files ----


def is_mmproj(file: Path) -> bool:
    return file.name.lower().startswith(MMPROJ)


def find_language_model(place: Path) -> Path | None:
    """The language model that a file or a folder is or holds; None for a folder without any GGUF file.

    Raises:
        GGUFError: it is the tower's file, or the folder holds several.
    """
    if place.is_dir():
        found = sorted(file for file in place.glob(f"*{SUFFIX}") if not is_mmproj(file))
        if len(found) > 1:
            raise GGUFError(f"{place} holds {len(found)} models: name one of {', '.join(str(file) for file in found)}")
        return found[0] if found else None
    if is_mmproj(place):
        raise GGUFError(
            f"{place} is the vision tower of a model: name the file beside it that holds the language model"
        )
    return place


def find_mmproj(language_model: Path) -> Path:
    """The tower's file beside a language model: the one whose name fits best, and of those the most exact.

    Raises:
        GGUFError: there is none.
    """
    found = [file for file in language_model.parent.glob(f"*{SUFFIX}") if is_mmproj(file)]
    if not found:
        raise GGUFError(
            f"beside {language_model} there is no {MMPROJ}-*{SUFFIX} with the vision tower: put it into the same folder"
        )
    model = language_model.stem.rpartition("-")[0]
    exactness = ("f32", "f16", "bf16", "q8_0")

    def rank(file: Path) -> tuple[bool, int, str]:
        kind = file.stem.rpartition("-")[2].lower()
        return model not in file.stem, exactness.index(kind) if kind in exactness else len(exactness), file.name

    return min(found, key=rank)


def tower_tensors(file: Path, layers: int, table_side: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names in the checkpoint, and float32 values, of everything in a tower's file.

    Raises:
        GGUFError: it is another tower's.
    """
    found = GGUFFile(file)

    def values(name: str) -> np.ndarray:
        if name not in found.tensors:
            raise GGUFError(f"{file} has no tensor {name}: it belongs to another model")
        return found.tensors[name].rows()

    width = len(values("v.post_ln.weight"))
    # Older converters called the two halves of an MLP by each other's names, and llama.cpp reads both.
    is_swapped = values("v.blk.0.ffn_up.weight").shape[0] == width
    for theirs, ours in tower_names(layers).items():
        name = ".".join(SWAPS.get(part, part) for part in theirs.split(".")) if is_swapped else theirs
        yield ours, values(name)
    cells = np.array(found.fields.get(CELLS, range(TABLE_SIDE)))
    yield POSITIONS, gathered_positions(values(POSITIONS_IN_FILE), cells, table_side)
    yield PROJECTION, np.ascontiguousarray(values(PROJECTION_IN_FILE).T)
    for kind in ("weight", "bias"):
        parts = [values(f"resampler.attn.{part}.{kind}") for part in "qkv"]
        yield f"{IN_PROJECTION}_{kind}", np.concatenate(parts)
