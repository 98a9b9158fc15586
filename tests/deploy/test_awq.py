"""nano as the authors publish the AWQ of MiniCPM-V 4.5: the same configuration and layout, answered by the library that
transformers asks for. Where gptqmodel is not installed, `make deploy-slow` runs it."""

import json

import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY
from safetensors.torch import save_file

from minicpmv.checkpoint import load
from minicpmv.deploy.quantize import linear_layers
from minicpmv.deploy.source import Checkpoint


pytest.importorskip("gptqmodel", reason="make deploy-slow runs it in an environment of its own")

ASSETS = REPOSITORY / "assets"
GROUP = 128
# As AutoAWQ, which made the published one, writes it: no list of what stays whole.
CONFIG = {
    "bits": 4,
    "group_size": GROUP,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight outputs in an integer of 32 bits


def packed(values):
    """Integers of 4 bits [rows, out] -> int32 [rows, out / 8]."""
    eights = values.long().unflatten(1, (-1, 8))[..., ORDER]  # [rows, out / 8, 8]
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def rounded(weight):
    """A weight [out, in] -> what AWQ stores for it, and the weight that this stands for."""
    groups = weight.float().T.unflatten(0, (-1, GROUP))  # [groups, G, out]
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    integers = (groups / scales + zeros).round().clamp(0, 15)
    whole = ((integers - zeros) * scales).flatten(0, 1).T
    parts = {"qweight": packed(integers.flatten(0, 1)), "qzeros": packed(zeros[:, 0]), "scales": scales[:, 0].half()}
    return parts, whole


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """nano in AWQ, and with the weights that its integers stand for."""
    checkpoint = Checkpoint(NANO)
    layers = linear_layers(checkpoint, [])
    integers, whole = {}, {}
    for name in checkpoint.files:
        tensor, layer = checkpoint.stored(name), name.removesuffix(".weight")
        if layer in layers:
            parts, tensor = rounded(tensor)
            integers |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            integers[name] = tensor
        whole[name] = tensor.contiguous()
    found = []
    for name, tensors, config in (
        ("awq", integers, checkpoint.config | {"quantization_config": CONFIG}),
        ("whole", whole, checkpoint.config),
    ):
        folder = tmp_path_factory.mktemp(name)
        checkpoint.copy_small_files(folder)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        found.append(folder)
    return found


def answers(folder):
    model, processor = load(folder, dtype=torch.float32)
    clip = {"fps": 3, "max_num_packing": 6, "force_packing": 6}
    asked = (
        (["number.jpg", "What does it say?"], {}),
        (["shapes.jpg", "What color is the circle?"], {}),
        (["coffee.jpg", "What is in the image?"], {}),
        (["star.mp4", "Which way does the shape move?"], clip),
    )
    kinds = {
        type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj") and "llm" in name
    }
    towers = {type(module) for name, module in model.vpm.named_modules() if name.endswith("_proj")}
    return (
        kinds,
        towers,
        [
            model.chat(
                msgs=[{"role": "user", "content": [ASSETS / name, question]}],
                processor=processor,
                max_new_tokens=24,
                **GREEDY | options,
            )
            for (name, question), options in asked
        ],
    )


def test_the_published_awq_recipe_answers_as_the_weights_that_its_integers_stand_for(folders):
    kinds, towers, found = answers(folders[0])
    whole_kinds, _, expected = answers(folders[1])
    assert towers == {torch.nn.Linear} and whole_kinds == {"Linear"} and "Linear" not in kinds
    assert found == expected
