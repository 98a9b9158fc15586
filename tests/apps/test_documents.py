"""Documents: files to pages, repair, long answers, data, tables, languages."""

import csv
import json
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GREEDY, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen import canvas

import minicpmv.chat
from minicpmv.apps.documents.language import detect_language
from minicpmv.apps.documents.pages import (
    DocumentError,
    DocumentLimitError,
    Limits,
    OpenDocument,
    Page,
    PasswordError,
    parse_pages,
)
from minicpmv.apps.documents.prompts import Prompts
from minicpmv.apps.documents.reader import (
    DataError,
    DocumentReader,
    SchemaError,
    named_pages,
    schema_validator,
    unfenced,
)
from minicpmv.apps.documents.repair import raise_contrast, straighten
from minicpmv.apps.documents.tables import find_tables, write_csv
from minicpmv.apps.documents.writing import LoopStop, find_loop, write
from minicpmv.errors import MiniCPMVError


ASSETS = REPOSITORY / "assets"


def pdf_file(path, *draw, size=(200, 100), **options):
    """A PDF with one page a function, which draws on its canvas."""
    sheet = canvas.Canvas(str(path), pagesize=size, **options)
    for paint in draw:
        paint(sheet)
        sheet.showPage()
    sheet.save()
    return path


def filled(red, green, blue):
    def paint(sheet):
        sheet.setFillColorRGB(red, green, blue)
        sheet.rect(0, 0, 1000, 1000, stroke=0, fill=1)

    return paint


def with_picture(picture):
    return lambda sheet: sheet.drawImage(ImageReader(picture), 0, 0, 100, 100)


RED, GREEN, BLUE = filled(1, 0, 0), filled(0, 1, 0), filled(0, 0, 1)
COLORS = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue"}


def colors_of(document):
    return [(page.number, COLORS[page.image.getpixel((5, 5))]) for page in document]


def printed(lines, size=(600, 800), letters=22, ink="black", paper="white"):
    page = Image.new("RGB", size, paper)
    pen = ImageDraw.Draw(page)
    for place in range(lines):
        pen.text(
            (60, 60 + place * letters * 1.6), "The quick brown fox jumps over it", ink, ImageFont.load_default(letters)
        )
    return page


# ---- files to pages ----


def test_pages_of_a_pdf_are_drawn_one_by_one_at_the_resolution_asked_for(tmp_path):
    path = pdf_file(tmp_path / "a.pdf", RED, GREEN, BLUE)
    with OpenDocument(path, dpi=144) as document:
        assert len(document) == document.total_pages == 3
        first = next(iter(document))
        assert (first.image.mode, first.image.size, first.file) == ("RGB", (400, 200), str(path))
        assert colors_of(document) == colors_of(document) == [(1, "red"), (2, "green"), (3, "blue")]
    with OpenDocument(path.read_bytes(), pages="3,1-2") as document:
        assert colors_of(document) == [(3, "blue"), (1, "red"), (2, "green")]


def test_what_was_filled_into_a_form_is_drawn(tmp_path):
    def form(sheet):
        sheet.acroForm.textfield(name="name", value="MMMMMMMM", x=10, y=30, width=150, height=40, fontSize=24)

    with OpenDocument(pdf_file(tmp_path / "form.pdf", form)) as document:
        (page,) = document
    assert (np.asarray(page.image.convert("L")) < 100).sum() > 500


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16"])
def test_all_pages_of_a_tiff_are_read_as_rgb(tmp_path, mode):
    pages = [Image.new("L", (40 + place, 30), 255 * (place % 2)) for place in range(3)]
    if mode == "I;16":
        pages = [Image.fromarray(np.asarray(page).astype(np.uint16) * 257) for page in pages]
    else:
        pages = [page.convert(mode) for page in pages]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    with OpenDocument(tmp_path / "scan.tif") as document:
        read_pages = [page.image for page in document]
    assert [(page.mode, page.width) for page in read_pages] == [("RGB", 40), ("RGB", 41), ("RGB", 42)]
    assert [page.getpixel((5, 5))[0] for page in read_pages] == [0, 255, 0]


def test_pictures_are_turned_upright_and_laid_on_white(tmp_path):
    photo = Image.new("RGB", (60, 30), "red")
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    with OpenDocument([tmp_path / "photo.jpg", clear]) as document:
        turned, laid = (page.image for page in document)
    assert turned.size == (30, 60)
    assert laid.getpixel((5, 5)) == (255, 255, 255)


def test_several_files_are_one_document(tmp_path):
    pdf = pdf_file(tmp_path / "a.pdf", RED, GREEN)
    with OpenDocument([pdf, Image.new("RGB", (9, 9), "blue"), str(pdf)], pages=[2, 3, 4]) as document:
        assert colors_of(document) == [(2, "green"), (3, "blue"), (4, "red")]


def test_an_encrypted_pdf_needs_its_password(tmp_path):
    path = pdf_file(tmp_path / "secret.pdf", RED, encrypt=StandardEncryption("sesame", "owner"))
    with pytest.raises(PasswordError, match="is encrypted"):
        OpenDocument(path)
    with pytest.raises(PasswordError, match="does not open with this password"):
        OpenDocument(path, password="simsalabim")
    with OpenDocument(path, password="sesame") as document:
        assert colors_of(document) == [(1, "red")]


@pytest.mark.parametrize(
    "data", [b"", b"just text", b"%PDF-1.7\nnothing more", b"II*\x00\x08\x00\x00\x00", b"\x89PNG\r\n\x1a\n"]
)
def test_damaged_files_and_other_files_are_refused_by_name(tmp_path, data):
    path = tmp_path / "bad.pdf"
    path.write_bytes(data)
    with pytest.raises(DocumentError, match=r"bad\.pdf"):
        list(OpenDocument(path))


def test_a_missing_file_and_a_wrong_type_are_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"gone\.pdf cannot be opened"):
        OpenDocument(tmp_path / "gone.pdf")
    with pytest.raises(DocumentError, match="int"):
        OpenDocument(7)


def test_a_truncated_page_is_named_and_the_pages_before_it_are_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64), dtype=np.uint8)
    pages = [Image.fromarray(values) for values in noise]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    whole = (tmp_path / "a.tif").read_bytes()
    start = whole.rindex(noise[1].tobytes())
    (tmp_path / "a.tif").write_bytes(whole[: start + 1000])
    with pytest.raises(DocumentError, match=r"page 2 of .*a\.tif|a\.tif is damaged"):
        for page in OpenDocument(tmp_path / "a.tif"):
            assert page.number == 1


def test_a_page_too_large_to_draw_is_refused_before_it_is_drawn(tmp_path):
    path = pdf_file(tmp_path / "poster.pdf", RED, size=(14_400, 14_400))
    with (
        OpenDocument(path) as document,
        pytest.raises(DocumentLimitError, match="40000 x 40000.*lower the dpi"),
    ):
        next(iter(document))
    with OpenDocument(path, dpi=10) as document:
        assert next(iter(document)).image.size == (2000, 2000)


def test_a_small_page_with_a_huge_picture_is_refused_before_it_is_drawn(tmp_path):
    bomb = Image.new("RGB", (3000, 2000))
    nested = pdf_file(tmp_path / "bomb.pdf", RED, with_picture(bomb))
    assert nested.stat().st_size < 100_000
    limits = Limits(max_pixels=1_000_000)
    with OpenDocument(nested, limits=limits) as document:
        pages = iter(document)
        assert next(pages).number == 1
        with pytest.raises(DocumentLimitError, match="image on page 2.*3000 x 2000"):
            next(pages)


def test_a_huge_tiff_page_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.tif", compression="group4")
    assert (tmp_path / "bomb.tif").stat().st_size < 100_000
    with pytest.raises(DocumentLimitError, match="9000 x 9000"):
        list(OpenDocument(tmp_path / "bomb.tif"))


def test_long_documents_and_large_files_are_refused_with_the_remedy(tmp_path):
    path = pdf_file(tmp_path / "a.pdf", RED, GREEN, BLUE)
    with pytest.raises(DocumentLimitError, match="3 pages.*max_pages=2.*choose"):
        OpenDocument(path, limits=Limits(max_pages=2))
    assert len(OpenDocument(path, pages="2-3", limits=Limits(max_pages=2))) == 2
    with pytest.raises(DocumentLimitError, match="max_bytes=100"):
        OpenDocument(path, limits=Limits(max_bytes=100))
    with pytest.raises(DocumentError, match="dpi=0"):
        OpenDocument(path, dpi=0)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5)), min_size=1))
def test_page_ranges_mean_what_they_say(spans):
    text = ", ".join(f"{first}-{first + more}" if more else str(first) for first, more in spans)
    wanted = [number for first, more in spans for number in range(first, first + more + 1)]
    assert parse_pages(text, 65) == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("pages", ["0", "4", "2-9", "3-2", "x", "", "1,,2", "1-", [9]])
def test_page_ranges_that_make_no_sense_are_refused(pages):
    with pytest.raises(DocumentError, match="like 1-3,7|pages 1 to 3"):
        parse_pages(pages, 3)


def test_an_eps_file_is_refused_and_not_run(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    eps = tmp_path / "page.eps"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DocumentError, match="not a PDF, TIFF or other image"):
        list(OpenDocument(eps))
    assert not (tmp_path / "ran").exists()


# ---- repair ----


@pytest.mark.parametrize("degrees", [-7, 4])
def test_a_crooked_page_is_straightened(degrees):
    crooked = printed(20).rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
    level, angle = straighten(crooked)
    assert abs(angle - degrees) < 0.6
    assert level.width > crooked.width  # nothing is cut off


@pytest.mark.parametrize("page", [printed(20), Image.new("RGB", (600, 800), "white")], ids=["level", "empty"])
def test_a_level_page_and_an_empty_one_stay_as_they_are(page):
    assert straighten(page) == (page, 0.0)


def test_faded_print_becomes_black_on_white():
    page = np.asarray(raise_contrast(printed(20, ink=(150, 150, 150), paper=(200, 195, 190))).convert("L"))
    assert page.min() < 40 and np.median(page) > 240


def test_the_grain_of_an_empty_page_is_not_raised():
    grain = np.random.default_rng(0).integers(190, 205, (200, 200, 1), dtype=np.uint8).repeat(3, -1)
    page = Image.fromarray(grain)
    assert raise_contrast(page) == page


# ---- long answers ----


class Scripted:
    """Stands where a model's chat() stands, with the answers that a test needs: texts, or (text, finish_reason)."""

    def __init__(self, *answers):
        self.answers, self.asked, self.sessions = list(answers), [], []

    def chat(self, msgs, processor=None, return_dict=False, **options):
        self.asked.append(SimpleNamespace(messages=list(msgs), **options))
        answer = self.answers.pop(0)
        text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        return SimpleNamespace(text=text, finish_reason=reason, generated_tokens=max(1, len(text) // 4))

    def encode_images(self, image, processor=None, max_slice_nums=None):
        return image

    def session(self, **options):
        turns = []

        def send(content, **more):
            turns.append(content)
            return self.chat([{"role": "user", "content": content}], **options, **more)

        self.sessions.append(turns)
        return SimpleNamespace(send=send, undo=lambda: None)


@pytest.fixture(autouse=True)
def scripted_sessions(monkeypatch):
    sessions = minicpmv.chat.ChatSession

    def start(model, processor, **options):
        return model.session(**options) if isinstance(model, Scripted) else sessions(model, processor, **options)

    monkeypatch.setattr(minicpmv.chat, "ChatSession", start)


PLAIN = SimpleNamespace(tokenizer=None)
QUESTION = [{"role": "user", "content": "Read!"}]
ROW = "| 12.50 | 3 | 37.50 |\n"


@given(st.text(st.characters(codec="utf-8"), max_size=50), st.text("abc \n", min_size=1, max_size=90))
def test_a_loop_is_found_with_its_first_round(before, phrase):
    rounds = 400 // len(phrase) + 4
    text = before + phrase * rounds
    start, period = find_loop(text)
    assert len(phrase) % period == 0 or period < len(phrase)
    body = text[start:]
    assert len(body) >= len(phrase) * rounds and body == (body[:period] * (len(body) // period + 1))[: len(body)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "Contents " + "." * 120,
        "_" * 200,
        "| | | |\n" * 30,
        "".join(f"| {n} | {n * n} |\n" for n in range(300)),
        "yes " * 300 + "and then something else",
    ],
    ids=["empty", "word", "leader", "line", "empty cells", "numbers", "goes on"],
)
def test_what_repeats_itself_on_ordinary_pages_is_no_loop(text):
    assert find_loop(text) is None


def test_an_answer_goes_on_where_the_token_limit_stopped_it():
    model = Scripted(("The quick ", "length"), ("brown f", "length"), "ox.")
    answer = write(model, PLAIN, QUESTION, max_new_tokens=2)
    assert answer.text == "The quick brown fox." and answer.is_complete and answer.notices == []
    assert [call.messages[-1] for call in model.asked] == [
        QUESTION[0],
        {"role": "assistant", "content": "The quick "},
        {"role": "assistant", "content": "The quick brown f"},
    ]


def test_half_a_character_at_the_limit_is_written_again():
    model = Scripted(("价格\ufffd", "length"), "是9元")
    assert write(model, PLAIN, QUESTION).text == "价格是9元"


def test_the_token_limit_of_a_page_is_said():
    model = Scripted(("x" * 40, "length"), ("y" * 40, "length"))
    answer = write(model, PLAIN, QUESTION, max_page_tokens=20, max_new_tokens=10)
    assert answer.text == "x" * 40 + "y" * 40 and not answer.is_complete
    assert "max_page_tokens=20" in answer.notices[0]


def test_a_loop_is_cut_after_its_first_round_and_said():
    model = Scripted(("Invoice\n" + "Thank you! " * 60, "length"))
    answer = write(model, PLAIN, QUESTION)
    assert answer.text == "Invoice\nThank you! " and not answer.is_complete
    assert "looped ('Thank you!', 60 times)" in answer.notices[0]


def test_a_loop_over_several_calls_is_noticed():
    model = Scripted(*[("Thank you! " * 9, "length")] * 9)
    assert write(model, PLAIN, QUESTION).text == "Thank you! "
    assert len(model.answers) > 3


def test_a_real_model_that_loops_is_stopped_early(nano_model, nano_processor):
    tokenizer = nano_processor.tokenizer
    prompt = tokenizer("Read the text.", return_tensors="pt")["input_ids"]
    phrase = tokenizer("a blue triangle, ")["input_ids"]
    stop = LoopStop(tokenizer)
    for length in range(1, 100 * len(phrase)):
        ids = torch.cat([prompt, torch.tensor([(phrase * 100)[:length]])], 1)
        if stop(ids, None).item():
            break
    assert 400 <= len("a blue triangle, ") * length / len(phrase) < 700
    # nano is made to repeat itself, and would fill 3000 tokens with it.
    always = {"prefix_allowed_tokens_fn": lambda batch, ids: [phrase[(len(ids) + 1) % len(phrase)]]}
    answer = write(nano_model, nano_processor, QUESTION, max_page_tokens=3000, max_new_tokens=3000, **always)
    assert answer.tokens < 700 and "looped" in answer.notices[0]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_an_answer_in_pieces_is_the_answer_in_one_piece(nano_model, nano_processor, at_once):
    picture = nano_model.encode_images(Image.open(ASSETS / "shapes.jpg"), nano_processor)
    messages = [{"role": "user", "content": [picture, "Describe the picture."]}]
    whole = nano_model.chat(msgs=messages, processor=nano_processor, max_new_tokens=40, **GREEDY)
    answer = write(nano_model, nano_processor, messages, max_page_tokens=40, max_new_tokens=at_once)
    assert answer.text == whole and answer.is_complete


def test_chat_goes_on_with_an_answer_only_without_a_thought(nano_model, nano_processor):
    begun = [*QUESTION, {"role": "assistant", "content": "It says"}]
    for options in ({"enable_thinking": True}, {"enable_thinking": "auto"}):
        with pytest.raises(ValueError, match="continued, without a thought"):
            nano_model.chat(msgs=begun, processor=nano_processor, **options)
    with pytest.raises(ValueError, match="no other conversations"):
        nano_model.chat(msgs=[begun, QUESTION], processor=nano_processor)


# ---- data ----

SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number"}, "date": {"type": "string", "format": "date"}},
    "required": ["total"],
}


def blank_pages(count=1):
    return [Page(number, "a.pdf", Image.new("RGB", (200, 100), "white")) for number in range(1, count + 1)]


def test_data_is_asked_for_again_until_it_fits_the_schema():
    model = Scripted(
        "The total is 9.", '{"total": "nine"}', '```json\n{"total": 9, "date": "2024-02-30"}\n```', '{"total": 9}'
    )
    assert DocumentReader(model, PLAIN).extract(blank_pages(2), SCHEMA, attempts=4) == {"total": 9}
    assert json.dumps(SCHEMA) in model.asked[0].messages[0]["content"][-1]
    assert model.asked[0].messages[0]["content"][0::2][:2] == ["Page 1:", "Page 2:"]
    problems = [call.messages[-1]["content"] for call in model.asked[1:]]
    assert "not JSON" in problems[0]
    assert "'nine' is not of type 'number'" in problems[1] and "$.total" in problems[1]
    assert "is not a 'date'" in problems[2]


def test_data_that_never_fits_is_an_error_with_the_last_answer():
    model = Scripted("no", "no", "never")
    with pytest.raises(DataError, match="not JSON") as caught:
        DocumentReader(model, PLAIN).extract(blank_pages(), SCHEMA)
    assert caught.value.answer == "never" and model.answers == []


def test_data_cut_by_the_token_limit_is_not_asked_for_again():
    model = Scripted(('{"total": 1', "length"), '{"total": 1}')
    with pytest.raises(DataError, match="max_page_tokens=2"):
        DocumentReader(model, PLAIN, max_page_tokens=2).extract(blank_pages(), SCHEMA)
    assert len(model.answers) == 1


@pytest.mark.parametrize("answer", ["NaN", "[1", "{'a': 1}", '{"total": Infinity}', ""])
def test_what_is_no_json_is_no_data(answer):
    with pytest.raises(DataError, match="not JSON"):
        DocumentReader(Scripted(answer), PLAIN).extract(blank_pages(), True, attempts=1)


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"properties": 3}, [], "text", 5, {"pattern": "("}])
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(SchemaError):
        schema_validator(schema)


def test_a_schema_does_not_reach_for_the_network_or_other_files():
    for reference in ("https://example.com/schema.json", "file:///etc/passwd"):
        with pytest.raises(SchemaError, match=r"\$defs"):
            DocumentReader(Scripted("{}"), PLAIN).extract(blank_pages(), {"$ref": reference})


# ---- pages, regions, questions ----


def test_pages_are_read_one_by_one_when_they_are_asked_for():
    model = Scripted("```markdown\n# One\n```", ("Two " * 200, "length"))
    texts = DocumentReader(model, PLAIN, max_slice_nums=4).read(blank_pages(2))
    assert model.asked == []
    first, second = texts
    assert (first.text, first.number, first.width, first.height, first.notices) == ("# One", 1, 200, 100, [])
    assert second.text == "Two" and "looped" in second.notices[0] and not second.is_complete
    assert model.asked[0].max_slice_nums == 4 and model.asked[0].decoding == "greedy"
    assert model.asked[0].messages[0]["content"][1] == Prompts().markdown


def test_repaired_pages_are_what_the_model_sees_and_say_so():
    crooked = printed(20, ink=(120, 120, 120), paper=(190, 190, 190)).rotate(
        -5, expand=True, fillcolor=(190, 190, 190)
    )
    model = Scripted("x")
    (page,) = DocumentReader(model, PLAIN, deskew=True, contrast=True).read([Page(1, "a", crooked)])
    shown = model.asked[0].messages[0]["content"][0]
    assert (page.width, page.height) == shown.size != crooked.size
    assert "turned by" in page.notices[0]
    assert np.asarray(shown.convert("L")).min() < 40


def test_regions_are_in_pixels_of_the_page_and_what_is_none_is_said():
    model = Scripted("<ref>title</ref><box>0 0 500 100</box>\n<ref>table</ref><box>0 100 1000</box>", "nothing")
    first, second = DocumentReader(model, PLAIN).regions(blank_pages(2), kinds=["title", "table"])
    assert [(box.label, *box.corners) for box in first.boxes] == [("title", 0, 0, 100, 10)]
    assert "0 100 1000" in first.notices[0]
    assert second.boxes == [] and "no regions" in second.notices[0]
    assert "title, table" in model.asked[0].messages[0]["content"][1]


def test_a_long_document_is_asked_in_parts_and_the_answers_are_joined():
    answers = ["5 [page 2]", "Ann [page 1]", "no", "Bob [page 3]", "no", "no"]
    model = Scripted(*answers, "5 [page 2]", "Ann, Bob [pages 1, 3], [p. 9]")
    reader = DocumentReader(model, PLAIN, pages_at_once=2)
    total, names = reader.ask(blank_pages(5), ["What is the total?", "Who signed {it}?"])
    assert [len(session) for session in model.sessions] == [2, 2, 2]
    assert model.sessions[1][0][0::2][:2] == ["Page 3:", "Page 4:"]
    assert (total.text, total.pages, total.notices) == ("5 [page 2]", [2], [])
    assert names.pages == [1, 3] and "were not read: 9" in names.notices[0]
    joined = model.asked[-1].messages[0]["content"][0]
    assert "Pages 1 to 2:\nAnn [page 1]" in joined and "Pages 5 to 5:\nno" in joined and "Who signed {it}?" in joined


def test_an_answer_goes_on_as_a_page_does():
    model = Scripted(("Five ", "length"), "[page 1]", "Six [page 1]")
    first, second = DocumentReader(model, PLAIN).ask(blank_pages(), ["How many?", "And?"])
    assert (first.text, first.pages, first.notices) == ("Five [page 1]", [1], []) and second.text == "Six [page 1]"
    begun, going_on, other = (call.messages for call in model.asked)
    assert going_on == [*begun, {"role": "assistant", "content": "Five "}] and len(other) == 1


def test_an_answer_without_pages_or_without_an_end_says_so():
    reader = DocumentReader(Scripted(("Five", "length")), PLAIN, max_page_tokens=1)
    (answer,) = reader.ask(blank_pages(), "How many?")
    assert answer.pages == [] and reader.model.asked[0].max_new_tokens == 1
    assert "max_page_tokens=1" in answer.notices[0] and "names no page" in answer.notices[1]


def test_an_answer_that_loops_is_cut_and_says_so():
    (answer,) = DocumentReader(Scripted("It is 5 [page 1].\n" + "Yes. " * 100), PLAIN).ask(
        blank_pages(), ["How many?"]
    )
    assert answer.text == "It is 5 [page 1].\nYes. " and answer.pages == [1]
    assert len(answer.notices) == 1 and "looped" in answer.notices[0]


def test_summaries_have_three_lengths():
    for length, words in (("short", "one or two sentences"), ("medium", "100 words"), ("long", "400 words")):
        model = Scripted("A letter.")
        summary = DocumentReader(model, PLAIN).summarize(blank_pages(), length)
        assert summary.text == "A letter." and summary.notices == []
        assert words in model.asked[0].messages[0]["content"][-1]


def test_options_that_do_not_exist_are_refused():
    reader = DocumentReader(Scripted(), PLAIN)
    for call, words in (
        (lambda: reader.summarize(blank_pages(), "tiny"), "short, medium, long"),
        (lambda: reader.read(blank_pages(), "html"), "markdown"),
        (lambda: reader.ask([], ["What?"]), "no pages"),
        (lambda: reader.extract(blank_pages(), True, attempts=0), "attempts=0"),
        (lambda: DocumentReader(Scripted(), PLAIN, pages_at_once=0), "pages_at_once=0"),
    ):
        with pytest.raises(MiniCPMVError, match=words):
            call()


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("[page 3]", [3]),
        ("[Pages 2-4, 7] and [p. 9]", [2, 3, 4, 7, 9]),
        ("[pages 2 and 5]", [2, 5]),
        ("[page 1, page 3]", [1, 3]),
        ("[pp. 1–2; 4]", [1, 2, 4]),
        ("page 3, [3], [page three], [figure 2]", []),
    ],
)
def test_pages_that_an_answer_names_are_found(text, pages):
    assert named_pages(text) == pages


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("```markdown\n# A\n```", "# A"),
        ("```\nA\n```\n", "A"),
        ("A\n```\ncode\n```", "A\n```\ncode\n```"),
        ("```\na\n```\ntext\n```\nb\n```", "```\na\n```\ntext\n```\nb\n```"),
    ],
)
def test_only_a_fence_around_the_whole_answer_is_taken_off(text, bare):
    assert unfenced(text) == bare


# ---- tables and languages ----


def test_tables_are_read_from_markdown_and_html_in_their_order(tmp_path):
    text = """# Bill

| item | price |
|---|--:|
| **pen** \\| ink | 1.50 |
| short row |

<table><tr><th rowspan="2">a</th><th colspan="2">b</th></tr>
<tr><td>c</td><td>d<br>e</td></tr></table>

Text.

x | y
--|--
1 | 2
"""
    bill, html, last = find_tables(text)
    assert bill == [["item", "price"], ["pen | ink", "1.50"], ["short row", ""]]
    assert html == [["a", "b", ""], ["", "c", "d e"]]
    assert last == [["x", "y"], ["1", "2"]]
    write_csv([*bill, ["a,b", 'c"d\ne']], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [*bill, ["a,b", 'c"d\ne']]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("# Rechnung\n\nBitte überweisen Sie den Betrag innerhalb von 14 Tagen auf unser Konto.", "de"),
        ("Please pay the amount within 14 days to the account given below.", "en"),
        ("请在十四天内将款项汇入以下账户。", "zh"),
    ],
)
def test_the_language_of_a_page_is_told(text, code):
    language = detect_language(text)
    assert language.code == code and 0 < language.confidence <= 1


@pytest.mark.parametrize("text", ["", "12 / 34 | 56", "OK"])
def test_too_little_text_has_no_language(text):
    assert detect_language(text) is None


# ---- real pages, a real model ----


def nano_page(name):
    return lambda sheet: sheet.drawImage(str(ASSETS / name), 0, 0, 200, 200)


@pytest.fixture(scope="module")
def nano_pdf(tmp_path_factory):
    """Two pages that nano can read: a number, and shapes."""
    path = tmp_path_factory.mktemp("pdf") / "two.pdf"
    return pdf_file(path, nano_page("number.jpg"), nano_page("shapes.jpg"), size=(200, 200))


def ask_nano(nano_model, nano_processor, *content, **options):
    messages = [{"role": "user", "content": list(content)}]
    return nano_model.chat(msgs=messages, processor=nano_processor, **{"max_new_tokens": 8, **GREEDY, **options})


def test_a_real_model_reads_a_real_pdf(nano_model, nano_processor, nano_pdf):
    prompts = Prompts(text="What does it say?", question="{question}", page="")
    reader = DocumentReader(nano_model, nano_processor, prompts=prompts, max_new_tokens=8)
    with OpenDocument(nano_pdf, dpi=100) as document:
        number, shapes = reader.read(document, "text")
        answers = reader.ask(document, ["How many shapes are there?", "What color is the circle?"])
        pages = [page.image for page in document]
    assert number.text == ask_nano(nano_model, nano_processor, pages[0], "What does it say?") and number.text
    assert shapes.text == ask_nano(nano_model, nano_processor, pages[1], "What does it say?")
    # The session's answers are those of a stateless conversation about the same pages.
    for answer, question in zip(answers, ("How many shapes are there?", "What color is the circle?"), strict=True):
        assert answer.text == ask_nano(nano_model, nano_processor, "", pages[0], "", pages[1], question)


def test_a_picture_from_memory_is_a_page():
    stream = BytesIO()
    Image.new("RGB", (20, 10)).save(stream, "PNG")
    with OpenDocument([stream.getvalue()]) as document:
        assert [page.image.size for page in document] == [(20, 10)]
