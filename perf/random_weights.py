"""Models with random weights, made where they run: for what a model costs, its shapes are enough."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig


KINDS = ("bf16", "nf4", "int4")  # of the language model's layers; everything else is whole
WHOLE = ["vpm", "resampler", "lm_head"]


def build(folder: Path, kind: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The model of a folder's configuration in `dtype`, or with its language model in a kind of `KINDS`; with so many
    layers of language model and tower each, if given."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if layers is not None:
        fields = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
        fields |= {"num_hidden_layers": layers, "max_window_layers": layers}
        fields["vision_config"] |= {"num_hidden_layers": layers}
        config = type(config)(**fields)
    with device:  # buffers too, which a model made without storage would lack
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=dtype).eval()
    if kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=WHOLE,
        )
        kept = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
        options = {"state_dict": kept, "quantization_config": settings, "device_map": {"": device}}
        model = type(model).from_pretrained(None, config=config, dtype=dtype, **options).eval()
    elif kind == "int4":
        from torchao.quantization import quantize_

        quantize_(model.llm.model.layers, int4_settings(device))
    return model


def int4_settings(device: torch.device) -> Any:
    """torchao's 4-bit integers in the layout of torch's own kernel for GPUs; elsewhere, where it has none, 8-bit ones."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    if device.type != "cuda":
        return Int8WeightOnlyConfig(version=2)
    layout = Int4PackingFormat.TILE_PACKED_TO_4D
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format=layout, set_inductor_config=False)


def bytes_read(*modules: nn.Module) -> int:
    """Bytes of the weights of modules as they lie in memory, with the scales of quantized ones."""
    storages = {part.data_ptr(): part.nbytes for module in modules for p in module.parameters() for part in _parts(p)}
    return sum(storages.values())


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight consists of."""
    if hasattr(weight, "quant_state"):  # of bitsandbytes, whose scales may be quantized in turn
        yield weight.data
        state = weight.quant_state
        while state is not None:
            yield state.absmax
            state = getattr(state, "state2", None)
    elif hasattr(weight, "__tensor_flatten__") and type(weight) is not nn.Parameter:
        for name in weight.__tensor_flatten__()[0]:
            yield getattr(weight, name)
    else:
        yield weight.data
