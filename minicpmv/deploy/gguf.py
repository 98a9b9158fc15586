"""Writes a checkpoint as GGUF, for llama.cpp: the language model and, in a file of its own, tower and resampler.

What is special:
- Tensor after tensor goes from the checkpoint into the file: the memory is that of the largest.
- The chat template in the file numbers images and puts line breaks around them, so that an unmodified llama-server builds
  the prompt that the model learned.
- A file gets its name when it is whole.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minicpmv.deploy.folder import check_output, staged, write_card
from minicpmv.deploy.gguf_types import FILE_TYPES, FileType, stored, stored_bytes, type_of
from minicpmv.deploy.reference import Reference, open_runtime
from minicpmv.deploy.source import Checkpoint, ExportError
from minicpmv.errors import require
from minicpmv.runtimes import gguf as names
from minicpmv.runtimes.llamacpp import EXTRA, PACKAGES


MINICPMV_VERSION = 6  # what llama.cpp calls 4.5
RESAMPLER_HEAD_DIM = 128  # llama.cpp knows no other

# In a message's text llama-server leaves a marker for each image, with nothing around it.
NUMBER_IMAGES = r"""
    {%- set pieces = ns.text.split('<__media') %}
    {%- set ns.text = pieces[0] %}
    {%- for piece in pieces[1:] %}
        {%- set end = piece.split('__>')[0] ~ '__>' %}
        {%- set rest = piece[end | length:] %}
        {%- set before = '\n' if ns.text and not ns.text.endswith('\n') else '' %}
        {%- set after = '\n' if rest and not rest.startswith('\n') else '' %}
        {%- set ns.text = ns.text ~ before ~ '<image_id>' ~ ns.images ~ '</image_id><__media' ~ end ~ after ~ rest %}
        {%- set ns.images = ns.images + 1 %}
    {%- endfor %}"""
TEXT_IS_READ = "\n    {%- set ns.texts = ns.texts + [ns.text] %}"  # where our template has the text of a message
NAMESPACE = "namespace("
GENERATION_TAGS = ("\n        {%- generation %}", "\n        {%- endgeneration %}")

# Relative error that image features may have, by the type of the tower's weights.
FEATURE_MARGINS = {"f32": 1e-3, "f16": 5e-3, "bf16": 2e-2, "q8_0": 5e-2}

USE = """\
```text
minicpmv ask IMAGE "What is in the image?" -m {file}
minicpmv chat -m {file}
```

runs the language model in llama.cpp and the tower of `{mmproj}` in PyTorch: slices and packed videos are exactly those of the checkpoint. A
llama-server takes the same two files (`-m {file} --mmproj {mmproj} --jinja`): it slices images a little differently, and a frame of a video
costs as much as an image."""


def export(
    model: str | Path,
    output: Path,
    kinds: Sequence[str],
    *,
    mmproj_kind: str = "f16",
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> list[Path]:
    """Write a checkpoint as GGUF and hold it against PyTorch.

    Args:
        model: folder of the checkpoint.
        output: folder for the files, the card, and the checkpoint's small files.
        kinds: types of the language model, of `FILE_TYPES`; one file each.
        mmproj_kind: type of the tower, of `FEATURE_MARGINS`.
        samples: questions of each row of NanoBench.
        is_checked: False leaves out the comparison, where PyTorch has no memory for the checkpoint.
        note: is told what happens.

    Returns:
        the files of the language model.

    Raises:
        CheckpointError, ExportError, QuantizationError, OutputError: before anything is written.
        ParityError: the answers differ beyond what a type allows; the files stay in a folder whose name says so.
    """
    checkpoint, output = Checkpoint(model), Path(output).expanduser()
    for kind in kinds:
        check(checkpoint, kind)
    if is_checked:
        require(EXTRA, *PACKAGES)
    sizes = [language_types(checkpoint, FILE_TYPES[kind]).values() for kind in kinds]
    check_output(output, sum(stored_bytes(shape, kind) for types in sizes for _, kind, shape in types))

    import torch
    from transformers import AutoProcessor

    name = checkpoint.folder.name
    processor = AutoProcessor.from_pretrained(str(checkpoint.folder), trust_remote_code=True)
    reference = Reference(checkpoint, samples, note) if is_checked else None
    mmproj = f"{names.MMPROJ}-{name}-{mmproj_kind.upper()}{names.SUFFIX}"
    files = []
    for kind in kinds:
        export_name = f"{name}-{kind.upper()}"
        file = f"{export_name}{names.SUFFIX}"
        with staged(output, export_name) as stage:
            note(f"Writing {file}")
            checkpoint.copy_small_files(stage)
            write_mmproj(checkpoint, processor, mmproj_kind, stage / mmproj, name)
            write_language_model(checkpoint, processor, kind, stage / file, name, torch.get_num_threads())
            if reference is not None:
                reference.check(
                    stage,
                    partial(open_runtime, stage / file, "xllamacpp", "gguf"),
                    export_name,
                    partial(_write_card, stage, checkpoint, file, mmproj),
                    "choose a type with more bits",
                    type=kind,
                    size=(stage / file).stat().st_size,
                    margin=FILE_TYPES[kind].margin,
                    feature_margin=FEATURE_MARGINS[mmproj_kind],
                )
        files.append(output / file)
        _write_card(output, checkpoint, file, mmproj)
    return files


def _write_card(folder: Path, checkpoint: Checkpoint, file: str, mmproj: str) -> None:
    exports = [found.stem for found in folder.glob(f"*{names.SUFFIX}") if not names.is_mmproj(found)]
    base = f"`{checkpoint.folder.name}`, a MiniCPM-V 4.5, as GGUF for llama.cpp, written by `minicpmv export gguf`."
    write_card(
        folder, "gguf", f"{checkpoint.folder.name} as GGUF", base, USE.format(file=file, mmproj=mmproj), exports
    )


def position_side(checkpoint: Checkpoint) -> int:
    """Rows a side of the tower's position table."""
    vision = checkpoint.config["vision_config"]
    return vision["image_size"] // vision["patch_size"]


def position_rule(checkpoint: Checkpoint) -> Callable[[int], np.ndarray]:
    """The tower's own rule, from the code of the checkpoint: which rows of its table a side of n patches reads."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    tower = get_class_from_dynamic_module("vision_minicpmv.MiniCPMVVisionTransformer", str(checkpoint.folder))
    position_buckets = sys.modules[tower.__module__].position_buckets
    return lambda count: position_buckets(count, position_side(checkpoint))


def check(checkpoint: Checkpoint, kind: str) -> None:
    """Refuse a checkpoint that llama.cpp could not read, or not store in this type.

    Raises:
        ExportError, QuantizationError: names the value and the limit.
        MissingPackageError: a package is not installed.
    """
    require(EXTRA, *(PACKAGES if FILE_TYPES[kind].needs_ggml else PACKAGES[:1]))
    config, side = checkpoint.config, position_side(checkpoint)
    if config["hidden_size"] % RESAMPLER_HEAD_DIM:
        raise ExportError(
            f"hidden_size ({config['hidden_size']}) is no multiple of {RESAMPLER_HEAD_DIM}, the width of llama.cpp's "
            "resampler heads: this model cannot run there"
        )
    if side > names.TABLE_SIDE:
        raise ExportError(f"the tower's position table has {side} rows a side; llama.cpp has {names.TABLE_SIDE}")
    checkpoint.check_rope()
    language_types(checkpoint, FILE_TYPES[kind])


def language_types(checkpoint: Checkpoint, file_type: FileType) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """`{name in the file: (name in the checkpoint, ggml type, shape)}` of the language model."""
    layers = checkpoint.config["num_hidden_layers"]
    found = {}
    for theirs, ours in names.language_names(layers, checkpoint.is_tied).items():
        shape = checkpoint.shape(ours)
        found[theirs] = ours, type_of(theirs, shape, file_type, layers, checkpoint.is_tied), shape
    return found


# ---- the language model ----


def write_language_model(
    checkpoint: Checkpoint, processor: Any, kind: str, file: Path, name: str, threads: int
) -> None:
    """Write the language model with its tokenizer and chat template."""
    import gguf

    config, file_type = checkpoint.config, FILE_TYPES[kind]
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, processor.tokenizer, config["vocab_size"])
    writer.add_chat_template(llama_template(processor.tokenizer.chat_template))
    types = language_types(checkpoint, file_type)
    tensors = ((theirs, kind, shape, checkpoint.tensor(ours)) for theirs, (ours, kind, shape) in types.items())
    infos = [(theirs, kind, shape) for theirs, (_, kind, shape) in types.items()]
    write_tensors(writer, infos, tensors, file.name, threads)


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write the vocabulary, the merges and the special tokens; rows of the embeddings beyond it get names of their own."""
    from gguf import TokenType

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: place for token, place in tokenizer.get_vocab().items() if place < vocab_size}
    added = tokenizer.added_tokens_decoder
    tokens, types = [f"[PAD{place}]" for place in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    for token, place in vocabulary.items():
        tokens[place], types[place] = token, TokenType.NORMAL
    for place, token in added.items():
        if place < vocab_size:
            types[place] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_add_bos_token(False)


def llama_template(template: str) -> str:
    """Our chat template for llama-server: it numbers the images, puts them on lines of their own, and has no marks of
    what the model writes, which jinja engines other than transformers' do not know.

    Raises:
        ExportError: it is another template.
    """
    places = {NAMESPACE: "namespace(images=0, ", TEXT_IS_READ: NUMBER_IMAGES + TEXT_IS_READ}
    places |= dict.fromkeys(GENERATION_TAGS, "")
    for place, replacement in places.items():
        if template.count(place) != 1:
            raise ExportError(
                f"the checkpoint's chat template has {place.strip()} in {template.count(place)} places, not in one: it is not "
                "this repository's chat_template.jinja, to which the numbers of images are added"
            )
        template = template.replace(place, replacement)
    return template


# ---- tower and resampler ----


def write_mmproj(checkpoint: Checkpoint, processor: Any, kind: str, file: Path, name: str) -> None:
    """Write tower and resampler."""
    import gguf

    config, vision = checkpoint.config, checkpoint.config["vision_config"]
    images = processor.image_processor
    layers = vision["num_hidden_layers"] - bool(config.get("drop_vision_last_layer"))
    cells = names.cells_to_buckets(
        position_side(checkpoint), images.scale_resolution // images.patch_size, position_rule(checkpoint)
    )
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_type(names.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind].number)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("resampler")
    writer.add_int32("clip.minicpmv_version", MINICPMV_VERSION)
    writer.add_uint32("clip.minicpmv_query_num", config["query_num"])
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(images.scale_resolution)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(0)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6))
    writer.add_vision_image_mean([float(value) for value in images.mean])
    writer.add_vision_image_std([float(value) for value in images.std])
    writer.add_array(names.CELLS, cells.tolist())

    base = FILE_TYPES[kind].base
    infos, tensors = [], []
    for theirs, values, shape in tower_tensors(checkpoint, layers, cells):
        is_matrix = len(shape) > 1 and theirs.endswith(".weight") and theirs != names.POSITIONS_IN_FILE
        of_blocks = base == "Q8_0" and (len(shape) > 2 or shape[-1] % 32)
        infos.append((theirs, "F32" if not is_matrix else "F16" if of_blocks else base, shape))
        tensors.append(values)
    write_tensors(writer, infos, ((*info, make()) for info, make in zip(infos, tensors, strict=True)), file.name, 1)


def tower_tensors(
    checkpoint: Checkpoint, layers: int, cells: np.ndarray
) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """(name in the file, function that makes the tensor, its shape) of everything in the tower's file."""

    def whole(name: str) -> Any:
        return lambda: checkpoint.tensor(name)

    def third(name: str, place: int) -> Any:
        return lambda: np.split(checkpoint.tensor(name), 3)[place]

    for theirs, ours in names.tower_names(layers).items():
        yield theirs, whole(ours), checkpoint.shape(ours)
    width = checkpoint.shape(names.POSITIONS)[1]
    yield (
        names.POSITIONS_IN_FILE,
        lambda: names.spread_positions(checkpoint.tensor(names.POSITIONS), cells),
        (names.TABLE_SIDE**2, width),
    )
    hidden = checkpoint.config["hidden_size"]
    yield names.PROJECTION_IN_FILE, lambda: checkpoint.tensor(names.PROJECTION).T, (hidden, hidden)
    for kind in ("weight", "bias"):
        shape = (hidden, hidden) if kind == "weight" else (hidden,)
        for place, part in enumerate("qkv"):
            yield f"resampler.attn.{part}.{kind}", third(f"{names.IN_PROJECTION}_{kind}", place), shape
    yield names.POSITIONS_OF_KEYS, lambda: np.zeros((1, hidden), np.float32), (1, hidden)


def write_tensors(writer: Any, infos: list, tensors: Any, label: str, threads: int) -> None:
    """Write head and tensors; `infos` are (name, ggml type, shape), and `tensors` the same with the values behind."""
    import gguf

    for name, kind, shape in infos:
        size = stored_bytes(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(stored_bytes(shape, kind) for _, kind, shape in infos)
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not sys.stderr.isatty()) as bar:
        for _, kind, _, values in tensors:
            parts = []
            for part in stored(values, kind, threads):
                parts.append(part)
                bar.update(part.nbytes)
            writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))
    writer.close()
