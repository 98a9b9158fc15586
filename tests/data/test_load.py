"""Rows of every format become the same conversations; bad rows are named, or left out and counted, never replaced."""

import base64
import io
import json
import logging
import pickle
import zipfile

import pytest
from conftest import REPOSITORY
from PIL import Image


datasets = pytest.importorskip("datasets")
from minicpmv.data.formats import BadRowError, DataError, conversation_row, text_of  # noqa: E402
from minicpmv.data.load import load_conversations, read_conversations_file  # noqa: E402


ASSETS = REPOSITORY / "assets"
NUMBER, SHAPES, STAR = (str(ASSETS / name) for name in ("number.jpg", "shapes.jpg", "star.mp4"))


def text(value):
    return {"type": "text", "text": value}


def picture(path):
    return {"type": "image", "image": {"bytes": None, "path": path}}


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [
        {"role": role, "content": content if isinstance(content, list) else [text(content)]}
        for role, content in zip(roles, contents, strict=False)
    ]


def without_nones(value):
    """What comes back from Arrow, where every part has all keys."""
    if isinstance(value, dict):
        return {name: without_nones(item) for name, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def write_jsonl(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


QUESTION, ANSWER = "What number is this?", "47!"
PICTURE_FIRST = {"messages": turns([picture(NUMBER), text(QUESTION)], ANSWER)}
ROLE_CONTENT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FROM_VALUE = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
DATA_URL = "data:image/jpeg;base64," + base64.b64encode((ASSETS / "number.jpg").read_bytes()).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"image": NUMBER, "conversations": ROLE_CONTENT},
        {"image": NUMBER, "conversations": [{"role": "user", "content": f"<image>\n{QUESTION}"}, ROLE_CONTENT[1]]},
        {"image": {"<image_00>": NUMBER}, "conversations": ROLE_CONTENT},
        {"image": {"<image_00>": NUMBER}, "conversations": turns(f"<image_00>\n{QUESTION}", ANSWER)},
        {"images": [NUMBER], "conversations": FROM_VALUE},
        {"images": [NUMBER], "messages": turns(f"<image>{QUESTION}", ANSWER)},
        {"images": [NUMBER], "messages": turns([{"type": "image"}, text(QUESTION)], ANSWER)},
        {"images": [{"bytes": None, "path": NUMBER}], "messages": ROLE_CONTENT},
        {"image": NUMBER, "prompt": ROLE_CONTENT[:1], "completion": ROLE_CONTENT[1:]},
        {"image": NUMBER, "prompt": QUESTION, "completion": ANSWER},
        {"messages": turns([{"type": "image", "path": NUMBER}, text(QUESTION)], [text(ANSWER)])},
        {"messages": turns([{"type": "image_url", "image_url": {"url": NUMBER, "detail": "high"}}, QUESTION], ANSWER)},
        {"images": [NUMBER], "query": f"<image>{QUESTION}", "response": ANSWER},
        {"images": [NUMBER], "instruction": "<image>\nWhat number is", "input": "this?", "output": ANSWER},
    ],
    ids=[
        "front",
        "mark",
        "dict",
        "dict-mark",
        "from-value",
        "swift",
        "trl",
        "bytes-path",
        "completion",
        "text",
        "url",
        "openai",
        "query",
        "alpaca",
    ],
)
def test_the_same_conversation_in_any_format_gives_the_same_row(row):
    expected = PICTURE_FIRST | ({"train_on": "last"} if "completion" in row else {})
    if "instruction" in row:  # Alpaca's question and input are lines
        expected = {"messages": turns([picture(NUMBER), text("What number is\nthis?")], ANSWER)}
    assert conversation_row(row) == expected


def test_marks_say_where_pictures_stand_in_any_order_and_turn():
    row = {
        "id": 7,
        "image": {"<image_00>": NUMBER, "<image_01>": SHAPES},
        "conversations": turns("Is <image_01>\nlike\n<image_00>", "No.", "Why?", "Colors."),
    }
    first = [text("Is "), picture(SHAPES), text("like"), picture(NUMBER)]
    assert conversation_row(row) == {"messages": turns(first, "No.", "Why?", "Colors."), "id": "7"}
    flat = {"images": [NUMBER, SHAPES], "conversations": turns("A", "B", "<image><image>\n\nC", "D")}
    assert conversation_row(flat)["messages"][2]["content"] == [picture(NUMBER), picture(SHAPES), text("\nC")]


def test_the_name_of_a_region_stays_with_its_question_however_the_row_is_read(tmp_path):
    asked = text("Where is ") | {"ref": "the red star"}
    row = {"messages": turns([picture(NUMBER), asked], ANSWER)}
    assert conversation_row(row) == row
    (loaded,) = load_conversations(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert without_nones(loaded)["messages"] == without_nones(row)["messages"]
    assert [text_of(message) for message in loaded["messages"]] == ["Where is <ref>the red star</ref>", ANSWER]
    for marked, parts in (
        ("<image>\nWhere is ", [picture(NUMBER), asked]),
        ("Where is<image>", [text("Where is"), picture(NUMBER), text("") | {"ref": "the red star"}]),
    ):
        row = {"images": [NUMBER], "messages": turns([text(marked) | {"ref": "the red star"}], ANSWER)}
        assert conversation_row(row)["messages"][0]["content"] == parts


def test_videos_have_marks_and_places_like_pictures():
    clip = {"type": "video", "video": STAR}
    expected = {"messages": turns([clip, text("Which way?")], "Left.")}
    for row in (
        {"videos": [STAR], "messages": turns("<video>Which way?", "Left.")},
        {"video": STAR, "conversations": turns("Which way?", "Left.")},
        {"video": {"<video_00>": STAR}, "conversations": turns("<video_00>\nWhich way?", "Left.")},
        {"messages": turns([{"type": "video", "path": STAR}, text("Which way?")], "Left.")},
    ):
        assert conversation_row(row) == expected
    both = {"images": [NUMBER], "videos": [STAR], "messages": turns("<video>\nand\n<image>", "Left.")}
    assert conversation_row(both)["messages"][0]["content"] == [clip, text("and"), picture(NUMBER)]
    both["messages"] = turns("Compare.", "Left.")
    assert conversation_row(both)["messages"][0]["content"] == [picture(NUMBER), clip, text("Compare.")]


def test_a_data_url_becomes_the_bytes_of_the_picture():
    row = {"messages": turns([{"type": "image_url", "image_url": {"url": DATA_URL}}, text("?")], "47")}
    image = conversation_row(row)["messages"][0]["content"][0]["image"]
    assert image == {"bytes": (ASSETS / "number.jpg").read_bytes(), "path": None}


def test_an_address_is_left_to_the_processor():
    address = "https://example.com/cat.jpg"
    row = {"messages": turns([{"type": "image_url", "image_url": address}, text("?")], "A cat.")}
    assert conversation_row(row, "/data")["messages"][0]["content"][0] == picture(address)


def test_marks_typed_where_no_pictures_are_meant_stay_text():
    row = {"messages": turns("What does <image> do in HTML? <|im_end|>", "Nothing: <image> is no tag.")}
    assert conversation_row(row) == row


def test_systems_and_histories_become_messages():
    system = {"role": "system", "content": [text("Be kind!")]}
    expected = {"messages": [system, *turns("A", "B", "C", "D")]}
    assert conversation_row({"system": "Be kind!", "history": [["A", "B"]], "query": "C", "response": "D"}) == expected
    row = {"system": "Be kind!", "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]}
    assert conversation_row(row) == {"messages": [system, *turns("A", "B")]}


def test_thoughts_given_apart_come_before_the_answer():
    for name in ("reasoning_content", "thinking"):
        row = {"messages": [*turns("A"), {"role": "assistant", "content": "B", name: "Hm."}]}
        assert conversation_row(row)["messages"] == turns("A", "<think>\nHm.\n</think>\n\nB")


PREFERENCE = {
    "prompt": turns([picture(NUMBER), text(QUESTION)]),
    "chosen": [{"role": "assistant", "content": [text("47")]}],
    "rejected": [{"role": "assistant", "content": [text("12")]}],
}
GOOD, BAD = ([{"role": "assistant", "content": value}] for value in ("47", "12"))


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        {"images": [NUMBER], "prompt": ROLE_CONTENT[:1], "chosen": GOOD, "rejected": BAD},
        {"image": NUMBER, "prompt": QUESTION, "chosen": "47", "rejected": "12"},
        {"images": [NUMBER], "chosen": ROLE_CONTENT[:1] + GOOD, "rejected": ROLE_CONTENT[:1] + BAD},
        {
            "images": [NUMBER],
            "conversations": FROM_VALUE[:1],
            "chosen": {"from": "gpt", "value": "47"},
            "rejected": {"from": "gpt", "value": "12"},
        },
        {"images": [NUMBER], "messages": turns(f"<image>{QUESTION}", "47"), "rejected_response": "12"},
        {"images": [NUMBER], "instruction": f"<image>\n{QUESTION}", "chosen": "47", "rejected": "12"},
    ],
    ids=["own", "explicit", "text", "implicit", "from-value", "swift", "alpaca"],
)
def test_the_same_preference_in_any_format_gives_the_same_row(row):
    assert conversation_row(row) == PREFERENCE


def test_a_prompt_alone_and_other_columns_are_passed_on():
    row = {"prompt": ROLE_CONTENT[:1], "image": NUMBER, "solution": "47", "max_slice_nums": 1, "temporal_ids": [[-1]]}
    expected = {"prompt": PREFERENCE["prompt"], "solution": "47", "max_slice_nums": 1, "temporal_ids": [[-1]]}
    assert conversation_row(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "A"}, r"no conversation in the columns \['text'\]"),
        ([1], "mapping of columns"),
        ({"messages": []}, "list of messages"),
        ({"messages": ["A"]}, "mapping with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "'content' and 'value'"),
        ({"messages": [{"role": "user", "content": 5}]}, "text or a list of parts, not 5"),
        ({"messages": [{"role": "robot", "content": "A"}]}, "'robot' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "text, image or video"),
        ({"messages": [*ROLE_CONTENT[:1], ROLE_CONTENT[1] | {"loss": False}]}, "'loss' is not supported"),
        ({"messages": ROLE_CONTENT, "tools": [{"name": "f"}]}, "'tools' is not supported"),
        ({"messages": ROLE_CONTENT[:1]}, "the last message of 'messages' is the user's"),
        ({"messages": ROLE_CONTENT[1:]}, "no user's message"),
        ({"messages": turns("A", " \n")}, "message is empty"),
        ({"messages": turns("A", "<think>\nHm")}, "no end"),
        ({"messages": turns("A", "So <think>Hm</think> B")}, "begins with it"),
        ({"messages": turns("A", "<think>Hm</think> B </think> C")}, "at most one thought"),
        ({"messages": turns("A", [picture(NUMBER)])}, "model writes text only"),
        ({"messages": turns([text("A") | {"ref": 5}], "B")}, "name of what to find, a text, not 5"),
        ({"messages": turns("A", [text("B") | {"ref": "C"}])}, "a ref belongs to a question"),
        ({"messages": turns("A", "B"), "enable_thinking": True}, "the last answer has no thought"),
        ({"image": NUMBER, "conversations": turns("<image> and <image>?", "B")}, "they must agree"),
        ({"images": [NUMBER, SHAPES], "messages": turns("<image>?", "B")}, "they must agree"),
        ({"image": {"<image_00>": NUMBER}, "conversations": turns("<image_01>", "B")}, r"<image_01>.*<image_00>"),
        ({"image": {"cat": NUMBER}, "conversations": turns("A", "B")}, "keys of several images are their marks"),
        ({"conversations": turns("<image>\nA", "B")}, "they must agree"),
        ({"images": [], "messages": turns("<image>\nA", "B")}, "they must agree"),
        ({"messages": turns([{"type": "image"}, text("A")], "B")}, "1 places for images, but the row brings 0"),
        ({"images": [NUMBER] * 2, "messages": turns([{"type": "image"}, text("A")], "B")}, "brings 2"),
        ({"image": 5, "messages": ROLE_CONTENT}, "5 is not an image"),
        ({"videos": [[NUMBER, SHAPES]], "messages": ROLE_CONTENT}, "give frames as images"),
        ({"messages": turns([{"type": "image", "image": "data:image/png,x"}], "B")}, "base64"),
        ({"messages": turns([{"type": "image", "image": "data:image/png;base64,?"}], "B")}, "not valid base64"),
        ({"prompt": "A", "chosen": "B"}, "both columns"),
        ({"prompt": "A", "chosen": ROLE_CONTENT, "rejected": "B"}, "only what follows the prompt"),
        ({"chosen": ROLE_CONTENT, "rejected": ROLE_CONTENT}, "end differently"),
        ({"prompt": "A", "completion": ROLE_CONTENT}, "'completion' has 2 messages"),
    ],
)
def test_a_bad_row_says_why(row, reason, tmp_path):
    with pytest.raises(BadRowError, match=reason):
        conversation_row(row)
    path = write_jsonl(tmp_path / "rows.jsonl", [PICTURE_FIRST, row])
    with pytest.raises(BadRowError, match=f"rows.jsonl, row 1: .*{reason}") as caught:
        load_conversations(path)
    assert caught.value.index == 1


# ---- sources ----

MIXED = [
    {"id": "a", "image": "number.jpg", "conversations": ROLE_CONTENT, "max_slice_nums": 1},
    {"id": "b", "conversations": turns("Hello!", "Hi!")},
    {"id": "c", "image": {"<image_00>": "shapes.jpg"}, "conversations": turns("<image_00>\nHow many?", "2")},
    {"id": "d", "messages": turns([{"type": "image"}, text("?")], "47"), "images": [DATA_URL]},
    {"id": "e", "videos": ["star.mp4"], "messages": turns("<video>Which way?", "Left.")},
]
BROKEN = [
    *MIXED[:2],
    '{"id": "x", ',
    {"id": "y", "image": "missing.jpg", "conversations": ROLE_CONTENT},
    {"id": "z", "image": "not_a_picture.jpg", "conversations": ROLE_CONTENT},
    {"id": "v", "video": "missing.mp4", "conversations": ROLE_CONTENT},
    *MIXED[2:],
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["json", "jsonl", "bom"])
def test_a_file_of_mixed_formats_is_one_dataset(tmp_path, streaming, layout):
    path = tmp_path / ("rows.json" if layout == "json" else "rows.jsonl")
    content = json.dumps(MIXED, indent=1) if layout == "json" else "\n\n".join(map(json.dumps, MIXED)) + "\n"
    path.write_text(content, encoding="utf-8-sig" if layout == "bom" else "utf-8")
    dataset = load_conversations(path, image_folder=ASSETS, streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = [without_nones(row) for row in dataset]
    assert rows == [
        without_nones(conversation_row(row, ASSETS)) | {"origin": f"{path.name}[{index}]"}
        for index, row in enumerate(MIXED)
    ]
    # What Arrow gives back is a conversation row again.
    assert [without_nones(conversation_row(row)) for row in dataset] == rows


def test_relative_paths_begin_at_the_folder_of_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "pictures/a.png")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"image": "pictures/a.png", "conversations": ROLE_CONTENT}])
    (row,) = load_conversations(path)
    assert row["messages"][0]["content"][0]["image"]["path"] == str(tmp_path / "pictures/a.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_logged_and_counted_when_asked(tmp_path, caplog, streaming):
    (tmp_path / "assets").symlink_to(ASSETS)
    (tmp_path / "not_a_picture.jpg").write_text("hello")
    for name in ("number.jpg", "shapes.jpg", "star.mp4"):
        (tmp_path / name).symlink_to(ASSETS / name)
    path = write_jsonl(tmp_path / "rows.jsonl", BROKEN)
    with caplog.at_level(logging.WARNING):
        ids = [row["id"] for row in load_conversations(path, on_bad_row="skip", streaming=streaming)]
    assert ids == [row["id"] for row in MIXED]  # in order, none replaced
    for index, reason in (
        (2, "not valid JSON: Expecting"),
        (3, "there is no image"),
        (4, "cannot identify"),
        (5, "there is no video"),
    ):
        assert [f"row {index}: " in line and reason in line for line in caplog.messages].count(True) == 1
    assert "(4 so far)" in caplog.text and f"{path}: 4 of 9 rows were left out." in caplog.text
    for wrong in (3, 4, 5):
        write_jsonl(path, BROKEN[:2] + BROKEN[wrong : wrong + 1])
        with pytest.raises(BadRowError, match="row 2") as caught:
            list(load_conversations(path, streaming=streaming))
        assert caught.value.index == 2


def test_sources_that_cannot_be_read_say_so(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "A"}] * 2)
    with pytest.raises(DataError, match="no usable row; 2 bad ones were left out"):
        load_conversations(path, on_bad_row="skip")
    with pytest.raises(DataError, match="there is no file"):
        load_conversations(tmp_path / "none.json")
    with pytest.raises(DataError, match="have no splits"):
        load_conversations(path, split="train")
    with pytest.raises(DataError, match="JSON files only"):
        load_conversations([path, "someone/dataset"])
    with pytest.raises(DataError, match="a source is"):
        load_conversations(5)
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        load_conversations(path, on_bad_row="ignore")
    (tmp_path / "list.json").write_text('[{"messages": ')
    with pytest.raises(DataError, match="list.json is not valid JSON"):
        load_conversations(tmp_path / "list.json")
    write_jsonl(path, [{"messages": turns("A", "B"), "note": 1}, {"messages": turns("A", "B"), "note": "x"}])
    with pytest.raises(DataError, match="'note' holds values of different types"):
        load_conversations(path)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [row]) for n, row in enumerate((PICTURE_FIRST, PREFERENCE))]
    with pytest.raises(DataError, match="load each kind by itself"):
        load_conversations(files)
    write_jsonl(path, [{"messages": turns("A", "B")}, PREFERENCE])
    with pytest.raises(BadRowError, match="row 1: .*use a file for each"):
        load_conversations(path)


def test_several_files_are_shared_out_to_workers(tmp_path):
    from torch.utils.data import DataLoader

    files = [
        write_jsonl(tmp_path / f"{number}.jsonl", [{"messages": turns(f"{number}{place}", "B")} for place in "ab"])
        for number in range(3)
    ]
    stream = load_conversations(files, streaming=True)
    assert stream.num_shards == 3
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["origin"] for row in loader) == [f"{n}.jsonl[{place}]" for n in range(3) for place in range(2)]
    assert len(list(read_conversations_file(files[0]))) == 2


def embedded(count=4, bad=None):
    """A dataset of the Hub's usual kind: pictures as JPEG inside, decoded on access."""
    rows = [
        {
            "images": [{"bytes": b"nothing" if index == bad else jpeg((index * 40, 9, 9)), "path": None}],
            "messages": turns(f"Picture {index}?", "Red."),
            "solution": index,
        }
        for index in range(count)
    ]
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "solution": datasets.Value("int32"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_inside_a_dataset_keep_their_compression(streaming):
    dataset = load_conversations(embedded(), streaming=streaming)
    for index, row in enumerate(dataset):
        first = row["messages"][0]["content"][0]
        assert first["image"]["bytes"] == jpeg((index * 40, 9, 9))
        assert (row["solution"], row["origin"]) == (index, f"dataset[{index}]")
    assert index == 3
    if not streaming:
        assert dataset.features["solution"].dtype == "int32" and dataset.format["type"] is None


def test_streams_can_be_sent_to_spawned_workers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    for source in (embedded(), path):
        stream = load_conversations(source, image_folder=ASSETS, streaming=True, on_bad_row="skip")
        assert list(pickle.loads(pickle.dumps(stream))) == list(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_dataset_is_named_or_left_out(streaming, caplog):
    with pytest.raises(BadRowError, match="dataset, row 2: the image in bytes cannot be read") as caught:
        list(load_conversations(embedded(bad=2), streaming=streaming))
    assert caught.value.index == 2
    with caplog.at_level(logging.WARNING):
        kept = load_conversations(embedded(bad=0), streaming=streaming, on_bad_row="skip")
        assert [row["solution"] for row in kept] == [1, 2, 3]
    assert "dataset, row 0" in caplog.text and "(1 so far)" in caplog.text


def test_a_stream_of_python_objects_passes_decoded_pictures_on():
    red = Image.new("RGB", (40, 30), "red")

    def generate():
        yield {"image": red, "messages": ROLE_CONTENT}

    (row,) = load_conversations(datasets.IterableDataset.from_generator(generate))
    assert row["messages"][0]["content"][0]["image"] is red


def test_splits_are_chosen_by_name_and_only_where_there_are_several(tmp_path):
    one = embedded(2)
    two = datasets.DatasetDict({"train": one, "test": embedded(3)})
    assert len(load_conversations(two, split="test")) == 3
    assert len(load_conversations(datasets.DatasetDict({"train": one}))) == 2
    with pytest.raises(DataError, match="split=None is none of the dataset's: train, test"):
        load_conversations(two)
    with pytest.raises(DataError, match="the source is one dataset"):
        load_conversations(one, split="train")
    two.save_to_disk(tmp_path / "saved")
    assert len(load_conversations(tmp_path / "saved", split="test")) == 3


def test_folders_load_as_datasets_does_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    embedded(3).to_parquet(folder / "train.parquet")
    assert len(load_conversations(folder, split="train[:2]")) == 2
    assert [row["solution"] for row in load_conversations(str(folder), split="train", streaming=True)] == [0, 1, 2]


def test_pictures_in_other_file_systems_are_fetched(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg("red"))
    rows = [
        {"image": f"zip://{name}::{tmp_path / 'pictures.zip'}", "messages": ROLE_CONTENT}
        for name in ("a.jpg", "b.jpg")
    ]
    (row,) = load_conversations(write_jsonl(tmp_path / "rows.jsonl", rows[:1]))
    assert row["messages"][0]["content"][0]["image"]["bytes"] == jpeg("red")
    with pytest.raises(BadRowError, match="row 1: there is no image"):
        load_conversations(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_the_example_in_assets_has_rows_with_pictures_a_clip_and_text_alone():
    dataset = load_conversations(ASSETS / "conversations.jsonl")
    kinds = [[part["type"] for message in row["messages"] for part in message["content"]] for row in dataset]
    media = [(kind.count("image"), kind.count("video")) for kind in kinds]
    assert media == [(1, 0)] * 3 + [(0, 1)] + [(0, 0)] * 2
