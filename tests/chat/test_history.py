"""Histories on disk: what is saved comes back, nothing else is read or deleted, and no accident breaks a folder."""

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading

import pytest
from conftest import GREEDY, REPOSITORY, wave_picture

from minicpmv.chat import ChatSession, HistoryError
from minicpmv.chat.history import load_history, save_history


FAST = {"max_new_tokens": 6, **GREEDY}
VIDEO = {"fps": 3, "max_num_packing": 6, "force_packing": 3}
PICTURES = [wave_picture(90, 70, 0), wave_picture(260, 180, 1), wave_picture(40, 150, 2)]
CLIPS = [[wave_picture(64, 48, k) for k in range(4)], REPOSITORY / "assets" / "star.mp4"]


@pytest.fixture(scope="module")
def processor(nano_processor):
    return nano_processor


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def start(model, processor):
    return lambda **options: ChatSession(model, processor, **{**FAST, **VIDEO, **options})


def question(*content):
    return {"role": "user", "content": list(content)}


def write_history(folder, *messages):
    folder.mkdir(exist_ok=True)
    (folder / "history.json").write_text(json.dumps({"format": 1, "messages": list(messages)}))


def test_a_history_survives_on_disk(model, processor, start, tmp_path):
    session = start(system_prompt="Be short!")
    encoded = model.encode_images(PICTURES[1], processor)
    session.send([PICTURES[0], encoded, "what 你好!"])
    session.send([{"type": "video", "video": CLIPS[0]}, CLIPS[1], "and"], enable_thinking=True, thinking_budget=2)
    session.save(tmp_path / "talk")
    session.send("one turn more")
    session.save(tmp_path / "talk")  # over the older one
    assert {path.suffix for path in (tmp_path / "talk").iterdir()} == {".json", ".png", ".mp4"}
    loaded = ChatSession.load(tmp_path / "talk", model, processor, **FAST, **VIDEO)
    assert [message["role"] for message in loaded.history] == [message["role"] for message in session.history]
    assert str(loaded.send("how many")) == str(session.send("how many"))
    loaded.reset()
    assert len(loaded.history) == 7


def test_saving_again_takes_away_what_the_older_history_left_and_nothing_else(start, tmp_path):
    session = start()
    session.send([*PICTURES[:2], "what"])
    session.save(tmp_path)
    old = set(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    session.reset()
    session.send([PICTURES[2], "and"])
    session.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(old) == 3 and len(names) == 3 and {"history.json", "notes.txt"} < names
    assert len(old & set(tmp_path.iterdir())) == 1


def test_a_loaded_history_goes_on_where_it_is_saved_without_its_oldest_turn(model, processor, start, tmp_path):
    session = start()
    for picture in PICTURES:
        session.send([picture, "what"])
    session.save(tmp_path)
    loaded = ChatSession.load(tmp_path, model, processor, max_media=3, **FAST)
    loaded.send([PICTURES[0], "and"])
    assert loaded.dropped_turns == 2
    loaded.save(tmp_path)
    output = loaded.send("how many")
    messages = loaded.history[:-1]
    for asked, picture in zip(messages[::2], [PICTURES[2], PICTURES[0]], strict=False):
        asked["content"] = [picture, asked["content"][-1]]
    answer = model.chat(msgs=messages, processor=processor, **FAST)
    assert output.raw_text == answer


def test_files_that_are_no_history_are_refused_and_left_alone(start, tmp_path):
    session = start()
    session.send("what")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(HistoryError, match="no saved history"):
        session.save(tmp_path / "mine")
    (tmp_path / "mine" / "history.json").write_text('{"format": 7, "pages": []}')  # of a browser, say
    with pytest.raises(HistoryError, match="format 1"):
        session.save(tmp_path / "mine")
    with pytest.raises(HistoryError, match="is a file"):
        session.save(tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(HistoryError, match="no saved history"):
        load_history(tmp_path / "nowhere")


FORMS = [
    lambda file: [{"type": "image", "image": file}],
    lambda file: {"type": "image", "image": file},
    lambda file: [{"type": "image", "url": file}],
    lambda file: [{"type": "image", "path": file}],
    lambda file: [{"type": "image_url", "image_url": {"url": file}}],
    lambda file: [{"type": "image", "image": "data:image/png;base64,aGk="}],
    lambda file: [{"type": "image", "image": "http://127.0.0.1:9/a.png"}],
    lambda file: [{"type": "image", "image": [file]}],
    lambda file: [{"type": "video", "video": [file, file]}],
    lambda file: [{"type": "text", "text": "a", "image": file}],
    lambda file: [{"type": "video", "video": file, "url": file}],
    lambda file: [[{"type": "image", "image": file}]],
    lambda file: [{"type": ["image"], "image": file}],
    lambda file: 7,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["/secret.png", "../secret.png", "link.png", "mine.png"])
def test_nothing_but_the_history_s_own_files_is_read(model, processor, tmp_path, form, name):
    folder = tmp_path / "talk"
    folder.mkdir()
    PICTURES[0].save(tmp_path / "secret.png")
    PICTURES[0].save(folder / "mine.png")  # in the folder, but not by this history
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    file = str(tmp_path) + name if name.startswith("/") else name
    write_history(folder, {"role": "user", "content": form(file)})
    with pytest.raises(HistoryError):
        ChatSession.load(folder, model, processor)


def test_a_history_that_names_foreign_files_deletes_none(processor, tmp_path):
    for name in ("thesis.docx", "outside.png"):
        (tmp_path / name).write_text("years of work")
    folder = tmp_path / "talk"
    folder.mkdir()
    (folder / "thesis.docx").write_text("years of work")
    names = ("thesis.docx", "history.json", "../outside.png", str(tmp_path / "thesis.docx"), "", ".")
    write_history(folder, {"role": "user", "content": [{"type": "image", "image": name} for name in names]})
    save_history([question("hi")], folder, processor)
    assert (folder / "thesis.docx").exists() and (tmp_path / "outside.png").exists()
    assert load_history(folder) == [question({"type": "text", "text": "hi"})]


def test_a_loaded_session_does_not_need_its_folder(model, processor, start, tmp_path):
    """Taken back, saved without the picture, and begun anew, here and in a fork: the picture is still there."""
    session = start()
    session.send([PICTURES[0], {"type": "video", "video": CLIPS[1]}, "what"])
    session.save(tmp_path / "talk")
    loaded = ChatSession.load(tmp_path / "talk", model, processor, **FAST, **VIDEO)
    fork = loaded.fork()
    loaded.undo()
    loaded.save(tmp_path / "talk")
    assert {path.name for path in (tmp_path / "talk").iterdir()} == {"history.json"}
    loaded.reset()
    expected = str(session.send("how many"))
    assert str(loaded.send("how many")) == str(fork.send("how many")) == expected
    loaded.save(tmp_path / "again")
    assert len(load_history(tmp_path / "again")) == 4


def test_two_writers_leave_a_whole_history(processor, tmp_path):
    errors = []

    def write(mine):
        try:
            for turn in range(12):
                save_history([question(PICTURES[turn % 3], PICTURES[mine], f"{mine}")], tmp_path / "talk", processor)
                load_history(tmp_path / "talk")
        except HistoryError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[mine]) for mine in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    (message,) = load_history(tmp_path / "talk")
    named = {part["image"] for part in json.loads((tmp_path / "talk" / "history.json").read_text())["messages"][0][
        "content"
    ] if part["type"] == "image"}  # fmt: skip
    assert {path.name for path in (tmp_path / "talk").iterdir()} == named | {"history.json"}
    assert message["content"][-1]["text"] in ("0", "1")


def test_a_save_that_was_killed_leaves_a_folder_for_the_next_one(processor, tmp_path):
    """Killed after its pictures were written, before there was a history: nothing of it is in the way."""
    script = f"""
        import os, sys
        sys.path[:0] = [{str(REPOSITORY)!r}]
        from types import SimpleNamespace
        from PIL import Image
        from minicpmv.chat import history

        processor = SimpleNamespace(read_part=lambda part: ("image", part), load_image=lambda image: image)
        history.json.dumps = lambda *args, **kwargs: os.kill(os.getpid(), 9)
        history.save_history([{{"role": "user", "content": [Image.new("RGB", (9, 9))]}}], {str(tmp_path / "talk")!r}, processor)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -9
    save_history([question(PICTURES[0])], tmp_path / "talk", processor)
    (name,) = (path.name for path in (tmp_path / "talk").iterdir() if path.suffix == ".png")
    (tmp_path / "talk" / "history.json").unlink()  # as if only the pictures had come so far
    save_history([question(PICTURES[1])], tmp_path / "talk", processor)
    assert name not in {path.name for path in (tmp_path / "talk").iterdir()}
    assert len(load_history(tmp_path / "talk")) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_what_is_saved_is_for_its_owner_alone(processor, tmp_path):
    for _ in range(2):
        save_history([question(PICTURES[0], {"type": "video", "video": CLIPS[1]})], tmp_path / "talk", processor)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "talk").iterdir()}
        assert modes == {0o600} and stat.S_IMODE((tmp_path / "talk").stat().st_mode) == 0o700
