"""Every cut: what is taken out changes shapes, and where it did nothing it changes no answer."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import NANO, REPOSITORY, name_seeded_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minicpmv.compress import vocabulary
from minicpmv.compress.importance import encode, measure_importance, most_different
from minicpmv.compress.refit import fitted
from minicpmv.compress.shapes import CompressionError, measure, shape_of
from minicpmv.compress.surgery import cut, everything, first
from minicpmv.data.load import some_conversations


@pytest.fixture
def model():
    """A random model of nano's size with four layers in either part, and biases in the tower that are not zero."""
    config = small_config(num_hidden_layers=3, max_window_layers=3)
    config.vision_config.num_hidden_layers = 3
    return name_seeded_model(config)


@pytest.fixture(scope="module")
def batches(nano_processor):
    return encode(nano_processor, some_conversations(None, 4), 36)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def cut_to(model, batches, **sizes):
    shape = replace(shape_of(model.config), **sizes)
    return cut(model, measure_importance(model, batches).choose(model.config, shape))


def silence(model, kind):
    """Make some of the model do nothing, elsewhere in each layer; returns the sizes without it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if kind in ("layers", "tower_layers"):
            block = model.llm.model.layers[1] if kind == "layers" else model.vpm.encoder.layers[1]
            outs = (
                [block.self_attn.o_proj, block.mlp.down_proj]
                if kind == "layers"
                else [block.self_attn.out_proj, block.mlp.fc2]
            )
            for out in outs:
                for parameter in out.parameters():
                    parameter.zero_()
            return {kind: 2}
        for number, block in enumerate(
            model.llm.model.layers if kind in ("mlp", "heads") else model.vpm.encoder.layers
        ):
            if kind == "heads":
                block.self_attn.o_proj.weight[:, 128 * (number % 2) : 128 * (number % 2) + 128] = 0
            else:
                out = block.mlp.down_proj if kind == "mlp" else block.mlp.fc2
                width = out.weight.shape[1]
                out.weight[:, torch.randperm(width, generator=generator)[: width // 4]] = 0
    whole = dict(shape_of(model.config))[kind]
    return {kind: 1 if kind == "heads" else whole - whole // 4}


@pytest.mark.parametrize("kind", ["mlp", "heads", "layers", "tower_mlp", "tower_layers"])
def test_what_adds_nothing_is_found_and_its_removal_changes_no_logit(model, batches, kind):
    sizes = silence(model, kind)
    smaller = cut_to(model, batches, **sizes)
    assert dict(shape_of(smaller.config))[kind] == sizes[kind]
    assert measure(smaller).parameters < measure(model).parameters
    for batch in batches:
        torch.testing.assert_close(logits(smaller, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def twins(model, kind):
    """Make every second MLP channel or head a twin of the one before it; returns half of them, twins among them."""
    kept = everything(model.config)
    of_tower = kind == "tower_mlp"
    with torch.no_grad():
        for block in model.vpm.encoder.layers if of_tower else model.llm.model.layers:
            attention, mlp = block.self_attn, block.mlp
            if kind == "heads":
                for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                    part.weight[len(part.weight) // 2 :] = part.weight[: len(part.weight) // 2]
            else:
                for part in (mlp.fc1,) if of_tower else (mlp.gate_proj, mlp.up_proj):
                    for parameter in part.parameters():
                        parameter[1::2] = parameter[::2]
    return replace(kept, **{kind: getattr(kept, kind)[:, : getattr(kept, kind).shape[1] // 2]})


@pytest.mark.parametrize("kind", ["mlp", "heads", "tower_mlp"])
def test_what_stays_takes_over_from_its_twins_that_go(model, batches, kind):
    kept = twins(model, kind)
    plain, smaller = cut(model, kept), cut(model, *fitted(model, kept, batches))
    whole = logits(model, batches[0])
    missed, left = ((logits(cut_one, batches[0]) - whole).norm() for cut_one in (plain, smaller))
    assert left < 0.4 * missed


def test_one_conversation_alone_changes_nothing_since_no_other_says_whether_it_is_to_be_trusted(model, batches):
    _, changed = fitted(model, twins(model, "mlp"), batches[:1])
    weights = model.state_dict()
    assert changed and all(torch.equal(weight, weights[name]) for name, weight in changed.items())


def test_the_model_with_everything_kept_is_the_same_and_the_one_that_was_cut_stays_as_it_was(model, batches):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    same = cut(model, everything(model.config))
    assert torch.equal(logits(same, batches[0]), logits(model, batches[0]))
    cut_to(model, batches, mlp=256, layers=2, tower_heads=2, queries=18)
    assert shape_of(model.config) == shape_of(same.config)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_queries_that_stay_give_the_features_that_they_gave(model, batches):
    shape = replace(shape_of(model.config), queries=10)
    kept = measure_importance(model, batches).choose(model.config, shape)
    visual = {name: batches[0][name] for name in ("pixel_values", "tgt_sizes", "temporal_ids") if name in batches[0]}
    with torch.no_grad():
        whole, some = (each.get_image_features(**visual).pooler_output for each in (model, cut(model, kept)))
    assert some.shape[1] == 10
    torch.testing.assert_close(some, whole[:, kept.queries], rtol=1e-4, atol=1e-5)


def test_queries_are_chosen_to_differ():
    features = torch.eye(3)[[0, 0, 1, 2, 2]] + 1e-3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    chosen = most_different((features @ features.T).double(), 3).tolist()
    assert [place in chosen for place in (0, 1)].count(True) == 1
    assert 2 in chosen
    assert [place in chosen for place in (3, 4)].count(True) == 1


def test_a_narrower_tower_keeps_whole_heads_and_one_set_of_channels(model, batches):
    shape = replace(shape_of(model.config), tower_heads=3)
    kept = measure_importance(model, batches).choose(model.config, shape)
    smaller = cut(model, kept)
    assert smaller.config.vision_config.hidden_size == 48
    channels = kept.tower_channels
    assert torch.equal(
        smaller.vpm.embeddings.patch_embedding.weight, model.vpm.embeddings.patch_embedding.weight[channels]
    )
    rows = (kept.tower_heads[0][:, None] * 16 + torch.arange(16)).flatten()
    before, after = (each.vpm.encoder.layers[0].self_attn.q_proj.weight for each in (model, smaller))
    assert torch.equal(after, before[rows][:, channels])
    assert torch.equal(smaller.resampler.kv_proj.weight, model.resampler.kv_proj.weight[:, channels])
    assert logits(smaller, batches[0]).isfinite().all()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"mlp": 100},
        {"heads": 1, "layers": 1},
        {"tower_heads": 1, "queries": 7},
        {"tower_layers": 2, "tower_mlp": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_counted_before_the_cut_as_they_are_after_it(sizes, tied):
    config = small_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = type(name_seeded_model(config))(config)
    shape = replace(shape_of(config), **sizes)
    smaller = cut(model, first(config, shape))
    assert measure(model, shape) == measure(smaller)
    assert measure(smaller).parameters == sum(parameter.numel() for parameter in smaller.parameters())


def test_the_cost_of_a_token_is_two_for_each_weight_of_a_matrix(model):
    linear = [module for module in model.llm.modules() if isinstance(module, torch.nn.Linear)]
    assert measure(model).flops_per_token == 2 * sum(module.weight.numel() for module in linear)


def test_a_tower_without_its_last_layer_keeps_what_it_has(batches):
    config = small_config(drop_vision_last_layer=True)
    model = name_seeded_model(config)
    smaller = cut_to(model, batches, mlp=256)
    assert smaller.config.vision_config.num_hidden_layers == 1
    assert len(smaller.vpm.encoder.layers) == 1


@pytest.mark.parametrize("sizes", [{"mlp": 513}, {"layers": 0}, {"queries": 99}])
def test_sizes_that_the_model_cannot_have_are_refused_with_their_limit(model, sizes):
    (kind, size), *_ = sizes.items()
    with pytest.raises(CompressionError, match=f"{kind}={size}, but the model has .* choose from 1 to"):
        cut(model, first(model.config, replace(shape_of(model.config), **sizes)))


# ---- vocabulary ----

CORPUS = [
    "What color is the circle?",
    "紅色的圓在哪裡?",
    "The star is red. 12 apples",
    "<think>\nfirst the red one\n</think>",
]


@pytest.fixture(scope="module")
def tokenizers():
    """nano's tokenizer, and the same cut to a corpus: `(old, new, ids that stay)`."""
    contents = json.loads((NANO / "tokenizer.json").read_text())
    old = Tokenizer.from_str(json.dumps(contents))
    used = {number for text in CORPUS for number in old.encode(text, add_special_tokens=False).ids}
    kept = vocabulary.kept_ids(contents, used)
    return old, Tokenizer.from_str(json.dumps(vocabulary.cut_settings(contents, kept))), kept


def test_texts_of_the_corpus_keep_their_tokens(tokenizers):
    old, new, kept = tokenizers
    assert new.get_vocab_size() == len(kept) < old.get_vocab_size()
    for text in CORPUS:
        before, after = (each.encode(text, add_special_tokens=False) for each in (old, new))
        assert after.tokens == before.tokens
        assert [kept[number] for number in after.ids] == before.ids


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_every_other_text_can_still_be_written(tokenizers, text):
    old, new, _ = tokenizers
    ids = [each.encode(text, add_special_tokens=False).ids for each in (old, new)]
    assert new.decode(ids[1], skip_special_tokens=False) == old.decode(ids[0], skip_special_tokens=False)
    assert len(ids[1]) >= len(ids[0])


def test_rows_of_the_weights_go_with_their_tokens(model, batches, tokenizers):
    _, _, kept_ids = tokenizers
    model.generation_config.eos_token_id = [889, 887]
    kept = replace(everything(model.config), vocabulary=torch.tensor(kept_ids))
    smaller = cut(model, kept)
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    batch = {"input_ids": torch.tensor([[number for number in kept_ids[:20] if number != 886]])}
    renumbered = {"input_ids": torch.tensor([[new_ids[int(number)] for number in batch["input_ids"][0]]])}
    torch.testing.assert_close(logits(smaller, renumbered), logits(model, batch)[..., kept_ids])
    assert smaller.config.image_token_id == new_ids[886]
    assert smaller.generation_config.eos_token_id == [new_ids[889], new_ids[887]]
    assert smaller.config.vocab_size == len(kept_ids)


def test_a_token_that_the_configuration_names_is_not_cut(model):
    with pytest.raises(CompressionError, match="image_token_id is 886"):
        cut(model, replace(everything(model.config), vocabulary=torch.arange(500)))


def test_the_published_tokenizer_is_cut_by_the_same_rule(repository):
    contents = json.loads((REPOSITORY / "tokenizer.json").read_text())
    old = Tokenizer.from_str(json.dumps(contents))
    used = {number for text in CORPUS for number in old.encode(text, add_special_tokens=False).ids}
    kept = vocabulary.kept_ids(contents, used)
    new = Tokenizer.from_str(json.dumps(vocabulary.cut_settings(contents, kept)))
    assert 256 < len(kept) < 1000
    for text in CORPUS:
        assert new.encode(text).tokens == old.encode(text).tokens
