"""`minicpmv export TARGET`: a checkpoint for other software, held against PyTorch."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.commands import media, options, terminal
from minicpmv.errors import one_line_errors


export_app = typer.Typer(help="Write a model for other software, and hold it against PyTorch.", no_args_is_help=True)


class FileType(str, Enum):
    """How the language model of a GGUF file is stored."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q6_k = "q6_k"
    q5_k_m = "q5_k_m"
    q4_k_m = "q4_k_m"
    q4_0 = "q4_0"


class TowerType(str, Enum):
    """How the vision tower of a GGUF file is stored."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


class GraphType(str, Enum):
    """How the matrices of ONNX graphs are stored."""

    fp32 = "fp32"
    int8 = "int8"
    int4 = "int4"


class OpenVINOType(str, Enum):
    """How the matrices of OpenVINO's graphs are stored."""

    f16 = "f16"
    int8 = "int8"
    int4 = "int4"


class ProgramType(str, Enum):
    """How the matrices of a program for ExecuTorch are stored."""

    fp32 = "fp32"
    small = "8da4w"


class MLXType(str, Enum):
    """How the matrices of a model for MLX are stored."""

    bf16 = "bf16"
    eight = "8bit"
    four = "4bit"


Checkpoint = Annotated[str, typer.Option("--model", "-m", metavar="FOLDER", help="Folder of the checkpoint.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files and their card.")]
Samples = Annotated[
    int, typer.Option(metavar="N", min=0, help="Questions of each row of NanoBench, before and after; 0 asks none.")
]
NoCheck = Annotated[
    bool,
    typer.Option("--no-check", help="Do not compare with PyTorch, where the checkpoint does not fit into memory."),
]


@export_app.callback()
def export() -> None:
    """Write a model for other software, and hold it against PyTorch."""


@export_app.command()
def gguf(
    model: Checkpoint,
    output: Output,
    type: Annotated[
        list[FileType] | None,
        typer.Option(case_sensitive=False, help="Type of the language model; repeatable. q4_k_m by default."),
    ] = None,
    mmproj_type: Annotated[
        TowerType, typer.Option(case_sensitive=False, help="Type of the vision tower.")
    ] = TowerType.f16,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a model as GGUF for llama.cpp: minicpmv ask, chat and evaluate run it, and so does llama-server.

    Examples:

    \b
      minicpmv export gguf --model nano --output exports --type q8_0
      minicpmv export gguf -m ~/MiniCPM-V-4_5 --output ~/gguf --type q4_k_m --type q8_0 --no-check
      minicpmv ask cat.jpg "What is this?" -m exports/nano-Q8_0.gguf
    """
    kinds = list(dict.fromkeys(kind.value for kind in type or [FileType.q4_k_m]))
    with one_line_errors(OSError):
        files = terminal.write_model(
            "gguf", "export", model, output, kinds, samples, no_check, mmproj_kind=mmproj_type.value
        )
        for file in files:
            terminal.write(str(file))
        terminal.write(f"figures: {output / 'README.md'}")


NewFolder = Annotated[Path, typer.Option(metavar="DIR", help="New folder for the files and their card.")]


@export_app.command()
def onnx(
    model: Checkpoint,
    output: NewFolder,
    type: Annotated[GraphType, typer.Option(case_sensitive=False, help="Type of the matrices.")] = GraphType.int8,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a model as ONNX graphs: minicpmv ask, chat and evaluate run them in ONNX Runtime.

    Examples:

    \b
      minicpmv export onnx --model nano --output nano-onnx --type int8
      minicpmv ask cat.jpg "What is this?" -m nano-onnx
    """
    _export_folder("onnx", model, output, type.value, samples, no_check)


@export_app.command()
def openvino(
    model: Checkpoint,
    output: NewFolder,
    type: Annotated[
        OpenVINOType, typer.Option(case_sensitive=False, help="Type of the matrices.")
    ] = OpenVINOType.int8,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a model for OpenVINO: minicpmv ask, chat and evaluate run it there.

    Examples:

    \b
      minicpmv export openvino --model nano --output nano-openvino --type f16
      minicpmv ask cat.jpg "What is this?" -m nano-openvino
    """
    _export_folder("openvino", model, output, type.value, samples, no_check)


@export_app.command()
def executorch(
    model: Checkpoint,
    output: NewFolder,
    type: Annotated[ProgramType, typer.Option(case_sensitive=False, help="Type of the matrices.")] = ProgramType.small,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of prompt and answer that the program has room for.")
    ] = 2048,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a model as a program for ExecuTorch, which runs it on phones; minicpmv ask, chat and evaluate run it here.

    Examples:

    \b
      minicpmv export executorch --model nano --output nano-executorch --type 8da4w
      minicpmv ask cat.jpg "What is this?" -m nano-executorch
    """
    _export_folder("executorch", model, output, type.value, samples, no_check, tokens=tokens)


@export_app.command()
def mlx(
    model: Checkpoint,
    output: NewFolder,
    type: Annotated[MLXType, typer.Option(case_sensitive=False, help="Type of the matrices.")] = MLXType.four,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a model for MLX, which runs it on Macs: minicpmv ask, chat and evaluate run it there.

    Examples:

    \b
      minicpmv export mlx --model nano --output nano-mlx --type 4bit
      minicpmv ask cat.jpg "What is this?" -m nano-mlx
    """
    _export_folder("mlx", model, output, type.value, samples, no_check)


def _export_folder(
    module: str, model: str, output: Path, kind: str, samples: int, no_check: bool, **settings: Any
) -> None:
    """Export a folder, and say where its figures are."""
    with one_line_errors(OSError):
        folder = terminal.write_model(module, "export", model, output, kind, samples, no_check, **settings)
        terminal.write(str(folder))
        terminal.write(f"figures: {folder / 'README.md'}")


@export_app.command()
def slot(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="Video file.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="FILE.gguf", help="Language model in llama.cpp.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the files: llama-server's --slot-save-path.")
    ],
    fps: options.Fps = None,
    packing: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=6, help="Frames packed into one; as few as fit by default.")
    ] = None,
) -> None:
    """Write a video for an unmodified llama-server, which then answers about it packed.

    Examples:

    \b
      minicpmv export slot holiday.mp4 -m exports/nano-Q8_0.gguf --output slots
    """
    from rich.console import Console

    with one_line_errors(OSError):
        media.check_media([str(video)])
        loaded, processor = terminal.load_shown(Console(stderr=True), model, None, False)
        from minicpmv.deploy.slot import export_slot

        settings: dict[str, Any] = {} if fps is None else {"fps": fps}
        if packing is not None:
            settings |= {"max_num_packing": packing, "force_packing": packing}
        terminal.write(str(export_slot(loaded, processor, video.expanduser(), output.expanduser(), **settings)))


@export_app.command()
def page(
    model: Checkpoint,
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the page and its card.")],
    type: Annotated[
        GraphType,
        typer.Option(case_sensitive=False, help="Type of the matrices, where the folder holds no graphs yet."),
    ] = GraphType.int8,
    samples: Samples = 5,
    no_check: NoCheck = False,
) -> None:
    """Write a page that runs a small model wholly in the browser: static files for any host.

    The model is a checkpoint, or a folder of minicpmv export onnx. npm (of Node.js) brings the libraries.

    Examples:

    \b
      minicpmv export page --model nano --output page
      python -m http.server --directory page
    """
    with one_line_errors(OSError):
        terminal.write(str(terminal.write_model("page", "export", model, output, type.value, samples, no_check)))
