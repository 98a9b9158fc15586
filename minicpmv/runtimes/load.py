"""A model whose language model is a GGUF file: the tower from the file beside it, in PyTorch, and llama.cpp behind it."""

from pathlib import Path
from typing import Any

from minicpmv.errors import require
from minicpmv.runtimes.gguf import find_mmproj, tower_tensors
from minicpmv.runtimes.gguf_file import GGUFError
from minicpmv.runtimes.llamacpp import EXTRA, PACKAGES


def check(file: Path) -> None:
    """Refuse what cannot be loaded before anything heavy is imported.

    Raises:
        MissingPackageError: llama.cpp is not installed.
        GGUFError: the tower or the small files of the checkpoint are not beside it.
    """
    require(EXTRA, *PACKAGES)
    find_mmproj(file)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        if not (file.parent / name).is_file():
            raise GGUFError(
                f"beside {file} there is no {name}: put it into a folder with the small files of its checkpoint, as "
                "minicpmv export gguf does"
            )


def load_gguf(file: Path, dtype: Any = "auto", device: Any = None) -> tuple[Any, Any]:
    """`(model, processor)`, as of any other checkpoint: the model's own class, with llama.cpp as its `llm`.

    Args:
        file: the language model.
        dtype, device: of tower and resampler; "auto" is float32 on a CPU, else bfloat16.

    Raises:
        GGUFError, LlamaCppError: a file is damaged, missing, or that of another model.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor, GenerationConfig

    from minicpmv.runtimes.language_model import LlamaCppForCausalLM

    check(file)
    folder = str(file.parent.resolve())
    device = torch.device("cpu" if device is None else device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    language_model = LlamaCppForCausalLM(file, config)

    # Built without layers in a language model that goes at once, since their weights would take all memory.
    empty = AutoConfig.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=0, layer_types=[])
    empty.vocab_size = 1
    empty.pad_token_id = None
    model = AutoModel.from_config(empty, trust_remote_code=True, dtype=torch.float32)
    model.llm, model.config = language_model, config
    vision = config.vision_config
    layers = vision.num_hidden_layers - bool(config.drop_vision_last_layer)
    tensors = tower_tensors(find_mmproj(file), layers, vision.image_size // vision.patch_size)
    own = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("llm.")}
    with torch.no_grad():
        for name, values in tensors:
            if (parameter := own.pop(name, None)) is None or parameter.numel() != values.size:
                raise GGUFError(
                    f"{find_mmproj(file)} has {name} of {values.shape}, which does not fit the config.json beside it: put "
                    "it beside the files of its own checkpoint"
                )
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))
    if own:
        raise GGUFError(f"{find_mmproj(file)} lacks {', '.join(sorted(own))}: it belongs to another model")
    if (file.parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(dtype=dtype, device=device).eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
