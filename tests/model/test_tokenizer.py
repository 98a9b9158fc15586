import json
import shutil
import unicodedata
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import tokenization_auto

from minicpmv import build_tokenizer


FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "tokenizer_cases.json").read_text(encoding="utf-8"))
ADDED_TOKENS = json.loads((FIXTURES / "added_tokens.json").read_text(encoding="utf-8"))

NAMED_TOKENS = {
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "ref_start": "<ref>",
    "ref_end": "</ref>",
    "box_start": "<box>",
    "box_end": "</box>",
    "quad_start": "<quad>",
    "quad_end": "</quad>",
    "point_start": "<point>",
    "point_end": "</point>",
}


def load_auto_without_remote_code(repository):
    if "minicpmv" not in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()):
        pytest.skip("this version of transformers asks for trust_remote_code=True")
    return AutoTokenizer.from_pretrained(repository)


def load_class(repository):
    return get_class_from_dynamic_module(
        "tokenization_minicpmv.MiniCPMVTokenizerFast", str(repository)
    ).from_pretrained(repository)


LOADERS = {
    "class": load_class,
    "auto_with_remote_code": lambda repository: AutoTokenizer.from_pretrained(repository, trust_remote_code=True),
    "auto_without_remote_code": load_auto_without_remote_code,
    "plain_class": PreTrainedTokenizerFast.from_pretrained,
}


@pytest.fixture(scope="module", params=LOADERS)
def any_tokenizer(request, repository):
    return LOADERS[request.param](repository)


def check_named_tokens(tokenizer):
    for name, token in NAMED_TOKENS.items():
        assert getattr(tokenizer, name) == token
        assert getattr(tokenizer, f"{name}_id") == ADDED_TOKENS[token]["id"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (151644, 151645, 128244)


# --- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"])[:30])
def test_golden_text_has_golden_ids_and_decodes_back(any_tokenizer, case):
    assert any_tokenizer(case["text"])["input_ids"] == case["ids"]
    assert any_tokenizer.decode(case["ids"]) == case["decoded"]


def test_every_added_token_keeps_its_id_and_flag(any_tokenizer):
    found = any_tokenizer.added_tokens_decoder
    assert {token.content: {"id": i, "special": token.special} for i, token in found.items()} == ADDED_TOKENS
    for content, fields in ADDED_TOKENS.items():
        ids = any_tokenizer.encode(f"a{content} b")
        assert ids[1:-1] == [fields["id"]]
        assert any_tokenizer.decode(ids) == f"a{content} b"
        assert any_tokenizer.decode(ids, skip_special_tokens=True) == ("a b" if fields["special"] else f"a{content} b")
    assert len(any_tokenizer) == 151748


def test_settings_of_the_published_tokenizer(any_tokenizer):
    assert any_tokenizer.bos_token == "<|im_start|>"
    assert any_tokenizer.eos_token == "<|im_end|>"
    assert any_tokenizer.pad_token == "<|endoftext|>"
    assert any_tokenizer.unk_token == "<unk>"
    assert any_tokenizer.pad_token_id == 151643
    assert any_tokenizer.model_max_length == 131072
    assert any_tokenizer.decode(any_tokenizer.encode("a , b .")) == "a , b ."


def test_named_attributes(any_tokenizer):
    check_named_tokens(any_tokenizer)


def test_auto_class_takes_the_class_of_the_repository(tokenizer):
    if Version("5.0") < Version(transformers.__version__) < Version("5.23"):
        pytest.skip("some of these versions take their own class for every minicpmv tokenizer")
    assert type(tokenizer).__name__ == "MiniCPMVTokenizerFast"


def test_attributes_that_need_the_class(repository):
    tokenizer = load_class(repository)
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<unk>", 128244)
    assert tokenizer.newline_id == 198 == tokenizer.encode("\n")[0]


def test_class_and_config_name_the_same_tokens(repository, tokenizer):
    config = json.loads((repository / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = config["extra_special_tokens"]
    assert NAMED_TOKENS.items() <= named.items()
    assert {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()} == {
        name: getattr(tokenizer, f"{name}_id") for name in named
    }


def test_no_token_can_stand_for_padding_by_accident(tokenizer):
    assert tokenizer.decode([0]) == "!"
    batch = tokenizer(["!", "a b c"], padding=True)
    assert batch["input_ids"][0] == [0, 151643, 151643]
    assert batch["attention_mask"][0] == [1, 0, 0]


# Characters that Python's own Unicode tables know; composition of these never changes.
TEXT = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=40)


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=TEXT)
def test_any_text_decodes_back_in_nfc(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


# --- save and load -----------------------------------------------------------------------------------------------------


def test_save_and_load_keeps_everything(repository, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(repository / "config.json", tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == type(tokenizer).__name__
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for loaded in (again, plain):
        check_named_tokens(loaded)
        assert [loaded.encode(case["text"]) for case in CASES] == [case["ids"] for case in CASES]


def small_folder(repository, folder, leave_out=()):
    """A model folder whose vocabulary is the 256 bytes and the added tokens, numbered from 256 on."""
    config = json.loads((repository / "tokenizer_config.json").read_text(encoding="utf-8"))
    fields = [f for f in config["added_tokens_decoder"].values() if f["content"] not in leave_out]
    config["added_tokens_decoder"] = {str(256 + n): f for n, f in enumerate(fields)}
    config["extra_special_tokens"] = {
        name: token for name, token in config["extra_special_tokens"].items() if token not in leave_out
    }
    vocabulary = {character: n for n, character in enumerate(build_tokenizer.byte_alphabet().values())}
    build_tokenizer.backend(vocabulary, [], config).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenization_minicpmv.py", "compat_minicpmv.py", "chat_template.jinja", "config.json"):
        shutil.copy(repository / name, folder)
    return folder


def test_small_vocabulary_has_its_own_ids(repository, tmp_path):
    small = load_class(small_folder(repository, tmp_path))
    assert len(small) == 256 + len(ADDED_TOKENS)
    assert small.unk_id == small.image_token_id == 256
    for name, token in NAMED_TOKENS.items():
        assert getattr(small, f"{name}_id") == small.encode(token)[0] == small.get_vocab()[token]
    assert small.decode(small.newline_id) == "\n"
    assert small.decode(small.encode("naïve <image>")) == "naïve <image>"


def test_vocabulary_without_a_control_token_is_an_error_not_unk(repository, tmp_path):
    small = load_class(small_folder(repository, tmp_path, leave_out=["<slice>"]))
    with pytest.raises(ValueError, match="no token '<slice>'"):
        _ = small.slice_start_id


def test_a_folder_without_vocabulary_is_an_error_that_names_the_remedy(repository, tmp_path):
    names = ("config.json", "tokenizer_config.json", "configuration_minicpmv.py", "compat_minicpmv.py")
    for name in (*names, "tokenization_minicpmv.py"):
        shutil.copy(repository / name, tmp_path)
    # Older versions fail on their own, earlier or later, and some 5.x versions before the class of the folder is asked.
    own_message = Version(transformers.__version__) >= Version("5.23")
    with pytest.raises(ValueError if own_message else (ValueError, ImportError)) as error:
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert "build-tokenizer" in str(error.value) or not own_message
