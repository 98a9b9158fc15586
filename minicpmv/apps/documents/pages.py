"""Files -> pages: PDF, TIFF with several pages, and pictures.

What is special:
- a page is drawn when it is asked for, so that a long document needs the memory of one page;
- sizes are checked before anything is decoded: of the file, of the page at the resolution asked for, and of every
  picture on a PDF page, which may be small as a file and huge as pixels;
- a PDF is known by its content, not by its name.
"""

import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


POINTS_PER_INCH = 72  # a PDF measures in points
# What Pillow's decoders raise on damaged data.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


class DocumentError(ValueError):
    """A document that cannot be read: the message names the file, what is wrong and what to do."""


class BrokenDocumentError(DocumentError):
    """The file is missing, damaged, or no document."""


class PasswordError(DocumentError):
    """The PDF is encrypted, and the password is missing or wrong."""


class DocumentLimitError(DocumentError):
    """The document, one of its pages, or a picture on it is larger than the limits allow."""


class PageRangeError(DocumentError):
    """Pages were asked for that cannot be understood or are not there."""


@dataclass(frozen=True)
class Limits:
    """What a document may have; more is a [`DocumentLimitError`]."""

    max_bytes: int = 1_000_000_000  # of a file
    max_pages: int = 1000  # that are asked for
    max_pixels: int = 50_000_000  # of a page as drawn, and of each picture on it


@dataclass(frozen=True)
class Page:
    """A page as an upright RGB picture. `number` counts from 1 through all files of the document."""

    number: int
    file: str
    image: Image.Image


@dataclass(frozen=True)
class _File:
    name: str
    count: int  # pages
    draw: object  # function: index from 0 -> Pillow picture


class OpenDocument:
    """The pages of one or several files, as one document. Closes the files at the end of a `with` block.

    Iterating draws the pages that were asked for, one after the other and every time anew; `len()` is their number.

    Args:
        sources: the path of a PDF, TIFF or picture, its bytes, a Pillow picture, or a list of these. Of other pictures
            with several frames, such as a GIF, the first is read.
        pages: "1-3,7", or numbers; all of them where it is not given.
        dpi: resolution at which PDF pages are drawn, in pixels an inch.
        password: of an encrypted PDF.
        limits: see [`Limits`].

    Raises:
        DocumentError: see its subclasses; those of a single page come when the page is drawn.
        ImportError: a PDF, and pypdfium2 is not installed.
    """

    def __init__(
        self,
        sources,
        pages: str | Iterable[int] | None = None,
        dpi: int = 200,
        password: str | None = None,
        limits: Limits | None = None,
    ):
        self.dpi, self.password, self.limits = dpi, password, limits or Limits()
        if not 1 <= dpi <= 2400:
            raise DocumentLimitError(f"dpi={dpi} must lie between 1 and 2400; 200 is usual for print")
        with ExitStack() as opened:
            self._files = []
            for source in sources if isinstance(sources, (list, tuple)) else [sources]:
                self._files.append(self._open(source, opened))
            self.total_pages = sum(file.count for file in self._files)
            self.numbers = parse_pages(pages, self.total_pages)
            if len(self.numbers) > self.limits.max_pages:
                raise DocumentLimitError(
                    f"{len(self.numbers)} pages are more than max_pages={self.limits.max_pages}; choose some of them, "
                    "such as pages 1-20, or raise that limit"
                )
            self._opened = opened.pop_all()

    def __len__(self):
        return len(self.numbers)

    def __iter__(self) -> Iterator[Page]:
        for number in self.numbers:
            index = number - 1
            for file in self._files:
                if index < file.count:
                    yield Page(number, file.name, file.draw(index))
                    break
                index -= file.count

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self._opened.close()

    # ---- files ----

    def _open(self, source, opened):
        if isinstance(source, Image.Image):
            return _File("picture", 1, lambda index: self._read_picture("picture", source))
        if isinstance(source, (bytes, bytearray)):
            name, size, beginning, readable = f"{len(source)} bytes", len(source), bytes(source[:1024]), bytes(source)
        elif isinstance(source, (str, PathLike)):
            readable = Path(source)
            name = str(readable)
            try:
                size = readable.stat().st_size
                with readable.open("rb") as file:
                    beginning = file.read(1024)
            except OSError as error:
                raise BrokenDocumentError(
                    f"{name} cannot be opened ({error.strerror}); give a PDF, TIFF or picture"
                ) from error
        else:
            raise BrokenDocumentError(
                f"a document cannot be of type {type(source).__name__}; give a path, bytes or a Pillow picture"
            )
        if size > self.limits.max_bytes:
            raise DocumentLimitError(
                f"{name} has {size} bytes, more than max_bytes={self.limits.max_bytes}; split it, or raise that limit"
            )
        return (self._open_pdf if b"%PDF-" in beginning else self._open_picture)(name, readable, opened)

    def _open_pdf(self, name, source, opened):
        import pypdfium2

        try:
            pdf = opened.enter_context(pypdfium2.PdfDocument(source, password=self.password))
        except pypdfium2.PdfiumError as error:
            if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
                wrong = "is encrypted" if self.password is None else "does not open with this password"
                raise PasswordError(f"{name} {wrong}; give its password") from error
            raise BrokenDocumentError(f"{name} is damaged or no PDF ({error}); save or download it again") from error
        pdf.init_forms()  # else what was filled into a form would not be drawn
        return _File(name, len(pdf), lambda index: self._draw_pdf_page(name, pdf, index))

    def _draw_pdf_page(self, name, pdf, index):
        import pypdfium2

        place = f"page {index + 1} of {name}"
        try:
            page = pdf[index]
            try:
                scale = self.dpi / POINTS_PER_INCH
                width, height = (max(1, math.ceil(side * scale)) for side in page.get_size())
                self._check_pixels(f"{place} at {self.dpi} dpi", width, height, "lower the dpi")
                for picture in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
                    self._check_pixels(f"a picture on {place}", *picture.get_px_size(), "leave out the page")
                return page.render(scale=scale).to_pil().convert("RGB")
            finally:
                page.close()
        except pypdfium2.PdfiumError as error:
            raise BrokenDocumentError(f"{place} cannot be drawn ({error}); save it again, or leave it out") from error

    def _open_picture(self, name, source, opened):
        try:
            image = opened.enter_context(Image.open(BytesIO(source) if isinstance(source, bytes) else source))
            # Frames of other formats are no pages: a film, a thumbnail, a second view.
            count = image.n_frames if image.format == "TIFF" else 1
        except Image.DecompressionBombError as error:
            raise DocumentLimitError(f"{name}: {error}; scale it down") from error
        except UnidentifiedImageError as error:
            raise BrokenDocumentError(
                f"{name} is no PDF, TIFF or picture in a format that Pillow reads; convert it to one"
            ) from error
        except _DECODE_ERRORS as error:
            raise BrokenDocumentError(f"{name} is damaged ({error}); save or scan it again") from error

        def draw(index):
            place = f"page {index + 1} of {name}" if count > 1 else name
            try:
                image.seek(index)
            except Image.DecompressionBombError as error:
                raise DocumentLimitError(f"{place}: {error}; scale it down, or leave out the page") from error
            except _DECODE_ERRORS as error:
                raise BrokenDocumentError(f"{place} is damaged ({error}); scan it again, or leave it out") from error
            return self._read_picture(place, image)

        return _File(name, count, draw)

    def _read_picture(self, place, image):
        self._check_pixels(place, *image.size, "scale it down")
        try:
            return upright_rgb(image)
        except _DECODE_ERRORS as error:
            raise BrokenDocumentError(f"{place} is damaged ({error}); scan it again, or leave it out") from error

    def _check_pixels(self, what, width, height, remedy):
        if width * height > self.limits.max_pixels:
            raise DocumentLimitError(
                f"{what} has {width} x {height} pixels, more than max_pixels={self.limits.max_pixels}; {remedy}, or "
                "raise that limit for a source you trust"
            )


def parse_pages(pages: str | Iterable[int] | None, total: int) -> list[int]:
    """Numbers of pages from "1-3,7" (or numbers themselves), in that order, each once.

    Raises:
        PageRangeError: names the part that cannot be understood or is not among 1 to `total`.
    """
    if pages is None:
        return list(range(1, total + 1))
    numbers = []
    for part in pages.split(",") if isinstance(pages, str) else pages:
        first, dash, last = str(part).strip().partition("-")
        try:
            first = int(first)
            last = int(last) if dash else first
        except ValueError as error:
            raise PageRangeError(f"pages {part!r} cannot be understood; write them like 1-3,7") from error
        if not 1 <= first <= last <= total:
            raise PageRangeError(f"pages {part!r} are not there: the document has pages 1 to {total}")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as the RGB picture that people see: turned by its EXIF mark, on white, in 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")  # else convert() clips to white
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return image.convert("RGB")
