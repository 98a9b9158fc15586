"""What several test files share."""

import copy
import gc
import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image


os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
NANO = REPOSITORY / "nano"
GREEDY = {"decoding": "greedy"}
PACKED = {"fps": 3, "max_num_packing": 6, "force_packing": 6}
# (messages, options): an image, one in slices, a packed video.
SIGHTS = [
    ([{"role": "user", "content": [REPOSITORY / "assets" / name, question]}], options)
    for name, question, options in (
        ("number.jpg", "What does it say?", {}),
        ("receipt.jpg", "What is the TOTAL?", {"max_slice_nums": 4}),
        ("star.mp4", "Which way does the shape move?", PACKED),
    )
]


def answers_to_sights(model, processor):
    """What a model, in whatever software, answers about `SIGHTS`."""
    return [
        model.chat(msgs=asked, processor=processor, max_new_tokens=24, **GREEDY | options) for asked, options in SIGHTS
    ]


def ground_floor(name):
    """A module of the model repository, which is a flat folder without a package of its own."""
    package = sys.modules.setdefault("minicpmv_hub", types.ModuleType("minicpmv_hub"))
    package.__path__ = [str(REPOSITORY)]
    return importlib.import_module(f"minicpmv_hub.{name}")


def pytest_collection_finish():
    """What is imported by now stays: trainers and others that collect garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def drawn_curves(request, monkeypatch):
    """Runs of training draw only in tests that name their curves: a dozen panels take longer than most of these runs."""
    module = sys.modules.get("minicpmv.train.common.curves")
    if module and "curves" not in request.node.name:
        monkeypatch.setattr(module, "draw", lambda *arguments, **options: None)


@pytest.fixture
def one_thread():
    """Nets this small lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repository():
    """The model folder, with its tokenizer.json built."""
    from minicpmv.build_tokenizer import build

    return build(REPOSITORY)[0].parent


@pytest.fixture(scope="session")
def tokenizer(repository):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(repository, trust_remote_code=True)


@pytest.fixture(scope="session")
def processor(repository):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(repository, trust_remote_code=True)


@pytest.fixture(scope="session")
def nano():
    """`(model, processor)` of nano, loaded once. A test that trains it or changes its settings loads one of its own."""
    from minicpmv import checkpoint

    model, processor = checkpoint.load(NANO)
    settings = model.generation_config.to_dict()
    yield model, processor
    assert not model.training and model.generation_config.to_dict() == settings, "a test left nano changed"


@pytest.fixture(scope="session")
def nano_model(nano):
    return nano[0]


@pytest.fixture(scope="session")
def nano_processor(nano):
    return nano[1]


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory):
    """The folder that all workers of a run share, and the process that outlives them."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent, os.getppid()) if "PYTEST_XDIST_WORKER" in os.environ else (folder, os.getpid())


@pytest.fixture(scope="session")
def made_once(of_the_run):
    """A function (name, make) -> path of the folder that `make(path)` has made, for all workers of a run."""

    def once(name, make):
        folder = of_the_run[0] / name
        partial_folder = folder.with_name(f"{folder.name}.partial")
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(partial_folder, ignore_errors=True)
                make(partial_folder)
                partial_folder.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def warm_python(of_the_run):
    """The path of an executable that stands for `sys.executable` and has its imports done: one for all workers of a run."""
    folder, owner = of_the_run
    script, socket = Path(__file__).parent / "warm_python.py", folder / "warm.socket"
    executable, log = folder / "warm_python", folder / "warm_python.log"
    with FileLock(folder / "warm.lock"):
        if not executable.exists():
            with log.open("w") as output:
                server = subprocess.Popen(
                    [sys.executable, script, "--serve", socket, str(owner)],
                    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            while not socket.exists():
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            command = shlex.join([sys.executable, "-S", "-E", str(script), str(socket)])
            executable.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            executable.chmod(0o755)
    return str(executable)


def wave_picture(width, height, k):
    """The synthetic picture [width, height, k] of the golden values."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 127.5 + 127.5 * np.sin(x / (7 + k) + y / (11 + 2 * k))
    green = 127.5 + 127.5 * np.cos(x * y / (5000 + 997 * k))
    blue = (x * 3 + y * 5 + k * 17) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def resized_config(folder, vision, fields):
    """A folder's configuration with other fields, and others of its vision part."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    kept = config.to_dict()
    kept.pop("layer_types", None)
    kept["vision_config"] |= vision
    return type(config)(**kept | fields)


SMALL_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


def tiny_config(**changes):
    """The published configuration with two small layers."""
    fields = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_window_layers": 2,
    }
    return resized_config(REPOSITORY, SMALL_VISION, fields | changes)


def small_config(**changes):
    """A configuration as small as nano's, for nano's processor, whose parts are those of the published one."""
    fields = {"num_hidden_layers": 2, "max_window_layers": 2, "tie_word_embeddings": False}
    return resized_config(NANO, SMALL_VISION, fields | changes)


def nano_sized_config(**changes):
    """nano's configuration for models of random weights. Its depth is fixed: what they write depends on it, and nano's may change."""
    return resized_config(NANO, {"num_hidden_layers": 6}, {"num_hidden_layers": 4, "max_window_layers": 4} | changes)


def name_seeded_model(config, attn_implementation="sdpa"):
    """A float32 model whose parameters are functions of their names, as in the golden values."""
    from transformers import AutoModel

    model = AutoModel.from_config(
        config, trust_remote_code=True, attn_implementation=attn_implementation, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
            is_norm = name.endswith("norm.weight") or (
                name.endswith("weight") and any(part in name for part in ("layernorm", ".ln_", "layer_norm"))
            )
            parameter.copy_(1 + values if is_norm else values)
    return model.eval()


@pytest.fixture(scope="session")
def golden_model():
    """The tiny model behind the golden values. Tests leave its parameters as they are."""
    return name_seeded_model(tiny_config())


@pytest.fixture(scope="session")
def eager_golden_model(golden_model):
    """The same with attention whose weights can be asked for."""
    model = copy.deepcopy(golden_model)  # drawing 80 million parameters anew takes longer
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="session")
def small_model():
    """A random model for nano's processor, which writes until a limit. Tests leave its parameters as they are."""
    model = name_seeded_model(small_config())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [889, 887], 887
    return model


@pytest.fixture(scope="module")
def drawn_data(made_once):
    """A user's cache in which the drawn stand-ins for public data sets lie, for all workers of a run."""
    from minicpmv.evaluate.fixtures import fixture_folder

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            fixture_folder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made_once("cache", fill)))
        yield


# ---- nano as GGUF ----

GGUF_TYPES = ("f32", "f16", "q8_0", "q4_k_m")


@pytest.fixture(scope="session")
def ggufs(made_once):
    """A folder with nano in several types, not compared with anything."""
    pytest.importorskip("xllamacpp")
    from minicpmv.deploy.gguf import export

    return made_once("gguf/nano", lambda folder: export(NANO, folder, GGUF_TYPES, is_checked=False))


@pytest.fixture(scope="session")
def llamacpp(ggufs):
    """A function (type) -> `(model, processor)` in llama.cpp, loaded once."""
    from minicpmv import checkpoint

    loaded = {}

    def load(kind):
        if kind not in loaded:
            loaded[kind] = checkpoint.load(ggufs / f"nano-{kind.upper()}.gguf")
        return loaded[kind]

    return load


@pytest.fixture
def copied(ggufs, tmp_path):
    """A copy of the folder with one language model, to be spoiled."""
    shutil.copytree(ggufs, tmp_path / "copy", copy_function=os.link)
    for kind in GGUF_TYPES:
        if kind != "f16":
            (tmp_path / "copy" / f"nano-{kind.upper()}.gguf").unlink()
    return tmp_path / "copy"


# ---- nano as graphs ----


@pytest.fixture(scope="session")
def traced_nano(made_once):
    """Nano's graphs without weights, by name; copy them before they are filled. Tracing takes a minute, so workers share it."""
    pytest.importorskip("onnxscript")
    import onnx_ir as ir

    from minicpmv.deploy import onnx
    from minicpmv.deploy.source import Checkpoint

    def make(folder):  # a file holds no weight without values, but inputs
        folder.mkdir()
        for name in onnx.NAMES:
            model = onnx.trace(Checkpoint(NANO), name)
            for weight in [value for value in model.graph.initializers.values() if value.const_value is None]:
                del model.graph.initializers[weight.name]
                model.graph.inputs.append(weight)
            ir.save(model, folder / f"{name}.onnx")

    def load(file):
        model = ir.load(file)
        for weight in [value for value in model.graph.inputs if value.name.startswith(("llm.", "vpm.", "resampler."))]:
            model.graph.inputs.remove(weight)
            model.graph.initializers[weight.name] = weight
        return model

    folder = made_once("onnx/traced", make)
    return {name: load(folder / f"{name}.onnx") for name in onnx.NAMES}


@pytest.fixture(scope="session")
def onnx_nano(request, made_once):
    """A function (type) -> folder with nano's graphs, not compared with anything."""
    pytest.importorskip("onnxscript")
    from minicpmv.deploy import onnx
    from minicpmv.deploy.source import Checkpoint

    def write(kind, folder):
        folder.mkdir()
        graphs = {name: graph.clone() for name, graph in request.getfixturevalue("traced_nano").items()}
        onnx.write(Checkpoint(NANO), graphs, onnx.TYPES[kind], folder)

    return lambda kind: made_once(f"onnx/{kind}", partial(write, kind))


@pytest.fixture(scope="session")
def openvino_nano(onnx_nano, made_once):
    """A folder with nano's graphs for OpenVINO, in 16 bits."""
    pytest.importorskip("openvino")
    from minicpmv.deploy.openvino import convert

    def make(folder):
        shutil.copytree(onnx_nano("fp32"), folder)
        convert(folder, "f16")

    return made_once("openvino/f16", make)


@pytest.fixture
def llama_server():
    """Starts an unmodified llama-server in this process; returns a function that posts JSON to it and reads its reply."""

    def start(params):
        import xllamacpp

        params.n_parallel, params.port, params.cpuparams.n_threads = 1, 0, 1
        params.warmup = params.fit_params = False
        params.cache_ram_mib, params.use_jinja = 0, True
        server = xllamacpp.Server(params)

        def post(path, body):
            request = urllib.request.Request(
                server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)

        return post

    return start
