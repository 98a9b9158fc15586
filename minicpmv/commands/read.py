"""`minicpmv read`: documents as Markdown, text or JSON; data, regions, tables, summaries and answers from them."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import one_line_errors, require


class ReadFormat(str, Enum):
    markdown = "markdown"
    text = "text"
    json = "json"


class SummaryLength(str, Enum):
    short = "short"
    medium = "medium"
    long = "long"


def read(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="PDF, TIFF or images; several are read as one document.")
    ],
    model: options.Model = ".",
    format: Annotated[ReadFormat, typer.Option("--format", "-f", help="Format to write.")] = ReadFormat.markdown,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file.")] = None,
    pages: Annotated[str | None, typer.Option(metavar="PAGES", help="Only these pages, such as 1-3,7.")] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", metavar="TEXT", help="Answer this and name the pages; repeatable."),
    ] = None,
    summary: Annotated[SummaryLength | None, typer.Option(help="Summarize the document.")] = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Extract data that fits this JSON Schema.")
    ] = None,
    regions: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Find regions; write the pages with boxes to this folder.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write every table as CSV to this folder.")
    ] = None,
    deskew: Annotated[bool, typer.Option("--deskew", help="Straighten crooked scans.")] = False,
    contrast: Annotated[bool, typer.Option("--contrast", help="Turn faded print into black on white.")] = False,
    dpi: Annotated[int, typer.Option(metavar="N", help="Resolution of PDF pages.")] = 200,
    password: Annotated[str | None, typer.Option(metavar="TEXT", help="Password of an encrypted PDF.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to ask about each page, instead of its transcription.")
    ] = None,
    max_pages: Annotated[int, typer.Option(metavar="N", min=1, help="Most pages to read.")] = 1000,
    max_page_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most tokens of a page's text, an answer or a summary.")
    ] = 8192,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Read a document: all of it, or what you ask for.

    Without --question, --summary, --schema or --regions the pages are transcribed.

    Examples:

    \b
      minicpmv read letter.pdf -o letter.md
      minicpmv read scan.tif --deskew --contrast --pages 2-5 --tables csv
      minicpmv read report.pdf -q "Who signed it?" --summary short
      minicpmv read receipt.jpg --schema receipt.schema.json --format json
    """
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def shown(items, what):
        """Items with a progress bar."""
        return track(items, what, total=len(document), console=console, disable=not console.is_terminal)

    with one_line_errors(OSError), terminal.device_memory():
        require(
            "documents",
            "pypdfium2",
            "py3langid",
            "markdown_it",
            *(["deskew"] if deskew else []),
            *(["jsonschema"] if schema else []),
        )
        from minicpmv.apps.documents.pages import Limits, OpenDocument
        from minicpmv.apps.documents.prompts import Prompts
        from minicpmv.apps.documents.reader import DocumentReader
        from minicpmv.apps.documents.tables import write_csv
        from minicpmv.apps.grounding import draw_boxes

        prompts = Prompts() if prompt is None else replace(Prompts(), markdown=prompt, text=prompt)
        structure = None if schema is None else read_schema(schema)
        transcribes = tables is not None or not (question or summary or schema or regions)
        markup = "text" if format is ReadFormat.text and tables is None else "markdown"
        found: dict[str, Any] = {"files": [str(file) for file in files]}
        with OpenDocument(list(files), pages, dpi, password, Limits(max_pages=max_pages)) as document:
            terminal.check_output(output)
            for folder in filter(None, (regions, tables)):
                folder.mkdir(parents=True, exist_ok=True)
            loaded, processor = terminal.load_shown(console, model, revision, trust_remote_code)
            reader = DocumentReader(
                loaded,
                processor,
                deskew=deskew,
                contrast=contrast,
                max_page_tokens=max_page_tokens,
                prompts=prompts,
            )
            try:
                if structure is not None:
                    found["data"] = reader.extract(shown(document, "Looking"), structure)
                if summary is not None:
                    answer = reader.summarize(shown(document, "Summarizing"), summary.value)
                    found["summary"] = asdict(answer)
                if question:
                    answers = reader.ask(shown(document, "Looking"), question)
                    found["answers"] = [
                        {"question": text} | asdict(answer) for text, answer in zip(question, answers, strict=True)
                    ]
                if regions is not None:
                    found["regions"] = []
                    for page in shown(reader.regions(document), "Finding regions"):
                        drawn = regions / f"page-{page.number:04}.png"
                        draw_boxes(page.image, page.boxes).save(drawn)
                        boxes = [asdict(box) for box in page.boxes]
                        found["regions"].append(
                            {"page": page.number, "image": str(drawn), "boxes": boxes, "notices": page.notices}
                        )
                if transcribes:
                    found["pages"] = []
                    for page in shown(reader.read(document, markup), "Reading"):
                        found["pages"].append(record(page))
                        if tables is not None:
                            for place, table in enumerate(page.tables, 1):
                                write_csv(table, tables / f"page-{page.number:04}-table-{place}.csv")
            except BaseException:  # a damaged page, or Ctrl-C: hours of reading are not thrown away
                if any(found[part] for part in found.keys() - {"files"}):
                    write_found(found, format, output)
                raise
        write_found(found, format, output)
        terminal.note_knowledge(loaded, model)


def read_schema(file: Path) -> Any:
    """The JSON Schema in a file.

    Raises:
        SchemaError: it is none.
    """
    import json

    from minicpmv.apps.documents.reader import SchemaError, schema_validator

    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SchemaError(f"{file} is not JSON ({error}); give a file with a JSON Schema") from error
    schema_validator(schema)
    return schema


def write_found(found: dict, format: ReadFormat, output: Path | None) -> None:
    """Write what was found, and on stderr what has to be known about it."""
    import json

    parts = [found.get("summary"), *found.get("answers", []), *found.get("regions", []), *found.get("pages", [])]
    for part in filter(None, parts):
        for text in part["notices"]:
            terminal.note(f"page {part['page']}: {text}" if "page" in part else text)
    text = json.dumps(found, ensure_ascii=False, indent=2) if format is ReadFormat.json else as_text(found)
    if output is None:
        terminal.write(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


def record(page) -> dict:
    """What is known about a transcribed page, for JSON."""
    language = page.language
    return {
        "page": page.number,
        "file": page.file,
        "width": page.width,
        "height": page.height,
        "language": language and {"code": language.code, "confidence": round(language.confidence, 3)},
        "text": page.text,
        "tables": page.tables,
        "tokens": page.tokens,
        "is_complete": page.is_complete,
        "notices": page.notices,
    }


def as_text(found: dict) -> str:
    """Everything that was asked for, one below the other; with a heading each where it is more than one thing."""
    import json

    parts = []
    if "data" in found:
        parts.append(("Data", json.dumps(found["data"], ensure_ascii=False, indent=2)))
    if "summary" in found:
        parts.append(("Summary", found["summary"]["text"]))
    for answer in found.get("answers", []):
        pages = ", ".join(map(str, answer["pages"]))
        parts.append((answer["question"], answer["text"] + (f"\n\nPages: {pages}" if pages else "")))
    for page in found.get("regions", []):
        lines = [f"{box['label']}: {', '.join(str(round(box[side])) for side in SIDES)}" for box in page["boxes"]]
        parts.append((f"Regions of page {page['page']}", "\n".join(lines)))
    if "pages" in found:
        parts.append(("Text", "\n\n".join(page["text"] for page in found["pages"])))
    return parts[0][1] if len(parts) == 1 else "\n\n".join(f"# {title}\n\n{text}" for title, text in parts)


SIDES = ("left", "top", "right", "bottom")
