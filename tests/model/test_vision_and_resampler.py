"""The tower and the resampler: positions, packing, attention kernels."""

import copy
import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import FIXTURES, name_seeded_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode


SIZES = [(7, 5), (7, 5), (3, 11), (1, 1), (6, 6), (1, 75)]


def modules_of(model):
    """The modules that the model's remote code was loaded into."""
    import sys

    package = type(model).__module__.rsplit(".", 1)[0]
    return tuple(sys.modules[f"{package}.{name}"] for name in ("vision_minicpmv", "resampler"))


def random_slices(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 14, 14 * rows * columns, generator=generator) for rows, columns in sizes]


@pytest.mark.parametrize(
    "case", json.loads((FIXTURES / "position_ids.json").read_text()), ids=lambda c: str(c["grid"])
)
def test_position_ids_equal_the_published_ones(case, golden_model):
    vision, _ = modules_of(golden_model)
    ids = vision.position_ids([tuple(case["grid"])], 70).reshape(case["grid"])
    np.testing.assert_array_equal(ids, np.add.outer(np.array(case["rows"]) * 70, case["cols"]))


def test_resampler_positions_equal_the_published_tables(golden_model):
    _, resampler = modules_of(golden_model)
    tables = np.load(FIXTURES / "pos_embed.npz")
    grid = resampler.Resampler(1, 256, 2, 8).positions([(70, 70)], [-1], "cpu").view(70, 70, 256)
    np.testing.assert_allclose(grid[::7, ::9, ::5], tables["pos_2d"], atol=1e-5)
    # The tables were made with float32 powers, whose last bit depends on the CPU: a time multiplies that error.
    times = np.array([0, 1, 2, 5, 9, 100, 999, 7200, 71999])
    differences = np.abs(resampler.sincos_positions(times, 256)[:, ::5] - tables["temporal"]).max(axis=1)
    assert (differences <= 1e-6 + 2**-23 * times).all()


def test_grids_and_times_beyond_the_published_tables_work(golden_model):
    with torch.no_grad():
        outputs = golden_model.get_image_features([random_slices([(4, 227)])], [[(4, 227)]], [[[500_000]]])
    assert outputs.pooler_output.shape == (1, 64, 256) and outputs.pooler_output.isfinite().all()


def test_packed_slices_equal_slices_one_by_one(golden_model):
    slices = random_slices(SIZES)
    with torch.no_grad():
        together = golden_model.get_image_features([slices], [SIZES]).pooler_output
        alone = [
            golden_model.get_image_features([[s]], [[size]]).pooler_output
            for s, size in zip(slices, SIZES, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def rebuilt(value):
    """A value as hooks that move tensors rebuild it: tuples of any kind as plain ones, dataclasses by their fields."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value):
        values = {field.name: rebuilt(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **values)
    if isinstance(value, dict):
        return {name: rebuilt(item) for name, item in value.items()}
    return tuple(map(rebuilt, value)) if isinstance(value, tuple) else value


def test_the_tower_bears_hooks_that_rebuild_its_inputs(golden_model):
    slices, sizes = random_slices([(2, 3), (2, 3), (4, 2)]), [[(2, 3), (2, 3), (4, 2)]]
    with torch.no_grad():
        expected = golden_model.get_image_features([slices], sizes).pooler_output
        hooks = [
            module.register_forward_pre_hook(lambda module, args, kwargs: rebuilt((args, kwargs)), with_kwargs=True)
            for module in golden_model.vpm.modules()
        ]
        try:
            assert torch.equal(golden_model.get_image_features([slices], sizes).pooler_output, expected)
        finally:
            for hook in hooks:
                hook.remove()


def test_sdpa_equals_eager(golden_model, eager_golden_model):
    slices = random_slices(SIZES)
    with torch.no_grad():
        ours = golden_model.get_image_features([slices], [SIZES]).pooler_output
        reference = eager_golden_model.get_image_features([slices], [SIZES]).pooler_output
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_variable_length_kernels_get_the_bounds_of_the_slices(golden_model):
    """Flash attention needs a GPU; a stand-in with its interface checks what it would be handed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def variable_length(
        module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **kwargs
    ):
        assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert cu_seq_lens_q.dtype == torch.int32 and max_length_q == max(rows * columns for rows, columns in SIZES)
        lengths = cu_seq_lens_q.diff().tolist()
        parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        outputs = [torch.nn.functional.scaled_dot_product_attention(*part, scale=kwargs["scaling"]) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    slices = random_slices(SIZES)
    with torch.no_grad():
        expected = golden_model.get_image_features([slices], [SIZES]).pooler_output
        ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", variable_length)
        golden_model.vpm.config._attn_implementation = "flash_stand_in"
        try:
            packed = golden_model.get_image_features([slices], [SIZES]).pooler_output
        finally:
            golden_model.vpm.config._attn_implementation = "sdpa"
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)


def test_one_kernel_for_the_tower_and_another_for_the_language_model():
    model = name_seeded_model(small_config(), {"": "sdpa", "vision_config": "eager"})
    assert (model.llm.config._attn_implementation, model.vpm.config._attn_implementation) == ("sdpa", "eager")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.vpm.config._attn_implementation == "eager"


def test_vision_batch_size_changes_nothing_but_memory(golden_model):
    slices, units = random_slices([(5, 4)] * 7), [[[0, 1, 2], [3, 4, 5], [6]]]
    sizes = [[(5, 4)] * 7]
    with torch.no_grad():
        at_once = golden_model.get_image_features([slices], sizes, units).pooler_output
        golden_model.config.vision_batch_size = 2
        try:
            in_parts = golden_model.get_image_features([slices], sizes, units).pooler_output
        finally:
            golden_model.config.vision_batch_size = 16
    torch.testing.assert_close(at_once, in_parts, atol=1e-5, rtol=0)


def test_attentions_and_hidden_states_on_request(eager_golden_model):
    sizes = [(3, 4), (2, 2), (2, 2)]
    with torch.no_grad():
        outputs = eager_golden_model.get_image_features(
            [random_slices(sizes)], [sizes], output_attentions=True, output_hidden_states=True
        )
    assert [weights.shape for weights in outputs.attentions[0]] == [(4, 12, 12), (4, 4, 4), (4, 4, 4)]
    assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
    assert outputs.last_hidden_state.shape == (20, 64)
    torch.testing.assert_close(outputs.attentions[1][0].sum(-1), torch.ones(4, 12))


def test_attentions_of_a_kernel_without_them_are_refused(golden_model):
    with pytest.raises(ValueError, match="eager"):
        golden_model.get_image_features([random_slices([(2, 2)])], [[(2, 2)]], output_attentions=True)


def test_gradient_checkpointing_gives_the_same_gradients(golden_model):
    model = copy.deepcopy(golden_model).train()
    slices, sizes = random_slices([(3, 4), (2, 2)]), [(3, 4), (2, 2)]

    def gradients():
        model.zero_grad()
        model.get_image_features([slices], [sizes]).pooler_output.square().sum().backward()
        return model.vpm.encoder.layers[0].mlp.fc1.weight.grad.clone()

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.data())
def test_padded_tensor_and_nested_lists_give_the_same_features(golden_model, sizes, data):
    frames = [data.draw(st.integers(-1, 50)) for _ in sizes]
    slices = random_slices(sizes)
    width = max(pixels.shape[-1] for pixels in slices) + 28
    padded = torch.zeros(1, len(slices) + 1, 3, 14, width)  # one place more than there are slices
    for place, pixels in enumerate(slices):
        padded[0, place, :, :, : pixels.shape[-1]] = pixels
    padded_sizes = torch.tensor([[*sizes, (0, 0)]])
    padded_ids = torch.tensor([[[frame, -2] for frame in frames] + [[-2, -2]]])
    with torch.no_grad():
        nested = golden_model.get_image_features([slices], [sizes], [[[frame] for frame in frames]])
        tensor = golden_model.get_image_features(padded, padded_sizes, padded_ids)
    torch.testing.assert_close(nested.pooler_output, tensor.pooler_output, atol=1e-5, rtol=0)


def test_contradicting_visual_inputs_are_named(golden_model):
    slices = random_slices([(2, 2), (2, 3)])
    with pytest.raises(ValueError, match="2 slices, but tgt_sizes 1"):
        golden_model.get_image_features([slices], [[(2, 2)]])
    with pytest.raises(ValueError, match="Slice 1 is 84 pixels long.*need 56"):
        golden_model.get_image_features([slices], [[(2, 2), (2, 2)]])
    with pytest.raises(ValueError, match="name 3 frames, but pixel_values hold 2"):
        golden_model.get_image_features([slices], [[(2, 2), (2, 3)]], [[[0, 1], [2]]])


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor made outside the meta device."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return output


def test_construction_computes_nothing_large(repository):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    tracemalloc.start()
    with torch.device("meta"), LargestTensor() as largest:
        model = AutoModel.from_config(config, trust_remote_code=True)
    numpy_only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    arrays = tracemalloc.take_snapshot().filter_traces([numpy_only]).traces
    tracemalloc.stop()
    assert largest.bytes < 1_000_000
    assert sum(trace.size for trace in arrays) < 1_000_000
    assert sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()) < 1_000_000
