"""A model that runs elsewhere, as one of PyTorch: a GGUF file with the tower from the file beside it, in PyTorch, and
llama.cpp behind it; or a folder of graphs, in ONNX Runtime or OpenVINO, or of other exports, in ExecuTorch or MLX."""

from pathlib import Path
from typing import Any

from minicpmv.errors import require
from minicpmv.runtimes import executorch, graphs, mlx
from minicpmv.runtimes.gguf import find_mmproj, tower_tensors
from minicpmv.runtimes.gguf_file import GGUFError
from minicpmv.runtimes.graph_engines import GraphError
from minicpmv.runtimes.llamacpp import EXTRA, PACKAGES


# Stems of files of exports that are called as those of checkpoints are: OpenVINO's *.bin, MLX's *.safetensors.
EXPORTED_WEIGHTS = (*graphs.NAMES, Path(mlx.FILE).stem)


def is_export(folder: Path) -> bool:
    """Whether a folder holds what other software runs, besides GGUF files."""
    return graphs.engine_of(folder) is not None or _parts_module(folder) is not None


def check(place: Path) -> None:
    """Refuse what cannot be loaded before anything heavy is imported.

    Args:
        place: a GGUF file, or the folder of an export.

    Raises:
        MissingPackageError: the software is not installed.
        GGUFError, GraphError, ExecuTorchError, MLXError: a file lacks that belongs to it.
    """
    if not place.is_dir():
        _check_gguf(place)
    elif module := _parts_module(place):
        _check_parts(module, place)
    else:
        graphs.check(place)


def load(place: Path, dtype: Any = "auto", device: Any = None) -> tuple[Any, Any]:
    """`(model, processor)`, as of any other checkpoint: the model's own class, with parts that run elsewhere.

    Args:
        place: a GGUF file, or the folder of an export.
        dtype, device: of what runs in PyTorch; "auto" is float32 on a CPU, else bfloat16. Nothing of a folder does.

    Raises:
        GGUFError, LlamaCppError, GraphError, ExecuTorchError, MLXError: a file is damaged, missing, or that of another model.
    """
    if not place.is_dir():
        return _load_gguf(place, dtype, device)
    if str(dtype).removeprefix("torch.") not in ("auto", "float32"):
        module = _parts_module(place)
        error = module.ERROR if module else GraphError
        raise error(f"{place} computes in float32: leave out dtype={dtype}, or load the checkpoint")
    return _load_folder(place)


def _parts_module(folder: Path) -> Any:
    """The module that runs the parts in a folder; None where it holds graphs, or no export."""
    return next((module for module in (executorch, mlx) if (folder / module.FILE).is_file()), None)


def _check_parts(module: Any, folder: Path) -> None:
    """Before anything heavy is imported."""
    require(module.EXTRA, module.PACKAGE)
    for name in module.SMALL_FILES:
        if not (folder / name).is_file():
            raise module.ERROR(
                f"{folder} has no {name}: export the checkpoint again, with minicpmv export {module.EXTRA}"
            )


def _check_gguf(file: Path) -> None:
    require(EXTRA, *PACKAGES)
    find_mmproj(file)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        if not (file.parent / name).is_file():
            raise GGUFError(
                f"beside {file} there is no {name}: put it into a folder with the small files of its checkpoint, as "
                "minicpmv export gguf does"
            )


def _load_folder(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoProcessor

    source = str(folder.resolve())
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    module = _parts_module(folder)
    llm, vpm, resampler = _module_parts(module, folder, config) if module else _graph_parts(folder, config)
    with torch.device("meta"):
        model = _shell(folder, llm, config)
    model.vpm, model.resampler = vpm, resampler
    return model.eval(), AutoProcessor.from_pretrained(source, trust_remote_code=True)


def _module_parts(module: Any, folder: Path, config: Any) -> tuple[Any, Any, Any]:
    """Language model, tower and resampler."""
    from minicpmv.runtimes.part_modules import PartForCausalLM, PartResampler, PartTower

    _check_parts(module, folder)
    parts, reader = module.open_parts(folder, config)
    return PartForCausalLM(parts, reader, config), PartTower(parts), PartResampler(parts)


def _graph_parts(folder: Path, config: Any) -> tuple[Any, Any, Any]:
    """Language model, tower and resampler."""
    import torch

    from minicpmv.runtimes.graph_model import GraphForCausalLM, GraphResampler, GraphTower

    parts = graphs.Graphs(folder, torch.get_num_threads())
    return GraphForCausalLM(parts, config), GraphTower(), GraphResampler(parts)


def _shell(folder: Path, language_model: Any, config: Any) -> Any:
    """The model's own class around a language model that runs elsewhere; tower and resampler have no values yet."""
    import torch
    from transformers import AutoConfig, AutoModel, GenerationConfig

    # Built without layers in a language model that goes at once, since their weights would take all memory.
    source = str(folder.resolve())
    empty = AutoConfig.from_pretrained(source, trust_remote_code=True, num_hidden_layers=0, layer_types=[])
    empty.vocab_size = 1
    empty.pad_token_id = None
    model = AutoModel.from_config(empty, trust_remote_code=True, dtype=torch.float32)
    model.llm, model.config = language_model, config
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _load_gguf(file: Path, dtype: Any, device: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoProcessor

    from minicpmv.runtimes.llamacpp_model import LlamaCppForCausalLM

    check(file)
    folder = str(file.parent.resolve())
    device = torch.device("cpu" if device is None else device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    language_model = LlamaCppForCausalLM(file, config)
    model = _shell(file.parent, language_model, config)
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
    return model.to(dtype=dtype, device=device).eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
