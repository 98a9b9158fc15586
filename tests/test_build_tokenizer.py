import json
import shutil
import sys
from importlib import metadata

import pytest

from minicpmv import build_tokenizer
from minicpmv.build_tokenizer import VocabularyError


@pytest.fixture(scope="module")
def built(repository):
    return json.loads((repository / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def config(repository):
    return json.loads((repository / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_vocabulary_and_merges_follow_from_the_ranks():
    before = set(sys.modules)
    try:
        ranks = build_tokenizer.read_ranks()
    except VocabularyError as error:
        pytest.skip(str(error))
    assert not any(name.split(".")[0] == "dashscope" for name in set(sys.modules) - before)
    vocabulary, merges = build_tokenizer.recover_vocabulary(ranks)
    assert (len(vocabulary), len(merges)) == (151643, 151387)
    assert build_tokenizer.fingerprint(vocabulary, merges) == build_tokenizer.VOCABULARY_SHA256


def test_merge_is_the_last_step_of_encoding_with_lower_ranks():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert build_tokenizer.recover_merge(b"abc", ranks) == (b"a", b"bc")
    with pytest.raises(VocabularyError, match="no merge of two tokens"):
        build_tokenizer.recover_merge(b"cba", {**ranks, b"cba": 6})


def test_building_again_leaves_the_file_alone(repository):
    before = (repository / "tokenizer.json").stat()
    path, written = build_tokenizer.build(repository)
    assert not written
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": '])
def test_broken_file_is_not_current(config, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert not build_tokenizer.is_current(path, config)


def test_check_names_what_differs(built, config):
    changed = json.loads(json.dumps(config))
    changed["added_tokens_decoder"]["151669"]["special"] = False
    with pytest.raises(VocabularyError, match=r"ids \[151669\]"):
        build_tokenizer.check(built, changed)
    merges = built["model"]["merges"]
    swapped = {**built, "model": {**built["model"], "merges": [merges[1], merges[0], *merges[2:]]}}
    with pytest.raises(VocabularyError, match="151643 tokens and 151387 merges with sha256"):
        build_tokenizer.check(swapped, config)


def test_changed_vocabulary_file_is_refused(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_text("IQ== 0\n", encoding="utf-8")
    with pytest.raises(VocabularyError, match="sha256 .*, not b2b1b8df"):
        build_tokenizer.read_ranks(path)


def test_missing_vocabulary_file_names_both_remedies(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_installed)
    with pytest.raises(VocabularyError, match="pip install dashscope.*--from-hub"):
        build_tokenizer.read_ranks()


def test_folder_without_configuration_is_an_error(tmp_path):
    with pytest.raises(VocabularyError, match="tokenizer_config.json was not found"):
        build_tokenizer.build(tmp_path)


def test_from_hub_takes_the_published_files_and_checks_them(repository, built, config, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    hub.mkdir()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in built["model"]["merges"]]
    (hub / "vocab.json").write_text(json.dumps(built["model"]["vocab"]), encoding="utf-8")
    (hub / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    asked = []

    def hf_hub_download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(hub / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(repository / "tokenizer_config.json", folder)
    build_tokenizer.build(folder, hub=True, revision="abc")
    assert asked == [("openbmb/MiniCPM-V-4_5", name, "abc") for name in ("vocab.json", "merges.txt")]
    assert build_tokenizer.is_current(folder / "tokenizer.json", config)

    (folder / "tokenizer.json").unlink()
    (hub / "merges.txt").write_text("\n".join([merges[1], merges[0], *merges[2:]]), encoding="utf-8")
    with pytest.raises(VocabularyError, match="merges with sha256"):
        build_tokenizer.build(folder, hub=True)
    assert [path.name for path in folder.iterdir()] == ["tokenizer_config.json"]
