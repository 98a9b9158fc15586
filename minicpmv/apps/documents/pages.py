"""Files -> pages: PDF, TIFF with several pages, and images.

What is special:
- a page is drawn when it is asked for, so that a long document needs the memory of one page;
- sizes are checked before anything is decoded: of the file, of the page at the resolution asked for, and of every
  image on a PDF page, which may be small as a file and huge as pixels;
- a PDF is known by its content, not by its name;
- no model is needed: what is wrong with a document shows before one is loaded.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from minicpmv.errors import MiniCPMVError


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
    RuntimeError,
    struct.error,
    zlib.error,
)


class DocumentError(MiniCPMVError):
    """A document that cannot be read: the message names the file, what is wrong and what to do."""


class PasswordError(DocumentError):
    """The PDF is encrypted, and the password is missing or wrong."""


class DocumentLimitError(DocumentError):
    """The document, one of its pages, or an image on it is larger than the limits allow."""


@dataclass(frozen=True)
class Limits:
    """What a document may have; more is a [`DocumentLimitError`]."""

    max_bytes: int = 1_000_000_000  # of a file
    max_pages: int = 1000  # that are asked for
    max_pixels: int = 50_000_000  # of a page as drawn, and of each image on it


@dataclass(frozen=True)
class Page:
    """A page as an upright RGB image. `number` counts from 1 through all files of the document."""

    number: int
    file: str
    image: Image.Image


@dataclass(frozen=True)
class _File:
    name: str
    count: int  # pages
    draw: Callable[[int], Image.Image]  # index from 0 -> the page


class OpenDocument:
    """The pages of one or several files, as one document. Closes the files at the end of a `with` block.

    Iterating draws the pages that were asked for, one after the other and every time anew; `len()` is their number.

    Args:
        sources: the path of a PDF, TIFF or other image, its bytes, a Pillow image, or a list of these. Of formats such as
            GIF, whose frames are no pages, the first frame is read.
        pages: "1-3,7", or numbers; by default all of them.
        dpi: resolution at which PDF pages are drawn, in pixels per inch.
        password: of an encrypted PDF.
        limits: see [`Limits`].

    Raises:
        DocumentError: see its subclasses; those of a single page come when the page is drawn.
        ImportError: a PDF, and pypdfium2 is not installed.
    """

    def __init__(
        self,
        sources: Any,
        pages: str | Iterable[int] | None = None,
        dpi: int = 200,
        password: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.dpi, self.password, self.limits = dpi, password, limits or Limits()
        if not 1 <= dpi <= 2400:
            raise DocumentError(f"dpi={dpi} must lie between 1 and 2400; 200 is usual for print")
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

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Page]:
        for number in self.numbers:
            index = number - 1
            for file in self._files:
                if index < file.count:
                    yield Page(number, file.name, file.draw(index))
                    break
                index -= file.count

    def __enter__(self) -> "OpenDocument":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    # ---- files ----

    def _open(self, source, opened):
        if isinstance(source, Image.Image):
            return _File("image", 1, lambda index: self._read_image("image", source))
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
                raise DocumentError(
                    f"{name} cannot be opened ({error.strerror}); give a PDF, TIFF or other image"
                ) from error
        else:
            raise DocumentError(
                f"a document cannot be of type {type(source).__name__}; give a path, bytes or a Pillow image"
            )
        if size > self.limits.max_bytes:
            raise DocumentLimitError(
                f"{name} has {size} bytes, more than max_bytes={self.limits.max_bytes}; split it, or raise that limit"
            )
        return (self._open_pdf if b"%PDF-" in beginning else self._open_image)(name, readable, opened)

    def _open_pdf(self, name, source, opened):
        import pypdfium2

        try:
            pdf = opened.enter_context(pypdfium2.PdfDocument(source, password=self.password))
        except pypdfium2.PdfiumError as error:
            if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
                wrong = "is encrypted" if self.password is None else "does not open with this password"
                raise PasswordError(f"{name} {wrong}; give its password") from error
            raise DocumentError(f"{name} is damaged or not a PDF ({error}); save or download it again") from error
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
                for image in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
                    self._check_pixels(f"an image on {place}", *image.get_px_size(), "leave out the page")
                return page.render(scale=scale).to_pil().convert("RGB")
            finally:
                page.close()
        except pypdfium2.PdfiumError as error:
            raise DocumentError(f"{place} cannot be drawn ({error}); save it again, or leave it out") from error

    def _open_image(self, name, source, opened):
        try:
            file = BytesIO(source) if isinstance(source, bytes) else source
            image = opened.enter_context(Image.open(file, formats=_formats()))
            # Frames of other formats are not pages but a film, a thumbnail or a second view.
            count = image.n_frames if image.format == "TIFF" else 1
        except Image.DecompressionBombError as error:
            raise DocumentLimitError(f"{name}: {error}; scale it down") from error
        except UnidentifiedImageError as error:
            raise DocumentError(
                f"{name} is not a PDF, TIFF or other image that Pillow reads; convert it to one"
            ) from error
        except _DECODE_ERRORS as error:
            raise DocumentError(f"{name} is damaged ({error}); save or scan it again") from error

        def draw(index):
            place = f"page {index + 1} of {name}" if count > 1 else name
            try:
                image.seek(index)
            except Image.DecompressionBombError as error:
                raise DocumentLimitError(f"{place}: {error}; scale it down, or leave out the page") from error
            except _DECODE_ERRORS as error:
                raise DocumentError(f"{place} is damaged ({error}); scan it again, or leave it out") from error
            return self._read_image(place, image)

        return _File(name, count, draw)

    def _read_image(self, place, image):
        self._check_pixels(place, *image.size, "scale it down")
        try:
            return upright_rgb(image)
        except _DECODE_ERRORS as error:
            raise DocumentError(f"{place} is damaged ({error}); scan it again, or leave it out") from error

    def _check_pixels(self, what, width, height, remedy):
        if width * height > self.limits.max_pixels:
            raise DocumentLimitError(
                f"{what} has {width} x {height} pixels, more than max_pixels={self.limits.max_pixels}; {remedy}, or "
                "raise that limit for a source you trust"
            )


def _formats() -> list[str]:
    """What Pillow may read: all but EPS, which is a program that Ghostscript would run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def parse_pages(pages: str | Iterable[int] | None, total: int) -> list[int]:
    """Numbers of pages from "1-3,7" (or numbers themselves), in that order, each once.

    Raises:
        DocumentError: names the part that cannot be understood or is not among 1 to `total`.
    """
    if pages is None:
        return list(range(1, total + 1))
    numbers: list[int] = []
    for part in pages.split(",") if isinstance(pages, str) else pages:
        begin, dash, end = str(part).strip().partition("-")
        try:
            first = int(begin)
            last = int(end) if dash else first
        except ValueError as error:
            raise DocumentError(f"pages {part!r} cannot be understood; write them like 1-3,7") from error
        if not 1 <= first <= last <= total:
            raise DocumentError(f"pages {part!r} do not exist: the document has pages 1 to {total}")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as people see it: RGB in 8 bits, upright, on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")  # else convert() clips to white
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return image.convert("RGB")
