"""`minicpmv compress`: a smaller checkpoint from a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import one_line_errors


def size(help: str) -> Any:
    """An option for the size of something that can be cut."""
    return typer.Option(metavar="N", min=1, help=help)


def compress(
    model: options.Model,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the smaller checkpoint; it must not be there yet.")
    ] = None,
    target_parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Most parameters: 75%, 6B, 500M; of a part: llm=75%, tower=2B. Repeatable."),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS", min=0, callback=options.finite, help="Most milliseconds of a question about one image, here."
        ),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="What a target may cut, separated by commas: layers, heads, mlp, tower_layers, tower_heads, tower_mlp, "
            "queries; all by default.",
        ),
    ] = None,
    layers: Annotated[int | None, size("Layers of the language model.")] = None,
    heads: Annotated[int | None, size("Key-value heads of a layer, each with its query heads.")] = None,
    mlp: Annotated[int | None, size("Width of the language model's MLPs.")] = None,
    tower_layers: Annotated[int | None, size("Layers of the vision tower.")] = None,
    tower_heads: Annotated[int | None, size("Heads of the tower; its width follows.")] = None,
    tower_mlp: Annotated[int | None, size("Width of the tower's MLPs.")] = None,
    queries: Annotated[int | None, size("Tokens of a slice or a pack of frames.")] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="Keep only the tokens of this text file, or of these conversations."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="ROWS", help="Conversations to measure on; drawn ones by default.")
    ] = None,
    conversations: Annotated[
        int, typer.Option(metavar="N", min=1, help="Conversations for importance, and as many for the loss.")
    ] = 32,
    samples: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Questions of each row of NanoBench, before and after; 0 asks none."),
    ] = 10,
    compare_sparsity: Annotated[
        bool, typer.Option("--compare-sparsity", help="Report also what zeros would do (magnitude, Wanda, 2:4).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shapes and sizes alone; a config.json is enough, nothing is written.")
    ] = False,
) -> None:
    """Cut a checkpoint: a smaller one that loads with the same code, and a report of what it cost.

    A target has the loss of each cut measured first. Train what was lost back: minicpmv train distill.

    Examples:

    \b
      minicpmv compress -m nano --output runs/smaller --target-parameters 75%
      minicpmv compress -m nano --output runs/smaller --mlp 384 --tower-mlp 432
      minicpmv compress -m . --dry-run --target-parameters 6B
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    given = {
        "layers": layers,
        "heads": heads,
        "mlp": mlp,
        "tower_layers": tower_layers,
        "tower_heads": tower_heads,
        "tower_mlp": tower_mlp,
        "queries": queries,
    }
    with one_line_errors(OSError):
        if output is None and not dry_run:
            raise typer.BadParameter("give --output DIR for the smaller checkpoint, or --dry-run")
        with console.status("Starting"):
            from minicpmv.compress import plan, run
        settings = run.Settings(
            sizes={name: value for name, value in given.items() if value is not None},
            targets=[plan.Target.parse(text) for text in target_parameters or ()],
            milliseconds=target_latency,
            kinds=[kind.strip() for kind in cut.split(",")] if cut else plan.AUTOMATIC,
            corpus=vocabulary,
            data=data,
            conversations=conversations,
            samples=samples,
            compares_sparsity=compare_sparsity,
        )
        report = run.compress(
            model, output, settings, lambda what: console.print(what, style="dim", soft_wrap=True), dry_run
        )
        width = max(len(title) for title, _, _ in report.rows())
        for title, before, after in report.rows():
            terminal.write(f"{title:{width}}  {before:>18}  {after:>26}")
        if not dry_run:
            terminal.write(f"report: {output}")
