"""Model and processor for training: load, freeze, add an adapter, give each part its learning rate.

What is special:
- an adapter takes the place of the language model's weights; tower and resampler, where they train, train whole and are
  saved with it (`modules_to_save`);
- what trains is float32, whatever type the frozen rest has: in bfloat16 a small step changes nothing;
- only the language model is quantized, never the tower, the resampler or the head.
"""

from collections.abc import Callable

import torch
from accelerate import DistributedType, PartialState
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from minicpmv.checkpoint import source_of
from minicpmv.train.common.arguments import PARTS, AdapterArguments, FreezeArguments, ModelArguments
from minicpmv.train.common.errors import ArgumentsError


def load_model_and_processor(
    model_args: ModelArguments,
    adapter_args: AdapterArguments | None = None,
    freeze_args: FreezeArguments | None = None,
    trust_remote_code: bool = False,
    load: Callable[..., PreTrainedModel] = AutoModelForImageTextToText.from_pretrained,
) -> tuple[nn.Module, ProcessorMixin]:
    """A model ready to train (a `PeftModel` with an adapter), and its processor.

    `load` makes the model; what it has beyond the three parts, such as a value head, always trains, and is saved with an
    adapter.

    Raises:
        ArgumentsError: the model cannot be loaded, or a part with a learning rate of its own is frozen.
        CheckpointError: the code of a Hub model is not trusted.
    """
    adapter_args, freeze_args = adapter_args or AdapterArguments(), freeze_args or FreezeArguments()
    has_adapter = adapter_args.adapter != "none"
    settings = {"dtype": model_args.dtype or "auto", "attn_implementation": model_args.attn_implementation}
    if adapter_args.adapter == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["vpm", "resampler", "lm_head", "score"],
        )
    source = source_of(model_args.model_name_or_path, model_args.model_revision, trust_remote_code)
    try:
        model = load(**source, **settings)
        processor = AutoProcessor.from_pretrained(**source)
    except OSError as error:  # no such name on the Hub, no connection, a file that is missing
        name, reason = model_args.model_name_or_path, " ".join(str(error).split())
        raise ArgumentsError(f"model_name_or_path: {name} cannot be loaded: {reason}") from error
    trained = freeze_args.trained(has_adapter)
    if has_adapter:
        from peft import get_peft_model

        whole = [PARTS[part] for part in ("tower", "resampler") if trained[part]]
        heads = sorted({name.split(".")[0] for name, _ in model.named_parameters() if part_of(name) is None})
        task_type = "CAUSAL_LM" if model.can_generate() else None
        try:
            config = adapter_args.peft_config(whole + heads, task_type)
            model = get_peft_model(model, config, autocast_adapter_dtype=False)  # types: `train_in_float32`
        except ValueError as error:  # no such modules, or fields that the method needs
            raise ArgumentsError(f"adapter {adapter_args.adapter!r}: {error}") from error
    else:
        for name, parameter in model.named_parameters():
            part = part_of(name)
            parameter.requires_grad_(part is None or trained[part])
    train_in_float32(model)
    idle = [part for part in freeze_args.learning_rates() if not trained_parameters(model)[part]]
    if idle:
        raise ArgumentsError(f"{idle[0]}_learning_rate is given, but nothing of the {idle[0]} trains.")
    return model, processor


def train_in_float32(model: nn.Module) -> None:
    """Give every parameter that trains the type float32.

    Not under DeepSpeed, which takes no two types in one model, and keeps float32 copies of what trains itself.
    """
    # Asked for its state before the trainer's options are read, accelerate would settle on one process.
    if PartialState._shared_state and PartialState().distributed_type == DistributedType.DEEPSPEED:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def part_of(name: str) -> str | None:
    """Which part a parameter belongs to by its name, adapters and wrappers around the model included; None for none."""
    words = name.split(".")
    return next((part for part, module in PARTS.items() if module in words), None)


def trained_parameters(model: nn.Module) -> dict[str | None, list[tuple[str, nn.Parameter]]]:
    """`{part: [(name, parameter)]}` of all that trains; under None what belongs to no part, such as a value head."""
    found: dict[str | None, list[tuple[str, nn.Parameter]]] = {part: [] for part in (*PARTS, None)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[part_of(name)].append((name, parameter))
    return found
