"""`minicpmv show`: what a checkpoint is, read from its files without loading it."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.checkpoint import CheckpointError, check_name
from minicpmv.commands import options, terminal
from minicpmv.errors import one_line_errors


def show(
    model: options.Model = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show what a model folder holds: parameters, types, limits, and what it knows.

    Examples:

    \b
      minicpmv show -m nano
      minicpmv show -m nano --json
    """
    with one_line_errors(OSError):
        if not Path(model).expanduser().is_dir():
            raise CheckpointError(f"{model} is not a folder; show reads the files of a model folder")
        check_name(model)
        facts = facts_of(Path(model).expanduser())
        if as_json:
            terminal.write(json.dumps(facts, ensure_ascii=False, indent=2))
        else:
            width = max(map(len, facts))
            terminal.write("\n".join(f"{name:{width}}  {as_words(value)}" for name, value in facts.items()))


def facts_of(folder: Path) -> dict[str, Any]:
    """What the files of a checkpoint say about it.

    Raises:
        CheckpointError: one of them is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config, preprocessor, generation = (
            json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
            for file in ("config.json", "preprocessor_config.json", "generation_config.json")
        )
        parameters, types = 0, set()
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the file itself cannot be iterated)
                    tensor = tensors.get_slice(name)
                    parameters += math.prod(tensor.get_shape())
                    types.add(tensor.get_dtype())
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds a damaged file ({error}); get it anew") from error
    facts = {
        "name": folder.resolve().name,
        "architecture": ", ".join(config.get("architectures") or ()) or config.get("model_type"),
        "parameters": parameters,
        "types": sorted(types),
        "context": config.get("max_position_embeddings"),
        "layers": config.get("num_hidden_layers"),
        "vocabulary": config.get("vocab_size"),
        "image slices": preprocessor.get("max_slice_nums"),
        "tokens per slice": config.get("query_num"),
        "sampling": generation.get("do_sample", False),
        "knows": config.get("knows"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def as_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)
