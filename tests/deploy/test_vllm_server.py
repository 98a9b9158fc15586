"""What of vLLM's server can be tested without vLLM: the options it is started with, and what is refused before. The rest: `make engines`."""

import importlib
import importlib.metadata
import json
import os
import sys
import types

import pytest
from conftest import NANO, REPOSITORY

from minicpmv.deploy.vllm import server
from minicpmv.deploy.vllm.server import EngineError, arguments, command, serve


def option(words, name):
    return words[words.index(name) + 1]


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM whose command line writes down what it is called with."""
    called = []
    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    main = types.ModuleType("vllm.entrypoints.cli.main")
    main.main = lambda: called.append(list(sys.argv))
    monkeypatch.setitem(sys.modules, main.__name__, main)
    monkeypatch.setattr(server, "check_engine", lambda: None)
    monkeypatch.setattr(sys, "argv", ["minicpmv"])
    for name in server.environment():
        monkeypatch.setenv(name, "")
    return called


def test_the_plugin_is_declared_where_vllm_looks_for_it():
    declared = importlib.metadata.entry_points(group=server.ENTRY_POINTS)
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."{server.ENTRY_POINTS}"]\nminicpmv = "{server.PLUGIN}"\n' in project
    module, _, name = server.PLUGIN.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert {plugin.value for plugin in declared if plugin.name == "minicpmv"} <= {server.PLUGIN}


def test_the_server_gets_the_parsers_the_loader_and_the_limits():
    words = arguments(str(NANO), name="nano", port=8080, max_rows=16, think=True, cors_origins=["https://a.example"])
    assert words[:2] == ["serve", str(NANO)]
    assert {"--trust-remote-code", "--enable-auto-tool-choice", "--trust-request-mm-kwargs"} <= set(words)
    assert option(words, "--served-model-name") == "nano"
    assert option(words, "--port") == "8080"
    assert option(words, "--host") == "127.0.0.1"
    assert option(words, "--max-num-seqs") == "16"
    assert json.loads(option(words, "--media-io-kwargs")) == {"video": {"video_backend": "minicpmv"}}
    assert json.loads(option(words, "--default-chat-template-kwargs")) == {"enable_thinking": True}
    assert json.loads(option(words, "--allowed-origins")) == ["https://a.example"]
    assert "--api-key" not in words


def test_media_come_from_named_hosts_only_unless_all_are_named():
    assert option(arguments(str(NANO), name="nano"), "--allowed-media-domains").endswith(".invalid")
    named = arguments(str(NANO), name="nano", media_hosts=["a.example", "b.example"])
    assert named[named.index("--allowed-media-domains") + 1 :] == ["a.example", "b.example"]
    assert "--allowed-media-domains" not in arguments(str(NANO), name="nano", media_hosts=["*"])


def test_what_the_user_adds_comes_last_and_so_counts_over_the_rest():
    words = arguments(str(NANO), name="nano", extra=["--port", "9", "--tensor-parallel-size", "2"])
    assert words[-4:] == ["--port", "9", "--tensor-parallel-size", "2"]


def test_vllm_runs_in_this_process_with_limits_in_its_environment(vllm, monkeypatch):
    serve(str(NANO), name="nano", api_keys=["secret"], max_megabytes=10)
    assert vllm == [["vllm", *arguments(str(NANO), name="nano", api_keys=["secret"])]]
    assert os.environ["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"] == "10"
    assert os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_a_process_of_its_own_gets_the_same_arguments_and_limits():
    words = command(str(NANO), name="nano", media_hosts=["*"], max_megabytes=0.2)
    limits = ["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB=1", "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB=1"]
    assert words[:4] == ["env", *limits, sys.executable]
    assert words[6:] == arguments(str(NANO), name="nano", media_hosts=["*"])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (NANO, {"max_requests": 64}, "not 64"),
        ("model.gguf", {}, "--engine llama.cpp"),
        ("nobody/nothing", {}, "trust"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_before_it_is_imported(vllm, tmp_path, model, options, message):
    if str(model).endswith(".gguf"):
        model = tmp_path / model
        model.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=message):
        serve(str(model), name="m", **options)
    assert vllm == []


def test_weights_of_4_bits_are_refused_where_vllm_has_no_kernel_for_them(vllm, tmp_path, monkeypatch):
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    with pytest.raises(EngineError, match="4 bits.*this processor has AVX2: take.*w8a8"):
        serve(str(tmp_path), name="m")
    assert vllm == []
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    serve(str(tmp_path), name="m")
    assert len(vllm) == 1


def test_a_missing_vllm_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install vllm"):
        server.check_engine()


def test_a_vllm_that_would_not_find_the_plugin_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    with pytest.raises(EngineError, match="would not find the plugin"):
        server.check_engine()
