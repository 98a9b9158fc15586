"""`minicpmv fetch` on tiny checkpoints, with a stand-in for the Hub."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import httpx
import pytest
import torch
from filelock import FileLock
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

from minicpmv import fetch as fetch_module
from minicpmv.fetch import (
    INDEX,
    RECORD,
    STAGING,
    DamagedFilesError,
    FetchError,
    TensorMismatchError,
    check_checkpoint,
    fetch,
    published_shapes,
)


SHAPES = {"llm.model.embed_tokens.weight": [6, 4], "resampler.query": [2, 4], "vpm.post_layernorm.bias": [4]}
PARAMETERS = 24 + 8 + 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_checkpoint(folder, shapes=SHAPES):
    """Two shards and their index, named as the Hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(shapes)
    shards = {
        "model-00001-of-00002.safetensors": names[:1],
        "model-00002-of-00002.safetensors": names[1:],
    }
    for file, members in shards.items():
        save_file({name: torch.zeros(shapes[name], dtype=torch.bfloat16) for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def digests_in(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "my model.v1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository `hub.source`; `hub.calls` lists the downloads, `hub.stop_after` cuts one off after some files."""
    hub = SimpleNamespace(
        source=write_checkpoint(tmp_path / "hub"), calls=[], downloaded=[], stop_after=None, missing=None
    )
    hub.digests = digests_in(hub.source)

    def model_info(self, repo, *, revision, files_metadata):
        if hub.missing:
            raise hub.missing
        files = [
            SimpleNamespace(
                rfilename=file.name,
                lfs=SimpleNamespace(sha256=hub.digests[file.name]) if file.name in hub.digests else None,
            )
            for file in hub.source.iterdir()
        ]
        return SimpleNamespace(sha=COMMIT if revision is None else revision, siblings=files)

    def snapshot_download(repo, *, revision, local_dir, allow_patterns):
        hub.calls.append((repo, revision, allow_patterns))
        for count, file in enumerate(sorted(hub.source.iterdir())):
            if count == hub.stop_after:
                raise LocalEntryNotFoundError("connection lost\nsecond line")
            if not (local_dir / file.name).exists():
                shutil.copy(file, local_dir / file.name)
                hub.downloaded.append(file.name)

    monkeypatch.setattr(fetch_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(fetch_module.HfApi, "model_info", model_info)
    return hub


def weights_in(folder):
    return sorted(
        file.name for file in folder.iterdir() if file.name not in ("config.json", RECORD, f"{STAGING}.lock")
    )


def test_the_published_list_is_the_8_7_billion_parameter_checkpoint():
    shapes = published_shapes()
    assert len(shapes) == 849
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_695_895_280
    assert {name.split(".")[0] for name in shapes} == {"llm", "vpm", "resampler"}


def test_fetch_puts_shards_and_index_beside_config_and_leaves_nothing_else(model_folder, hub):
    assert fetch(model_folder, revision="abc123", expected=SHAPES).parameters == PARAMETERS
    assert weights_in(model_folder) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]
    assert check_checkpoint(model_folder, SHAPES).parameters == PARAMETERS


def test_fetch_asks_for_safetensors_only(model_folder, hub):
    fetch(model_folder, revision="abc123", expected=SHAPES)
    (repo, revision, patterns) = hub.calls[0]
    assert (repo, revision) == ("openbmb/MiniCPM-V-4_5", "abc123")
    assert patterns == ["*.safetensors", "model.safetensors.index.json"]


def test_fetch_of_a_complete_folder_downloads_nothing(model_folder, hub):
    write_checkpoint(model_folder)
    assert fetch(model_folder, expected=SHAPES).parameters == PARAMETERS
    assert hub.calls == []


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(model_folder, hub):
    hub.stop_after = 1
    with pytest.raises(FetchError, match=r"stopped \(connection lost\).*run the same command again"):
        fetch(model_folder, expected=SHAPES)
    assert weights_in(model_folder) == [".minicpmv-fetch"]
    first = list(hub.downloaded)

    hub.stop_after = None
    fetch(model_folder, expected=SHAPES)
    assert first and len(hub.downloaded) == len(set(hub.downloaded)) == 3
    assert ".minicpmv-fetch" not in weights_in(model_folder)


def test_an_interrupted_move_is_finished_by_the_next_run(model_folder, hub, monkeypatch):
    def link_nothing_but_the_first(source, target):
        if "00002" in target.name:
            raise KeyboardInterrupt
        shutil.copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch_module.os, "link", link_nothing_but_the_first)
        fetch(model_folder, expected=SHAPES)
    assert INDEX not in weights_in(model_folder)

    fetch(model_folder, expected=SHAPES)
    assert check_checkpoint(model_folder, SHAPES).parameters == PARAMETERS
    assert len(hub.downloaded) == 3


def test_files_are_moved_where_the_disk_knows_no_hard_links(model_folder, hub, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(fetch_module.os, "link", refuse)
    assert fetch(model_folder, expected=SHAPES).parameters == PARAMETERS
    assert check_checkpoint(model_folder, SHAPES).parameters == PARAMETERS


def test_wrong_missing_and_unexpected_tensors_are_named_and_nothing_is_attached(model_folder, hub):
    other = {**SHAPES, "resampler.query": [3, 4], "audio.weight": [1]}
    del other["vpm.post_layernorm.bias"]
    hub.source = write_checkpoint(hub.source.with_name("other"), other)

    with pytest.raises(TensorMismatchError) as caught:
        fetch(model_folder, repo="someone/else", expected=SHAPES)
    assert caught.value.missing == ["vpm.post_layernorm.bias"]
    assert caught.value.unexpected == ["audio.weight"]
    assert caught.value.wrong_shape == {"resampler.query": ([3, 4], [2, 4])}
    assert "resampler.query is [3, 4], not [2, 4]" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(model_folder.glob("*.safetensors"))


def test_a_file_that_was_cut_off_is_named_and_downloaded_anew(model_folder, hub):
    shard = hub.source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(DamagedFilesError, match="model-00002-of-00002.safetensors") as caught:
        fetch(model_folder, expected=SHAPES)
    assert caught.value.files == [shard.name]

    shard.write_bytes(whole)
    assert fetch(model_folder, expected=SHAPES).parameters == PARAMETERS
    assert hub.downloaded.count("model-00001-of-00002.safetensors") == 1


def test_check_names_absent_shards(model_folder):
    write_checkpoint(model_folder)
    (model_folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DamagedFilesError, match="missing files: model-00001"):
        check_checkpoint(model_folder, SHAPES)


def test_check_accepts_a_checkpoint_of_one_file(tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path, SHAPES).parameters == PARAMETERS


def test_a_flipped_bit_is_found_while_fetching_and_by_a_later_check(model_folder, hub):
    shard = hub.source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFilesError, match=f"not the bytes of openbmb/MiniCPM-V-4_5 at {COMMIT}: {shard.name}"):
        fetch(model_folder, expected=SHAPES)
    assert not list(model_folder.glob("*.safetensors"))

    shard.write_bytes(whole)
    assert fetch(model_folder, expected=SHAPES).source.commit == COMMIT
    assert check_checkpoint(model_folder, SHAPES).source.sha256 == hub.digests
    attached = model_folder / shard.name
    attached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFilesError, match=shard.name):
        check_checkpoint(model_folder, SHAPES)
    fetch(model_folder, expected=SHAPES)
    assert attached.read_bytes() == whole


def test_the_commit_that_a_branch_led_to_is_downloaded_and_recorded(model_folder, hub):
    fetch(model_folder, expected=SHAPES)
    assert [revision for _, revision, _ in hub.calls] == [COMMIT]
    assert json.loads((model_folder / RECORD).read_text())["commit"] == COMMIT


def test_weights_that_came_another_way_are_checked_by_names_and_shapes_alone(model_folder):
    write_checkpoint(model_folder)
    assert check_checkpoint(model_folder, SHAPES).source is None


def test_a_file_without_a_digest_on_the_hub_is_refused(model_folder, hub):
    hub.digests.clear()
    with pytest.raises(FetchError, match="names no digest of model-00001"):
        fetch(model_folder, expected=SHAPES)


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", '{"repository": "a"}', '{"repository": 1, "commit": "b", "sha256": {}}']
)
def test_a_record_that_is_broken_is_named(model_folder, content):
    write_checkpoint(model_folder)
    (model_folder / RECORD).write_text(content)
    with pytest.raises(DamagedFilesError, match=RECORD):
        check_checkpoint(model_folder, SHAPES)


def test_of_two_fetches_at_once_the_second_is_refused(model_folder, hub):
    with (
        FileLock(model_folder / f"{STAGING}.lock"),
        pytest.raises(FetchError, match="another minicpmv fetch is at work"),
    ):
        fetch(model_folder, expected=SHAPES)
    assert hub.calls == []


@pytest.mark.parametrize("error", [RepositoryNotFoundError, RevisionNotFoundError])
def test_what_the_hub_does_not_have_is_named(model_folder, hub, error):
    hub.missing = error("not found", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))
    with pytest.raises(FetchError, match="no revision 'v9'|no repository 'openbmb/MiniCPM-V-4_5'"):
        fetch(model_folder, revision="v9", expected=SHAPES)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        "null",
        "7",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "a\\u0000.safetensors"}}',
        '{"weight_map": {"a": "../../a.safetensors"}}',
        json.dumps({"weight_map": {"a": "a" * 300 + ".safetensors"}}),
        "[" * 100_000,
    ],
)
def test_check_refuses_an_index_that_is_broken_or_points_elsewhere(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DamagedFilesError, match="index"):
        check_checkpoint(tmp_path, SHAPES)


def test_check_refuses_a_tensor_that_is_not_in_the_file_the_index_names(model_folder):
    write_checkpoint(model_folder)
    index = json.loads((model_folder / INDEX).read_text())
    index["weight_map"]["resampler.query"] = "model-00001-of-00002.safetensors"
    (model_folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedFilesError, match="index puts there"):
        check_checkpoint(model_folder, SHAPES)


def test_fetch_needs_the_folder_of_the_repository(tmp_path, hub):
    with pytest.raises(FetchError, match="has no config.json"):
        fetch(tmp_path, expected=SHAPES)
    assert hub.calls == []


def test_fetch_refuses_a_folder_with_weights_of_its_own(model_folder, hub):
    save_file({"a": torch.zeros(1)}, model_folder / "model.safetensors")
    with pytest.raises(FetchError, match="holds other weights: model.safetensors"):
        fetch(model_folder, expected=SHAPES)
    assert hub.calls == []


def test_fetch_says_how_much_disk_is_missing_before_it_starts(model_folder, hub, monkeypatch):
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(FetchError, match=r"need another 17\.4 GB .* has 2\.0 GB free"):
        fetch(model_folder)
    assert hub.calls == []


def test_fetch_without_a_network_says_so(model_folder, monkeypatch):
    """The Hub's own client, kept offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        fetch(model_folder, expected=SHAPES)
