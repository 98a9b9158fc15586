"""A reader of documents: text, regions, data, summaries and answers from pages.

What is special:
- every answer comes from the pages as images, so tables, stamps and charts count, and nothing has to be transcribed
  first;
- data is checked against its schema: the model is told what is wrong with an answer and asked again, and what never fits
  is an error, not a guess;
- a document that is longer than the model's context is read in parts, whose answers are joined;
- page numbers that an answer names are checked against the document.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from PIL import Image

from minicpmv.apps.documents.language import Language, detect_language
from minicpmv.apps.documents.pages import Page
from minicpmv.apps.documents.prompts import SUMMARY_LENGTHS, Prompts
from minicpmv.apps.documents.repair import raise_contrast, straighten
from minicpmv.apps.documents.tables import find_tables
from minicpmv.apps.documents.writing import CALL_TOKENS, LoopStop, write
from minicpmv.apps.grounding import Box, parse_boxes
from minicpmv.errors import MiniCPMVError


REGION_KINDS = ("title", "text", "list", "table", "figure", "formula", "header", "footer")
PARTS_AT_ONCE = 16  # answers of parts that are joined in one question
MOST_NAMED_PAGES = 1000  # of one range: a model may write [pages 1-999999999]

_FENCE = re.compile(r"\s*```[\w+-]*\n(.*?)\n?```\s*", re.DOTALL)
_PAGE_NAMES = re.compile(r"\[\s*(pp?\.?\s*\d|pages?\b)((?:[\d\s,;&–-]|and|pages?)*)\]", re.IGNORECASE)


class SchemaError(MiniCPMVError):
    """A JSON Schema that cannot be used."""


class DataError(MiniCPMVError):
    """The model gave no data that fits the schema: `answer` is its last text, `problem` what is wrong with it."""

    def __init__(self, message: str, answer: str, problem: str) -> None:
        super().__init__(message)
        self.answer, self.problem = answer, problem


@dataclass
class PageText:
    """What is written on a page; `notices` say what to know about the reading."""

    number: int
    file: str
    width: int  # pixels, of the page as it was read
    height: int
    text: str
    tokens: int
    notices: list[str] = field(default_factory=list)
    is_complete: bool = True

    @cached_property
    def language(self) -> Language | None:
        return detect_language(self.text)

    @cached_property
    def tables(self) -> list[list[list[str]]]:
        """Rows of cells of each table in the text, which has to be Markdown."""
        return find_tables(self.text)


@dataclass
class PageRegions:
    """Regions of a page in pixels of `image`, the page as it was read."""

    number: int
    image: Image.Image
    boxes: list[Box]
    notices: list[str]


@dataclass
class DocumentAnswer:
    """An answer from a document. `pages` are those that it names, in ascending order."""

    text: str
    pages: list[int]
    notices: list[str]


class DocumentReader:
    """Reads pages with a model.

    Args:
        model, processor: a MiniCPM-V and its processor.
        deskew, contrast: repair every page before it is read (see `repair`).
        max_page_tokens: most tokens written about a page, and of an answer or a summary, in as many calls as it takes.
        pages_at_once: pages that one question shows the model; a longer document is asked in parts.
        prompts: see [`Prompts`].
        options: those of `model.chat`: max_slice_nums, max_new_tokens (of one call), sampling, ...; greedy decoding
            where they say nothing else.

    The argument `pages` of its methods is an [`OpenDocument`] or any pages, which are iterated over once.

    Raises:
        MiniCPMVError: an option is out of its range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        deskew: bool = False,
        contrast: bool = False,
        max_page_tokens: int = 8192,
        pages_at_once: int = 8,
        prompts: Prompts | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("max_page_tokens", max_page_tokens), ("pages_at_once", pages_at_once)):
            if value < 1:
                raise MiniCPMVError(f"{name}={value} must be at least 1")
        self.model, self.processor = model, processor
        self.deskew, self.contrast = deskew, contrast
        self.max_page_tokens, self.pages_at_once = max_page_tokens, pages_at_once
        self.prompts = prompts or Prompts()
        self.options = options

    # ---- one page at a time ----

    def read(self, pages: Iterable[Page], markup: str = "markdown") -> Iterator[PageText]:
        """Transcribe pages, one after the other.

        Args:
            markup: "markdown" or "text".
        """
        if markup not in ("markdown", "text"):
            raise MiniCPMVError(f"markup={markup!r} does not exist; choose 'markdown' or 'text'")
        return (self._read(page, getattr(self.prompts, markup)) for page in pages)

    def _read(self, page, prompt):
        image, notices = self._repaired(page)
        answer = self._write([self._encoded(image), prompt])
        return PageText(
            number=page.number,
            file=page.file,
            width=image.width,
            height=image.height,
            text=unfenced(answer.text),
            tokens=answer.tokens,
            notices=notices + answer.notices,
            is_complete=answer.is_complete,
        )

    def regions(self, pages: Iterable[Page], kinds: Iterable[str] = REGION_KINDS) -> Iterator[PageRegions]:
        """Find the regions of pages, one page after the other."""
        prompt = self.prompts.regions.format(kinds=", ".join(kinds))
        for page in pages:
            image, notices = self._repaired(page)
            answer = self._write([self._encoded(image), prompt])
            boxes, malformed = parse_boxes(answer.text, *image.size)
            notices += [*answer.notices, *(f"no region: {piece}" for piece in malformed)]
            if not boxes:
                notices.append(f"no regions in the answer {answer.text[:60]!r}")
            yield PageRegions(page.number, image, boxes, notices)

    # ---- many pages at once ----

    def extract(self, pages: Iterable[Page], schema: Mapping | bool, attempts: int = 3) -> Any:
        """Data of the pages, taken together, as one JSON value.

        Args:
            schema: a JSON Schema. References to other files are not followed.
            attempts: how often the model may answer.

        Returns:
            The value, which fits the schema.

        Raises:
            SchemaError: it is not a JSON Schema.
            DataError: no answer fits it.
            MiniCPMVError: the pages are too many for one question.
        """
        if attempts < 1:
            raise MiniCPMVError(f"attempts={attempts} must be at least 1")
        validator = schema_validator(schema)
        prompt = self.prompts.data.format(schema=json.dumps(schema, ensure_ascii=False))
        messages = [{"role": "user", "content": [*self._shown(pages), prompt]}]
        for _ in range(attempts):
            answer = write(self.model, self.processor, messages, self.max_page_tokens, **self.options)
            value, misfit = read_data(answer.text, validator)
            if misfit is None:
                return value
            problem = misfit
            if answer.notices:  # then the rest is missing, and asking again would end the same way
                problem = "; ".join([problem, *answer.notices])
                break
            messages += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": self.prompts.data_again.format(problem=problem)},
            ]
        raise DataError(
            f"The model gave no JSON that fits the schema: {problem}. Its last answer begins {answer.text[:80]!r}. Try "
            "fewer pages, a simpler schema with descriptions, or a larger model.",
            answer.text,
            problem,
        )

    def ask(self, pages: Iterable[Page], questions: Iterable[str]) -> list[DocumentAnswer]:
        """Answer questions about the whole document, one by one, with the pages that say so."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        asked = [self.prompts.question.format(question=question) for question in questions]
        joined = [self.prompts.joined_answer.replace("{question}", question) for question in questions]
        return self._ask_in_parts(pages, asked, joined, with_pages=True)

    def summarize(self, pages: Iterable[Page], length: str = "medium") -> DocumentAnswer:
        """Summarize the whole document: "short", "medium" or "long"."""
        if length not in SUMMARY_LENGTHS:
            raise MiniCPMVError(f"length={length!r} does not exist; choose one of {', '.join(SUMMARY_LENGTHS)}")
        words = SUMMARY_LENGTHS[length]
        asked, joined = self.prompts.summary.format(length=words), self.prompts.joined_summary
        return self._ask_in_parts(pages, [asked], [joined.replace("{length}", words)], with_pages=False)[0]

    def _ask_in_parts(self, pages, questions, joined_questions, with_pages):
        """[`DocumentAnswer`] to each question; a session reads the pages of a part once for all questions."""
        from minicpmv.chat import ChatSession  # imports torch

        options = {"decoding": "greedy", "max_media": self.pages_at_once} | self.options
        options["max_new_tokens"] = min(options.get("max_new_tokens", CALL_TOKENS), self.max_page_tokens)
        answers = [[] for _ in questions]  # (first page, last page, text) of each part
        notices = [[] for _ in questions]
        numbers = set()
        pages = iter(pages)
        while part := list(islice(pages, self.pages_at_once)):
            shown = self._shown(part)
            numbers |= {page.number for page in part}
            session = ChatSession(self.model, self.processor, when_full="error", **options)
            for place, question in enumerate(questions):
                content = [*shown, question]
                output = session.send(content, stopping_criteria=[LoopStop(self.processor.tokenizer)])
                session.undo()  # the next question knows the pages, and not this one
                answer = self._write(content, output)
                answers[place].append((part[0].number, part[-1].number, answer.text))
                notices[place] += answer.notices
        if not numbers:
            raise MiniCPMVError("there are no pages to ask about")
        results = []
        for parts, notes, question in zip(answers, notices, joined_questions, strict=True):
            while len(parts) > 1:
                group, parts = parts[:PARTS_AT_ONCE], parts[PARTS_AT_ONCE:]
                listed = "\n\n".join(f"Pages {first} to {last}:\n{text}" for first, last, text in group)
                answer = self._write([question.replace("{parts}", listed)])
                notes += answer.notices
                parts.append((group[0][0], group[-1][1], answer.text))
            text = parts[0][2]
            named = named_pages(text) if with_pages else []
            unknown = sorted(set(named) - numbers)
            if unknown:
                notes.append(f"the answer names pages that were not read: {', '.join(map(str, unknown))}")
            if with_pages and not named:
                notes.append("the answer names no page")
            results.append(DocumentAnswer(text, sorted(set(named) & numbers), notes))
        return results

    # ---- pages as the model sees them ----

    def _repaired(self, page):
        """(image, what was done to it) of a page."""
        image, notices = page.image, []
        if self.contrast:
            image = raise_contrast(image)
        if self.deskew:
            image, angle = straighten(image)
            if angle:
                notices.append(f"turned by {angle:.1f} degrees")
        return image, notices

    def _encoded(self, image):
        """The image, encoded once for as many calls as follow."""
        return self.model.encode_images(image, self.processor, max_slice_nums=self.options.get("max_slice_nums"))

    def _shown(self, pages):
        """The content of a message that shows pages with their numbers."""
        content = []
        for page in pages:
            content += [self.prompts.page.format(number=page.number), self._encoded(self._repaired(page)[0])]
        return content

    def _write(self, content, first_output=None):
        messages = [{"role": "user", "content": content}]
        return write(
            self.model, self.processor, messages, self.max_page_tokens, first_output=first_output, **self.options
        )


# ---- answers ----


def unfenced(text: str) -> str:
    """The text without the code fence that models like to put around an entire answer."""
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced and "\n```" not in fenced[1] else text.strip()


def named_pages(text: str) -> list[int]:
    """Numbers of the pages that an answer names as [page 3] or [pages 2-4, 7]."""
    numbers: list[int] = []
    for names in _PAGE_NAMES.findall(text):
        for begin, end in re.findall(r"(\d+)(?:\s*[–-]\s*(\d+))?", "".join(names)):
            first, last = int(begin), int(end or begin)
            numbers += range(first, min(last, first + MOST_NAMED_PAGES - 1) + 1)
    return numbers


def schema_validator(schema: Mapping | bool) -> Any:
    """A validator of jsonschema that follows no references to other files.

    Raises:
        SchemaError: it is not a JSON Schema.
    """
    if not isinstance(schema, (Mapping, bool)):
        raise SchemaError(f"A JSON Schema is an object or a boolean, not {str(schema)[:60]!r}.")
    from jsonschema.exceptions import SchemaError as InvalidSchema
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except InvalidSchema as error:
        raise SchemaError(f"This is not a JSON Schema: {error.message} (at {error.json_path}).") from error
    return kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)


def read_data(text: str, validator: Any) -> tuple[Any, str | None]:
    """(value, None) of an answer in JSON that fits the schema, else (None, problem).

    Raises:
        SchemaError: the schema refers to something that it does not hold.
    """
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    text = unfenced(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        return None, f"it is not JSON ({error})"
    try:
        misfit = best_match(validator.iter_errors(value))
    except Unresolvable as error:
        raise SchemaError(
            f"The schema refers to {error.ref!r}, which it does not hold: put it under $defs."
        ) from error
    return (value, None) if misfit is None else (None, f"{misfit.message[:300]} (at {misfit.json_path})")


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")
