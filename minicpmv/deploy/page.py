"""A page that runs a model wholly in the browser: static files for any host.

What is special:
- What the page has to know of a model is asked of its processor and configuration here, and written into `page.json`: the
  strings of the chat template, the settings of images and videos, the tokens that a model may write.
- npm brings the libraries, at the versions of the lock file. They are copied as they are: nothing is bundled.
- Every file but one has its place in a cache, which is named by a digest of all: the page works offline after it was
  opened once, and another version replaces all of it.
"""

import gzip
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicpmv import examples
from minicpmv.deploy import onnx
from minicpmv.deploy.folder import RECORD, check_new, whole_folder, write_card
from minicpmv.deploy.source import ExportError
from minicpmv.errors import MiniCPMVError, one_line
from minicpmv.files import read_json
from minicpmv.runtimes.graph_engines import ONNX_RUNTIME
from minicpmv.runtimes.graphs import NAMES, engine_of


SOURCE = Path(__file__).parent / "browser"
OWN = ("index.html", "page.css", "icon.svg", "sw.js", "src")
GRAPHS = tuple(f"{name}{ONNX_RUNTIME.suffix}" for name in NAMES)
MODEL_FILES = (*GRAPHS, "tokenizer.json", "tokenizer_config.json")
MOST_BYTES = 2**31  # of all graphs: a browser gives WebAssembly 4 GB, and weights are there twice while they load
EXAMPLES = ("shapes.jpg", "number.jpg", "receipt.jpg")  # with the first of their questions

ORT = "onnxruntime-web/dist/"
# device -> script, and the two files that it loads: the script comes from the same folder, the binary is handed over.
RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
LIBRARIES = ("@huggingface/tokenizers/dist/tokenizers.min.mjs", "mediabunny/dist/bundles/mediabunny.min.mjs")
IMAGE_SETTINGS = (
    *(
        "max_slice_nums",
        "scale_resolution",
        "patch_size",
        "image_feature_size",
        "use_image_id",
        "norm_mean",
        "norm_std",
    ),
    *("unk", "im_start", "im_end", "slice_start", "slice_end", "im_id_start", "im_id_end"),
)
# Private-use characters, which no template holds.
QUESTION, ANSWER = "\ue000", "\ue001"
LIBRARY_BYTES = 20_000_000  # of what is not the model

USE = """\
Open it from any host of static files, this machine's for example:

```text
python -m http.server --directory {folder}
```

Nothing that is shown to it leaves the browser. The figures are those of the same graphs in ONNX Runtime for Python; browsers run them as
WebAssembly, or on a GPU through WebGPU where they find one."""


class NodeError(MiniCPMVError):
    """The libraries of the page cannot be brought: the message says what to install."""


def export(
    model: str | Path,
    output: Path,
    kind: str = "int8",
    *,
    samples: int = 5,
    is_checked: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write a checkpoint as a page.

    Args:
        model: folder of the checkpoint, or one that `minicpmv export onnx` has written, whose graphs are taken as they are.
        output: the new folder.
        kind, samples, is_checked, note: as of [`minicpmv.deploy.onnx.export`], which writes the graphs.

    Returns:
        the folder.

    Raises:
        CheckpointError, ExportError, NodeError, OutputError, MissingPackageError: before the expensive work.
        ParityError: the graphs do not answer as PyTorch does.
    """
    model, output = Path(model).expanduser(), Path(output).expanduser()
    check_new(output, LIBRARY_BYTES)
    find_npm()
    with tempfile.TemporaryDirectory(prefix="minicpmv-page-") as folder, whole_folder(output) as stage:
        graphs = model if engine_of(model) is ONNX_RUNTIME else None
        if graphs is None:
            graphs = onnx.export(
                model, Path(folder, model.resolve().name), kind, samples=samples, is_checked=is_checked, note=note
            )
        note("Building the page")
        name = model.resolve().name
        build(graphs, stage, name)
        records = [file.name for file in graphs.glob(f"*{RECORD}")]
        for record in records:
            shutil.copyfile(graphs / record, stage / record)
        base = f"`{name}`, a MiniCPM-V 4.5, as a page that runs it in the browser, written by `minicpmv export page`."
        names = [record.removesuffix(RECORD) for record in records] or [name]
        title, use = f"{name} in the browser", USE.format(folder=output.name)
        write_card(stage, "onnxruntime-web", title, base, use, names, is_space=True)
    return output


def build(graphs: Path, output: Path, name: str) -> None:
    """Write the page into a folder that is there.

    Args:
        graphs: a folder of `minicpmv export onnx`.
        name: of the model, as it is shown.

    Raises:
        ExportError: the graphs are not whole, or too large for a browser.
        NodeError: npm is not there, or fails.
    """
    check_graphs(graphs)
    about = {"name": name, "knows": None, "runtimes": {}, **about_model(graphs)}
    for each in OWN:
        copy = shutil.copytree if (SOURCE / each).is_dir() else shutil.copyfile
        copy(SOURCE / each, output / each)
    (output / "model").mkdir()
    for each in MODEL_FILES:
        shutil.copyfile(graphs / each, output / "model" / each)
    (output / "vendor").mkdir()
    with node_modules() as modules:
        for library in LIBRARIES:
            shutil.copy(modules / library, output / "vendor")
        for device, (script, glue, binary) in RUNTIMES.items():
            for each in (script, glue):
                shutil.copy(modules / ORT / each, output / "vendor")
            # Not named .gz, which some hosts would unpack on the way.
            packed = output / "vendor" / f"{binary}.packed"
            packed.write_bytes(gzip.compress((modules / ORT / binary).read_bytes(), 6, mtime=0))
            about["runtimes"][device] = {"script": f"vendor/{script}", "binary": f"vendor/{packed.name}"}
        (output / "vendor" / "LICENSES.txt").write_text("".join(_licenses(modules)), encoding="utf-8")
    about["examples"] = _copy_examples(output)
    _write_versions(output, about)


def check_graphs(graphs: Path) -> None:
    """Refuse a folder that does not hold what a browser can load.

    Raises:
        ExportError: names what lacks, or the size.
    """
    if missing := [each for each in MODEL_FILES if not (graphs / each).is_file()]:
        raise ExportError(f"{graphs} has no {', '.join(missing)}: write it anew with minicpmv export onnx")
    size = sum((graphs / each).stat().st_size for each in GRAPHS)
    if size > MOST_BYTES or any((graphs / f"{each}.data").exists() for each in GRAPHS):
        raise ExportError(
            f"the graphs in {graphs} have {size / 1e9:.1f} GB or more, and a browser loads at most {MOST_BYTES / 1e9:.1f}: "
            "take a smaller model, or a type with fewer bits"
        )


def about_model(source: Path) -> dict[str, Any]:
    """What the page has to know of a model: `settings`, and what a miniature `knows`.

    Raises:
        ExportError: the chat template is none that the page can follow.
    """
    from transformers import AutoConfig, AutoProcessor, GenerationConfig

    config = AutoConfig.from_pretrained(str(source), trust_remote_code=True)
    stops = GenerationConfig.from_pretrained(str(source)).eos_token_id
    settings = about_processor(AutoProcessor.from_pretrained(str(source), trust_remote_code=True)) | {
        "decoder": {
            "layers": config.num_hidden_layers,
            "heads": config.num_key_value_heads,
            "width": config.head_dim,
        },
        "stops": stops if isinstance(stops, list) else [stops],
        "context": config.max_position_embeddings,
    }
    return {"settings": settings, "knows": getattr(config, "knows", None)}


def about_processor(processor: Any) -> dict[str, Any]:
    """The settings of images and videos, the strings of the chat template, and the tokens that a model may write.

    Raises:
        ExportError: the chat template is none that the page can follow.
    """
    images, videos = processor.image_processor, processor.video_processor
    image = {name: getattr(images, name) for name in IMAGE_SETTINGS}
    if not images.slice_mode:
        image["max_slice_nums"] = 1
    return {
        "template": template_strings(processor),
        "writes": written_tokens(processor),
        "image": image,
        "video": {name: getattr(videos, name) for name in videos.option_names},
    }


def template_strings(processor: Any) -> dict[str, Any]:
    """What the chat template writes around questions and answers: `user` and `assistant` (before, after), what stands
    `between` the parts of a message, and how an answer is opened where the model `thinks` first and where it `answers`.

    Raises:
        ExportError: the template writes more than that.
    """

    def render(*contents: Any, **options: Any) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
        return processor.apply_chat_template(messages, **options)

    asked = render(QUESTION)
    talk = render(QUESTION, ANSWER, QUESTION).removeprefix(asked).removesuffix(asked)
    two = render([{"type": "text", "text": QUESTION}, {"type": "text", "text": ANSWER}])
    opened = {
        name: render(QUESTION, add_generation_prompt=True, enable_thinking=thinks).removeprefix(asked)
        for name, thinks in (("thinks", True), ("answers", False))
    }
    found = {
        "user": asked.split(QUESTION),
        "assistant": talk.split(ANSWER),
        "between": two.partition(QUESTION)[2].partition(ANSWER)[0],
        **opened,
    }
    (before, after), (begin, end) = found["user"], found["assistant"]
    talks = render("one", "two", "three", "four", "five", add_generation_prompt=True, enable_thinking=False)
    written = "".join(
        f"{before}{question}{after}{begin}{answer}{end}" for question, answer in (("one", "two"), ("three", "four"))
    )
    if talks != f"{written}{before}five{after}{opened['answers']}":
        raise ExportError(
            "the chat template writes more than turns one after the other, which the page does not follow: take that of "
            "this repository"
        )
    return found


def written_tokens(processor: Any) -> list[str]:
    """The control tokens that count in an assistant's turn, because the model itself writes them."""
    found = []
    for token, number in processor.tokenizer.get_added_vocab().items():
        messages = [{"role": "assistant", "content": f"a{token}b"}, {"role": "user", "content": "c"}]
        plain = [{"role": "assistant", "content": "ab"}, *messages[1:]]
        (ids,), (others,) = (processor.apply_chat_template(each, tokenize=True) for each in (messages, plain))
        if ids.count(number) > others.count(number):
            found.append(token)
    return sorted(found)


def find_npm() -> str | None:
    """The program npm; None where the libraries are there already, in a clone.

    Raises:
        NodeError: it is needed, and not there.
    """
    if _is_current(SOURCE / "package-lock.json", SOURCE / "node_modules" / ".package-lock.json"):
        return None
    if (npm := shutil.which("npm")) is None:
        raise NodeError(
            "npm, which brings the libraries of the page, is not installed: get it with Node.js 18 or newer (nodejs.org, or "
            "apt-get install nodejs npm)"
        )
    return npm


@contextmanager
def node_modules() -> Iterator[Path]:
    """The folder of the installed libraries: that of a clone, or one that npm fills and that goes at the end.

    Raises:
        NodeError: npm is not there, or fails.
    """
    npm = find_npm()
    if npm is None:
        yield SOURCE / "node_modules"
        return
    with tempfile.TemporaryDirectory(prefix="minicpmv-page-") as folder:
        for file in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / file, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode:
            raise NodeError(f"npm could not bring the libraries of the page: {one_line(run.stderr[-500:])}")
        yield Path(folder, "node_modules")


def _is_current(lock: Path, installed: Path) -> bool:
    """Whether what is installed is what the lock file says; npm keeps a list of it."""
    if not installed.is_file():
        return False
    wanted, found = (
        {path: each.get("integrity") for path, each in read_json(file)["packages"].items() if path}
        for file in (lock, installed)
    )
    return found == wanted


def _licenses(modules: Path) -> Iterator[str]:
    for package in read_json(SOURCE / "package.json")["dependencies"]:
        about = read_json(modules / package / "package.json")
        yield f"{package} {about['version']}: {about['license']}, {about.get('homepage', '')}\n\n"
        for file in sorted((modules / package).glob("LICENSE*")):
            yield file.read_text(encoding="utf-8").strip() + "\n\n"


def _copy_examples(output: Path) -> list[dict[str, str]]:
    """The images and the video of the repository with a question each; none where it is not there."""
    try:
        assets = examples.find_clone() / "assets"
    except examples.NoCloneError:
        return []
    (output / "examples").mkdir()
    found = []
    for file, question in (
        *((name, examples.IMAGES[name][0]) for name in EXAMPLES),
        (examples.CLIP, examples.CLIP_QUESTIONS[0]),
    ):
        shutil.copy(assets / file, output / "examples")
        found.append({"path": f"examples/{file}", "question": question})
    return found


def _write_versions(output: Path, about: dict[str, Any]) -> None:
    """Write `page.json`, and `version.js` for the service worker."""
    files = sorted(file for file in output.rglob("*") if file.is_file())
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    sizes = {}
    for file in files:
        path = file.relative_to(output).as_posix()
        digest.update(path.encode() + hashlib.sha256(file.read_bytes()).digest())
        sizes[path] = file.stat().st_size
    version = digest.hexdigest()[:16]
    # The large files are kept by the page's worker, those of the other device by nobody.
    large = {path for path in sizes if path.startswith("model/") or path.endswith(".packed")}
    about |= {"version": version, "sizes": {path: sizes[path] for path in sorted(large)}}
    (output / "page.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    shell = ["./", "page.json", *sorted(sizes.keys() - large - {"index.html", "sw.js", "vendor/LICENSES.txt"})]
    script = f"const VERSION = {json.dumps(version)};\nconst SHELL = {json.dumps(shell, indent=1)};\n"
    (output / "version.js").write_text(script, encoding="utf-8")
