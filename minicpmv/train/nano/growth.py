"""More layers for a trained model that answers as before: depth to learn with, without losing what was learned.

What is special:
- a new layer is a copy of the one before it whose output projections are zero, so it adds nothing to the residual stream
  until it has learned to. Widening has no such start: norms and tied embeddings see the new width at once.
"""

import copy
import re

import torch
from transformers import AutoModel, PreTrainedModel

from minicpmv.train.common.errors import ArgumentsError


STACKS = {"llm.model.layers": "llm", "vpm.encoder.layers": "tower"}
LAYER = re.compile(rf"({'|'.join(map(re.escape, STACKS))})\.(\d+)\.(.*)")
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj", "self_attn.out_proj", "mlp.fc2")


def sources(old: int, new: int) -> list[int]:
    """Which of `old` layers each of `new` ones comes from; all but the first with one source are copies."""
    return [i * old // new for i in range(new)]


def layer_counts(model: PreTrainedModel) -> dict[str, int]:
    return {"llm": model.config.num_hidden_layers, "tower": model.config.vision_config.num_hidden_layers}


@torch.no_grad()
def deepened(model: PreTrainedModel, layers: dict[str, int], **options) -> PreTrainedModel:
    """A model with so many `layers` of "llm" and "tower" (those not named stay) that computes what `model` does.

    Args:
        options: of `AutoModel.from_config`.

    Raises:
        ArgumentsError: there is no such stack, or the model has more layers than that.
    """
    counts = layer_counts(model)
    for name, count in layers.items():
        if name not in counts or count < counts[name]:
            raise ArgumentsError(f"layers: {name}: {count} is not possible; the model has {counts}, and may only grow")
    wanted = counts | layers
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = config.max_window_layers = wanted["llm"]
    config.layer_types = ["full_attention"] * wanted["llm"]
    config.vision_config.num_hidden_layers = wanted["tower"]
    grown = AutoModel.from_config(config, **options)
    state = {}
    for key, weight in model.state_dict().items():
        if (found := LAYER.fullmatch(key)) is None:
            state[key] = weight
            continue
        stack, number, rest = found.groups()
        name = STACKS[stack]
        places = [i for i, source in enumerate(sources(counts[name], wanted[name])) if source == int(number)]
        for place in places:
            is_silent = place != places[0] and rest.startswith(OUTPUTS)
            state[f"{stack}.{place}.{rest}"] = torch.zeros_like(weight) if is_silent else weight.clone()
    grown.load_state_dict(state)
    return grown
