"""OmniDocBench: what of a page is compared, what stands for what, and how pages are averaged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.omnidocbench import omnidocbench, omnidocbench_distance
from minicpmv.evaluate.scoring.page_markdown import comparable_formula, comparable_table, comparable_text, elements_of
from minicpmv.evaluate.scoring.page_matching import quick_match, simple_match
from minicpmv.evaluate.scoring.teds import teds


def text(content, order, category="text_block", **more):
    return {"category_type": category, "anno_id": order, "order": order, "text": content, **more}


def table(html, order=1):
    return {"category_type": "table", "anno_id": order, "order": order, "html": html, "latex": ""}


def formula(latex, order=1):
    return {"category_type": "equation_isolated", "anno_id": order, "order": order, "latex": latex}


def test_blanks_and_punctuation_do_not_count():
    scores = omnidocbench("Hello brave world.", [text("Hello brave new world.", 1)])
    assert scores["text_block"] == pytest.approx(3 / 18) and scores["reading_order"] == 0
    assert scores["score"] == pytest.approx(1 - 1.5 / 18) and scores["table"] is None


def test_the_order_counts_apart_from_the_text():
    boxes = [text("First paragraph here is long.", 1), text("Second paragraph here is long.", 2)]
    scores = omnidocbench("Second paragraph here is long.\n\nFirst paragraph here is long.", boxes)
    assert (scores["text_block"], scores["reading_order"]) == (0, 1)


def test_heading_marks_and_what_is_not_counted_do_no_harm():
    boxes = [text("Title here", 1, "title"), text("Body text goes here.", 2), text("page 7", 3, "page_number")]
    for reply in ("# Title here\n\nBody text goes here.\n\npage 7", "# Title here\n\nBody text goes here."):
        assert omnidocbench(reply, boxes)["text_block"] == 0


def test_a_text_in_two_paragraphs_is_put_together():
    boxes = [text("The quick brown fox jumps over the lazy dog", 1), text("Something else stands here", 2)]
    reply = "The quick brown fox\n\njumps over the lazy dog\n\nSomething else stands here"
    assert omnidocbench(reply, boxes)["text_block"] == 0


def test_texts_that_a_column_cuts_are_joined():
    relation = {"relation_type": "truncated", "source_anno_id": 1, "target_anno_id": 2}
    page = {"layout_dets": [text("one half ", 1), text("and the other", 2)], "extra": {"relation": [relation]}}
    assert omnidocbench("one half and the other", page)["text_block"] == 0


def test_a_missing_text_counts_twice_where_nothing_is_left_for_it():
    boxes = [text("a" * 10, 1), text("b" * 10, 2)]
    assert omnidocbench("a" * 10, boxes)["text_block"] == pytest.approx(20 / 30)


def test_strict_counts_once_what_has_no_match_on_either_side():
    boxes = [text("a" * 10, 1), text("b" * 10, 2)]
    assert omnidocbench("a" * 10, boxes, strict=True)["text_block"] == pytest.approx(10 / 20)
    reply = "a" * 10 + "\n\n" + "c" * 10 + "\n\n" + "d" * 10
    assert omnidocbench(reply, boxes)["text_block"] == pytest.approx(10 / 20)  # ten characters are lost
    assert omnidocbench(reply, boxes, strict=True)["text_block"] == pytest.approx(20 / 30)


@pytest.mark.parametrize(
    "reply, latex, distance",
    [
        ("$$E = mc^2$$", "E=mc^2", 0),
        (r"\[ \mathrm{E} = mc^2 \tag{1} \]", "E=mc^2", 0.25),  # braces stay
        ("no formula", "E=mc^2", 1),
        (r"It says \(E=mc^2\) there", "$$E=mc^2$$", 4 / 10),  # inline ones count; dollars of the reference stay
    ],
)
def test_formulas_without_fonts_tags_and_blanks(reply, latex, distance):
    assert omnidocbench(reply, [formula(latex)])["display_formula"] == pytest.approx(distance)


HTML = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>"


def test_a_wrong_cell_costs_its_share_of_the_tree():
    scores = omnidocbench(HTML.replace("d</td>", "x</td>"), [table(HTML)])
    assert (scores["teds"], scores["teds_structure"]) == (pytest.approx(5 / 6), 1)
    assert scores["table"] == pytest.approx(1 / 111)


def test_markdown_tables_are_tables_and_lose_rows_with_a_colon():
    assert omnidocbench("| a | b |\n|---|---|\n| c | d |\n", [table(HTML)])["teds"] == 1
    html = HTML.replace("<td>c", "<td>c:")
    reply = "A line above\n| a | b |\n|---|:-:|\n| c: | d |\n"
    assert omnidocbench(reply, [table(html)])["teds"] < 1
    strict = omnidocbench(reply, [table(html), text("A line above", 2)], strict=True)
    assert (strict["teds"], strict["text_block"]) == (1, 0)


def test_a_table_that_is_not_there_scores_nothing():
    scores = omnidocbench("text only", [table(HTML)])
    assert (scores["table"], scores["teds"]) == (1, 0)


def test_pages_are_averaged_by_kind_and_the_four_make_the_figure():
    boxes = [text("Body text goes here.", 1), formula("a=b", 2), table(HTML, 3)]
    page = {"layout_dets": boxes, "page_info": {"page_attribute": {"language": "english"}}}
    right = omnidocbench("Body text goes here.\n\n$$a=b$$\n\n" + HTML, page)
    wrong = omnidocbench("", page)
    assert right["language"] == "english" and right["score"] == 1
    means = omnidocbench_distance([right, wrong])
    assert means == {
        "overall": 0.5,
        "text_block": 0.5,
        "display_formula": 0.5,
        "table": 0.5,
        "reading_order": 0.5,
        "teds": 0.5,
        "teds_structure": 0.5,
    }
    only_text = omnidocbench_distance([omnidocbench("x", [text("x", 1)])])
    assert only_text["overall"] is None and only_text["text_block"] == 0


def test_elements_of_a_page_in_their_order():
    reply = "# Head\n\n$$x$$\n\n" + HTML + "\n\nEnd with $y_1$"
    found = [(element.kind, element.content) for element in elements_of(reply)]
    assert [content for kind, content in found if kind == "text"] == ["# Head", "End with $y_1$"]
    assert [content for kind, content in found if kind == "formula"] == [r"\[x\]", r"\[y_1\]"]
    assert [content for kind, content in found if kind == "table"] == [HTML]


def test_forms_in_which_texts_formulas_and_tables_are_compared():
    assert comparable_text("It is $\\alpha^2$, 中文: a_b!") == "Itisα2中文a_b"
    assert comparable_formula(r"\[\mathbf{X} \quad = 1.\]") == "{x}=1"
    assert comparable_table("no table") == ""
    th = comparable_table('<table class="c"><thead><tr><th colspan="2"><span>A</span></th></tr></thead></table>')
    assert th == '<html><body><table border="1" ><tr><td colspan="2">A</td></tr></table></body></html>'


words = st.text("ab \n|$#<>\\[]{}`:-", max_size=40)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=8), max_size=5),
    st.lists(st.text("abc", min_size=1, max_size=8), max_size=5),
)
def test_every_reference_is_matched_and_simply_with_no_part_of_the_reply_twice(references, answers):
    for match_all in (quick_match, simple_match):
        matches = match_all(references, answers)
        assert {place for match in matches for place in match.references} == set(range(len(references)))
        used = [place for match in matches for place in match.answers]
        assert set(used) <= set(range(len(answers)))
        assert match_all is quick_match or len(used) == len(set(used))


@settings(max_examples=100, deadline=None)
@given(words)
def test_any_reply_can_be_scored(reply):
    scores = omnidocbench(reply, [text("ab ab", 1), formula("a", 2), table(HTML, 3)])
    assert all(0 <= scores[kind] <= 1 for kind in ("text_block", "display_formula", "table"))


@given(st.lists(st.lists(st.text("ab", max_size=3), min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_table_is_like_itself_alone(rows):
    page = "<html><body><table>{}</table></body></html>"
    html = page.format("".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows))
    assert teds(html, html) == 1
    assert teds(html, page.format("<tr><td>ccccc</td></tr>" * 5)) < 1
    assert teds(html, "") == teds("<p>no table</p>", html) == 0
