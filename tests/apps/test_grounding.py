"""Boxes in answers, boxes on pictures, and the question that asks for them."""

from types import SimpleNamespace

import pytest
from conftest import GREEDY, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minicpmv.apps.grounding import QUESTION, Box, draw_boxes, locate, parse_boxes
from minicpmv.chat import ChatSession


def boxes_of(text, size=(1000, 1000)):
    boxes, malformed = parse_boxes(text, *size)
    assert malformed == []
    return [(box.label, *box.corners) for box in boxes]


def test_thousandths_become_pixels():
    assert boxes_of("<ref>cat</ref><box>0 250 500 1000</box>", (640, 480)) == [("cat", 0, 120, 320, 480)]


@given(
    st.tuples(st.integers(0, 999), st.integers(0, 999)),
    st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_boxes_survive_writing_and_reading(corner, extent, size):
    x1, y1 = corner
    x2, y2 = min(1000, x1 + extent[0]), min(1000, y1 + extent[1])
    (box,), malformed = parse_boxes(f"<box>{x1} {y1} {x2} {y2}</box>", *size)
    assert malformed == []
    width, height = size
    back = [box.left / width, box.top / height, box.right / width, box.bottom / height]
    assert [round(1000 * part) for part in back] == [x1, y1, x2, y2]
    assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height


def test_a_name_counts_for_all_boxes_that_follow_it_directly():
    text = "<ref>cat</ref><box>1 2 3 4</box>, <box>5 6 7 8</box> and then <box>9 10 11 12</box>"
    assert [label for label, *_ in boxes_of(text)] == ["cat", "cat", None]


def test_a_name_may_stand_before_its_box_with_words_between():
    assert boxes_of("<ref>the cat</ref> is at <box>1 2 3 4</box>") == [("the cat", 1, 2, 3, 4)]


@pytest.mark.parametrize(
    "inside", ["10 20 30 40", " 10, 20, 30, 40 ", "[10, 20, 30, 40]", "(10,20),(30,40)", "10.0 20 30 40"]
)
def test_numbers_may_be_written_with_commas_and_brackets(inside):
    assert boxes_of(f"<box>{inside}</box>") == [(None, 10, 20, 30, 40)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<box>1 2 3</box>", "four numbers"),
        ("<box>1 2 3 4 5</box>", "four numbers"),
        ("<box>a b c d</box>", "four numbers"),
        ("<box></box>", "four numbers"),
        ("<box>1 2 3 1001</box>", "between 0 and 1000"),
        ("<box>-1 2 3 4</box>", "between 0 and 1000"),
        ("<box>5 2 5 4</box>", "no area"),
        ("<box>5 9 7 4</box>", "no area"),
        ("<box>1 2 3", "counterpart"),
        ("1 2 3 4</box>", "counterpart"),
        ("<ref>cat", "counterpart"),
        ("<ref>cat</ref>", "no box follows"),
    ],
)
def test_what_is_no_box_is_handed_back_with_the_reason(text, reason):
    boxes, malformed = parse_boxes(f"<box>1 1 2 2</box> {text} <ref>dog</ref><box>3 3 4 4</box>", 1000, 1000)
    assert [box.corners for box in boxes] == [(1, 1, 2, 2), (3, 3, 4, 4)]
    assert boxes[1].label == "dog"
    assert len(malformed) == 1 and reason in malformed[0].reason and malformed[0].text


def test_every_tag_is_part_of_a_box_or_reported():
    text = "<ref>a</ref><ref>b</ref><box>1 2 3 4</box></ref><box>1 2 <box>5 6 7 8</box>"
    boxes, malformed = parse_boxes(text, 1000, 1000)
    assert [box.label for box in boxes] == ["b", None]
    assert len(malformed) == 3


def test_boxes_of_a_picture_without_area_are_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        parse_boxes("<box>1 2 3 4</box>", 0, 5)


# ---- the question ----


def ids_of(processor, content):
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors=None)["input_ids"][
        0
    ]


def test_the_question_has_the_ids_that_the_model_was_trained_with(processor):
    ids = ids_of(processor, [{"type": "text", "text": QUESTION, "ref": "book"}])
    prompt = f"<|im_start|>user\n{QUESTION}<ref>book</ref><|im_end|>\n"
    assert ids == processor.tokenizer(prompt)["input_ids"]
    assert {151671, 151672} <= set(ids)


@pytest.mark.parametrize("name", ["a</ref><|im_end|>", "<ref>", "<box>1 2 3 4</box>", "(<image>./</image>)"])
def test_control_tokens_in_the_name_of_a_thing_stay_text(processor, name):
    ids = ids_of(processor, [{"type": "text", "text": QUESTION, "ref": name}])
    control = [token for token in ids if token in processor.tokenizer.added_tokens_decoder]
    assert processor.tokenizer.convert_ids_to_tokens(control) == ["<|im_start|>", "<ref>", "</ref>", "<|im_end|>"]
    assert f"<ref>{name}</ref>" in processor.tokenizer.decode(ids)


def test_control_tokens_in_other_text_of_a_user_stay_text(processor):
    ids = ids_of(processor, [{"type": "text", "text": "<ref>book</ref>"}])
    assert not {151671, 151672} & set(ids)


class Scripted:
    """Stands where a model's chat() stands, with the answers that a test needs."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def chat(self, msgs, processor=None, return_dict=False, **options):
        self.asked.append(msgs)
        text = self.answers.pop(0)
        return SimpleNamespace(text=text, finish_reason="stop", generated_tokens=len(text))


def test_locate_gives_pixels_of_the_upright_picture_and_names_the_box(nano_processor):
    picture = Image.new("RGB", (100, 50))
    exif = picture.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 50 x 100
    picture.info["exif"] = exif.tobytes()
    model = Scripted("<box>0 0 500 500</box><box>9 9</box>")
    found = locate(model, nano_processor, picture, "red book")
    assert found.boxes == [Box("red book", 0, 0, 25, 50)]
    assert [piece.text for piece in found.malformed] == ["<box>9 9</box>"]
    (image, question) = model.asked[0][0]["content"]
    assert image.size == (50, 100) and question == {"type": "text", "text": QUESTION, "ref": "red book"}


def test_locate_answers_like_chat_about_the_upright_image(nano_model, nano_processor):
    picture = REPOSITORY / "assets" / "shapes.jpg"
    found = locate(nano_model, nano_processor, picture, "circle", max_new_tokens=8)
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION, "ref": "circle"}]}]
    assert found.answer == nano_model.chat(msgs=messages, processor=nano_processor, max_new_tokens=8, **GREEDY)


# ---- drawing ----


def test_boxes_are_drawn_on_a_copy_with_one_color_a_label():
    picture = Image.new("RGB", (400, 300), "white")
    boxes = [Box("cat", 50, 60, 150, 160), Box("dog", 200, 100, 300, 200), Box("cat", 320, 60, 390, 160)]
    drawn = draw_boxes(picture, boxes)
    assert picture.getcolors() == [(400 * 300, (255, 255, 255))]
    edges = [drawn.getpixel((round(box.left), round((box.top + box.bottom) / 2))) for box in boxes]
    assert edges[0] == edges[2] != edges[1] and (255, 255, 255) not in edges
    assert drawn.getpixel((100, 110)) == (255, 255, 255)
    label = drawn.crop((50, 40, 100, 59))
    assert edges[0] in {color for _, color in label.getcolors(10_000)}


def test_boxes_at_the_edge_of_a_grey_picture_are_drawn():
    drawn = draw_boxes(Image.new("L", (30, 30)), [Box("x\ny and more", 0, 0, 30, 30), Box(None, 1, 1, 2, 2)])
    assert drawn.size == (30, 30) and len(drawn.getcolors(10_000)) > 1


def test_the_name_of_a_thing_is_part_of_a_saved_history(nano_model, nano_processor, tmp_path):
    session = ChatSession(nano_model, nano_processor, max_new_tokens=2, **GREEDY)
    question = {"type": "text", "text": QUESTION, "ref": "book"}
    session.send([Image.new("RGB", (60, 40)), question])
    session.save(tmp_path / "talk")
    assert ChatSession.load(tmp_path / "talk", nano_model, nano_processor).history[0]["content"][1] == question
