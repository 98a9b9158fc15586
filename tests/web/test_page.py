"""`minicpmv web` with nano, in headless Chromium, as a person uses it."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import GREEDY, REPOSITORY
from PIL import Image
from playwright.sync_api import Error, expect, sync_playwright
from typer.testing import CliRunner

from minicpmv import checkpoint
from minicpmv.commands.main import app as cli
from minicpmv.web import page as web_page
from minicpmv.web.conversation import MOST_PAGES, Conversation, ConversationError, Conversations, Settings
from minicpmv.web.view import render


ASSETS = REPOSITORY / "assets"
NANO = REPOSITORY / "nano"
SHAPES, NUMBER, STAR = (str(ASSETS / name) for name in ("shapes.jpg", "number.jpg", "star.mp4"))
PHONE = {"width": 390, "height": 844}
WAIT = 180_000  # milliseconds: the machine may be busy
BROWSER_OPTIONS = [
    "--no-sandbox",  # Chromium has none for root
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def conversations(nano):
    return Conversations(*nano)


@pytest.fixture(scope="module")
def app(conversations):
    page = web_page.build(conversations, "nano")
    _, page.url, _ = web_page.launch(page, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


def find_chromium(playwright):
    """None for Playwright's own Chromium (`playwright install chromium`), else the path of the system's."""
    if os.path.exists(playwright.chromium.executable_path):
        return None
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("A browser is needed: apt-get install chromium, or python -m playwright install chromium")
    return found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(playwright), args=BROWSER_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_tab(app, browser):
    """A function that opens the page in a browser of its own."""
    contexts = []

    def open_tab(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT)
        tab.goto(app.url)
        tab.locator("#box textarea").wait_for()
        return tab

    yield open_tab
    for context in contexts:
        context.close()


def slowly(ids, scores):
    """A stopping criterion that stops nothing: a busy browser must keep up, and not come too late for an answer of 2,048 tokens."""
    time.sleep(0.25)
    return torch.zeros(len(ids), dtype=torch.bool)


@pytest.fixture
def endless(monkeypatch):
    """Answers that do not end by themselves before their limit."""
    of_answer = Settings.of_answer.fget
    own = {"stopping_criteria": [slowly]}
    long = property(lambda self: {**of_answer(self), "min_new_tokens": self.max_new_tokens, **own})
    monkeypatch.setattr(Settings, "of_answer", long)


def attach(tab, *files):
    tab.set_input_files("#box input[type=file]", list(files))
    expect(tab.locator("#box .thumbnail-item")).to_have_count(len(files))


def send(tab, question):
    tab.fill("#box textarea", question)
    tab.click("#box .submit-button")


@contextmanager
def answered(tab):
    """Do what makes the model answer, and wait for the end: what the page shows before and after may be the same."""
    with tab.expect_event("requestfinished", lambda request: "/run/predict" in request.url):  # gives the box back
        yield
    idle(tab)


def ask(tab, question, *files):
    """Ask, and wait for the end of the answer."""
    turns = users(tab).count()
    if files:
        attach(tab, *files)
    with answered(tab):
        send(tab, question)
    expect(users(tab).nth(turns)).to_be_visible()  # one more than before: the question may be an old one
    expect(tab.locator("#chat .user-row [data-testid=user]").filter(has_text=question).last).to_be_visible()
    expect(tab.locator("#view .spent")).to_be_visible()
    assert users(tab).count() > turns


def idle(tab):
    expect(tab.locator("#box .submit-button")).to_be_visible()
    expect(tab.locator("#box .stop-button")).to_have_count(0)


def users(tab):
    return tab.locator("#chat .user-row")


def answer(tab):
    return tab.locator("#chat .bot-row").last.locator("[data-testid=bot]").last


def change(tab, **settings):
    """Set settings by their labels, where _ stands for a space."""
    if not tab.locator("#settings input").first.is_visible():
        tab.locator("#settings button").first.click()
    for label, value in settings.items():
        field = tab.get_by_label(f"number input for {label.replace('_', ' ')}", exact=True)
        field.fill(str(value))
        field.press("Tab")


def asked_greedily(nano, *content, **options):
    model, processor = nano
    msgs = [{"role": "user", "content": list(content)}]
    return model.chat(msgs=msgs, processor=processor, return_dict=True, max_new_tokens=64, **GREEDY | options)


def shown_text(text):
    """Text without what Markdown makes of it."""
    return re.sub(r"\s+", " ", text).strip()


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "minicpmv-chat"]


# ---- conversations ----


def test_a_picture_and_a_question_get_the_answer_of_chat_and_show_the_slices(open_tab, nano):
    """Without a touch of the sliders: how nano decodes is in its checkpoint."""
    tab = open_tab()
    change(tab, Longest_answer=64)
    ask(tab, "How many shapes are there?", SHAPES)
    expected = asked_greedily(nano, Image.open(SHAPES), "How many shapes are there?")
    assert shown_text(answer(tab).inner_text()) == shown_text(expected.text or "(no answer)")
    assert users(tab).locator("img").count() == 1

    processor = nano[1]
    columns, rows = processor.image_processor.get_slice_layout((640, 480)).grid
    expect(tab.locator("#view .cell")).to_have_count(columns * rows)
    tokens = (columns * rows + 1) * processor.image_processor.image_feature_size
    assert tab.locator("#view .legend .images").inner_text() == f"{tokens} images"
    assert tab.locator("#view .legend .text").inner_text() == f"{expected.prompt_tokens - tokens} text"
    assert tab.locator("#view .legend .answer").inner_text() == f"{expected.generated_tokens} answer"

    ask(tab, "And what is in this one?", NUMBER)  # the conversation goes on, with several pictures
    expect(tab.locator("#view .seen h4")).to_have_text([re.compile("number.jpg"), re.compile("shapes.jpg")])
    assert "kept from before" in tab.locator("#view .spent p").inner_text()

    with answered(tab):
        tab.get_by_role("button", name="Retry").last.click()
    expect(tab.locator("#view .spent p")).to_contain_text("kept from before")
    assert users(tab).count() == 2
    tab.get_by_role("button", name="Undo").last.click()
    expect(users(tab)).to_have_count(1)
    assert tab.locator("#box textarea").input_value() == "And what is in this one?"
    expect(tab.locator("#box .thumbnail-item")).to_have_count(1)

    tab.click("#new-chat")
    expect(users(tab)).to_have_count(0)
    expect(tab.locator("#view .seen")).to_have_count(0)


def test_an_answer_streams_and_the_stop_button_stops_the_model(open_tab, endless):
    tab = open_tab()
    change(tab, Temperature=1)
    send(tab, "Tell a long story.")
    expect(tab.locator("#box .stop-button")).to_be_visible()
    expect(answer(tab)).not_to_have_text(re.compile(r"^\s*…?\s*$"))
    early = answer(tab).inner_text()
    tab.wait_for_function(
        "early => [...document.querySelectorAll('#chat [data-testid=bot]')].at(-1).innerText.length > early",
        arg=len(early),
    )
    assert writers()
    tab.click("#box .stop-button")
    idle(tab)
    assert not writers()
    expect(tab.locator("#view .spent")).to_contain_text("stopped")
    kept = answer(tab).inner_text()
    assert len(kept) > len(early)
    change(tab, Longest_answer=16)
    ask(tab, "And then?")
    assert users(tab).count() == 2
    assert "reached its limit" in tab.locator("#view .spent").inner_text()
    assert tab.locator("#chat .bot-row").first.inner_text() == kept


def test_leaving_the_page_stops_the_model_and_coming_back_shows_the_conversation(open_tab, endless):
    tab = open_tab()
    change(tab, Temperature=1)
    send(tab, "Tell a story until I leave.")
    expect(tab.locator("#box .stop-button")).to_be_visible()
    expect(answer(tab)).not_to_have_text(re.compile(r"^\s*…?\s*$"))
    assert writers()
    address = tab.url
    tab.goto("about:blank")
    deadline = time.monotonic() + 60
    while writers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not writers()
    tab.goto(address)
    expect(users(tab)).to_have_text([re.compile("until I leave")])
    expect(tab.locator("#view .spent")).to_contain_text("stopped")


def test_a_reload_keeps_the_conversation_and_another_tab_has_its_own(open_tab):
    tab = open_tab()
    change(tab, Longest_answer=16)
    ask(tab, "How many shapes are there?", SHAPES)
    said = tab.locator("#chat").inner_text()
    tab.reload()
    expect(users(tab).locator("img")).to_have_count(1)
    assert tab.locator("#chat").inner_text() == said and "shapes.jpg" in tab.locator("#view").inner_text()
    other = tab.context.new_page()
    other.goto(tab.url)
    other.locator("#box textarea").wait_for()
    expect(other.get_by_role("button", name="How many shapes are there?")).to_be_visible()  # an example
    expect(users(other)).to_have_count(0)
    change(tab, Longest_answer=16)
    ask(tab, "And what color?")
    expect(users(tab)).to_have_count(2)
    tab.click("#new-chat")
    expect(users(tab)).to_have_count(0)
    tab.reload()
    tab.locator("#box textarea").wait_for()
    expect(users(tab)).to_have_count(0)


def test_the_pages_of_a_pdf_are_images(open_tab, tmp_path):
    tab = open_tab()
    change(tab, Longest_answer=16)
    pages = [Image.open(NUMBER).resize((200, 150)), Image.open(SHAPES).resize((200, 150))]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    ask(tab, "What does it say?", str(tmp_path / "two.pdf"))
    expect(tab.locator("#view .seen h4")).to_have_text([re.compile("two, page 2"), re.compile("two, page 1")])
    expect(users(tab).locator("img")).to_have_count(2)


def test_a_thought_is_folded_apart_from_the_answer(open_tab, nano):
    tab = open_tab()
    change(tab, Temperature=0, Longest_answer=64)
    tab.locator("#thinking label", has_text="On").click()
    ask(tab, "What is 7 + 5?", str(ASSETS / "sum.jpg"))
    expected = asked_greedily(nano, Image.open(ASSETS / "sum.jpg"), "What is 7 + 5?", enable_thinking=True)
    thought = tab.locator("#chat .bot-row .thought-group")
    assert thought.count() == bool(expected.reasoning)
    if expected.reasoning:
        expect(thought.locator(".title")).to_contain_text("Thought")
        words = thought.locator(".message-content")
        expect(words).not_to_be_visible()
        thought.locator(".title").click()
        expect(words).to_be_visible()
        assert shown_text(words.inner_text()) == shown_text(expected.reasoning)
    if expected.text:
        assert shown_text(answer(tab).inner_text()) == shown_text(expected.text)
    assert tab.locator("#view .legend .thought").inner_text() == f"{expected.reasoning_tokens} thought"


def test_a_clip_shows_its_packed_frames_with_their_times(open_tab, nano):
    tab = open_tab()
    change(tab, Longest_answer=16, Frames_in_a_group=4, Frames_per_second_of_a_video=5)
    ask(tab, "Which way does the shape move?", STAR)
    sampled = nano[1].video_processor.sample_video(STAR, fps=5, max_num_packing=6, force_packing=4).metadata
    expect(tab.locator("#view .group")).to_have_count(sampled.num_groups)
    assert tab.locator("#view .frame").all_inner_texts() == [f"{seconds:.2f} s" for seconds in sampled.timestamps]
    assert tab.locator("#view .legend .images").inner_text() == f"{sampled.num_tokens} images"
    expect(users(tab).locator("video")).to_have_count(1)


def test_two_tabs_do_not_mix(open_tab):
    first, second = open_tab(), open_tab()
    for tab in (first, second):
        change(tab, Longest_answer=48)
    attach(first, SHAPES)
    attach(second, NUMBER)
    send(first, "First question?")
    send(second, "Second question?")
    for tab, own, other in ((first, "shapes.jpg", "number.jpg"), (second, "number.jpg", "shapes.jpg")):
        expect(tab.locator("#view .spent")).to_be_visible()
        idle(tab)
        assert users(tab).count() == 1
        assert own in tab.locator("#view").inner_text() and other not in tab.locator("#view").inner_text()
    assert "First" in users(first).inner_text() and "Second" in users(second).inner_text()


def test_examples_are_asked_by_a_click(open_tab):
    tab = open_tab()
    change(tab, Longest_answer=16)
    tab.get_by_role("button", name="How many shapes are there?").click()
    expect(tab.locator("#view .spent")).to_be_visible()
    assert "shapes.jpg" in tab.locator("#view").inner_text()


def test_pictures_are_pasted_dropped_and_taken_with_the_camera(open_tab):
    tab = open_tab(permissions=["camera"])
    data = list((ASSETS / "number.jpg").read_bytes())
    script = """([target, type, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], `${type}.jpg`, {type: "image/jpeg"}));
        const options = {bubbles: true, cancelable: true};
        target.dispatchEvent(type === "paste" ? new ClipboardEvent(type, {...options, clipboardData: data})
                                              : new DragEvent(type, {...options, dataTransfer: data}));
    }"""
    tab.evaluate(script, [tab.locator("#box textarea").element_handle(), "paste", data])
    expect(tab.locator("#box .thumbnail-item")).to_have_count(1)
    tab.evaluate(script, [tab.locator("#box .full-container").element_handle(), "drop", data])
    expect(tab.locator("#box .thumbnail-item")).to_have_count(2)
    tab.click("#snap")
    tab.get_by_text("Click to Access Webcam").click()
    # Before its first frame, there is nothing to take.
    tab.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    tab.get_by_role("button", name="capture photo").click()
    expect(tab.locator("#box .thumbnail-item")).to_have_count(3)
    expect(tab.locator("#camera")).to_have_count(0)
    change(tab, Longest_answer=16)
    send(tab, "What are these?")
    expect(tab.locator("#view .seen")).to_have_count(3)


# ---- what goes wrong ----


@pytest.fixture
def broken(tmp_path):
    """Files that are no pictures or clips, by what their message says."""
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    contents = {
        "torn.jpg": ((ASSETS / "shapes.jpg").read_bytes()[:3000], "as JPEG or PNG"),
        "huge.png": (bomb.getvalue(), "or smaller"),
        "words.mp4": (b"These are no frames.", "cannot be read as a video.*as MP4"),
        "words.pdf": (b"These are no pages.", "not a PDF.*Save it again"),
    }
    for name, (data, _) in contents.items():
        (tmp_path / name).write_bytes(data)
    return {tmp_path / name: message for name, (_, message) in contents.items()}


def test_an_error_is_told_and_changes_nothing(open_tab, broken, tmp_path):
    tab = open_tab()
    change(tab, Longest_answer=16)
    ask(tab, "What is this?", SHAPES)
    before = tab.locator("#chat").inner_text()
    for file, message in broken.items():
        attach(tab, str(file))
        send(tab, "And this?")
        unwanted = "Traceback|/tmp|[0-9a-f]{32}|Warning|numpy|tensor"
        expect(tab.locator(".toast-body")).to_have_text(
            re.compile(rf"^(?!.*({unwanted}))(?=.*Error)(?=.*{re.escape(file.name)}).*{message}", re.DOTALL)
        )
        idle(tab)
        assert tab.locator("#chat").inner_text() == before
        assert tab.locator("#box textarea").input_value() == "And this?"  # with the file, to be mended
        tab.locator("#box .delete-button").click()
        tab.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
        expect(tab.locator(".toast-body")).to_have_count(0)
    tab.fill("#box textarea", "")
    tab.press("#box textarea", "Enter")
    expect(tab.locator(".toast-body").last).to_contain_text("Write a question")
    (tmp_path / "notes.txt").write_text("no picture")
    tab.set_input_files("#box input[type=file]", str(tmp_path / "notes.txt"))
    expect(tab.locator(".toast-body").last).to_contain_text(re.compile("type", re.IGNORECASE))
    corner = tab.locator("#new-chat").bounding_box()
    toast = tab.locator(".toast-body").last.bounding_box()
    assert toast["y"] >= corner["y"] + corner["height"]  # the button stays free
    tab.reload()
    ask(tab, "Is it still there?")


def test_limits_are_told_in_the_words_of_the_sliders(open_tab, nano):
    tab = open_tab()
    change(tab, Longest_answer=nano[0].config.max_position_embeddings // 2)
    send(tab, "1 2 3 4 5 6 7 8 " * 200)
    expect(tab.locator(".toast-body")).to_contain_text("Longest answer")
    assert "max_new_tokens" not in tab.locator(".toast-body").inner_text()


def test_a_conversation_that_the_server_forgot_begins_anew_and_says_so(open_tab, conversations):
    tab = open_tab()
    change(tab, Longest_answer=16)
    ask(tab, "What is 1 + 1?")
    conversations.clear()
    send(tab, "What did I ask?")
    expect(tab.locator(".toast-body")).to_contain_text("no longer keeps")
    expect(users(tab)).to_have_count(1)
    idle(tab)


def test_the_browser_loads_nothing_from_elsewhere(open_tab, tmp_path):
    tab = open_tab()
    other = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{other.server_port}/"
    assert urllib.request.urlopen(address).status == 200
    with pytest.raises(Error, match="fetch"):
        tab.evaluate("address => fetch(address, {mode: 'no-cors'})", address)
    script = "address => new Promise(done => { const i = new Image(); i.onload = i.onerror = e => done(e.type); i.src = address; })"
    assert tab.evaluate(script, address) == "error"
    other.shutdown()
    other.server_close()

    hosts = []
    tab.on("request", lambda request: hosts.append(request.url))
    tab.reload()
    tab.locator("#box textarea").wait_for()
    origin = re.match("https?://[^/]+/", tab.url)[0]
    assert hosts and all(url.startswith((origin, "data:", "blob:")) for url in hosts)


def test_on_a_phone_everything_fits(open_tab):
    tab = open_tab(viewport=PHONE, is_mobile=True, has_touch=True)
    for turn in (None, SHAPES, STAR):
        if turn is not None:
            change(tab, Longest_answer=16)
            ask(tab, "What is this?", turn)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        tab.evaluate("scrollTo(0, 0)")
        expect(tab.locator("#box .submit-button")).to_be_in_viewport(ratio=1)
        expect(tab.locator("#thinking")).to_be_in_viewport(ratio=1)
    size = tab.locator("#box textarea").evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert size >= 16  # else iOS zooms in
    tab.get_by_role("link", name="What the model sees").click()
    expect(tab.locator("#view .spent")).to_be_in_viewport()


CONTRASTS = """() => {
    const parse = color => {
        const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
        return [r, g, b, a];
    };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const color = parse(getComputedStyle(e).backgroundColor);
            if (color[3] === 1) return color;
        }
        return [255, 255, 255, 1];
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (element.closest(".cell, [disabled]") || !element.getClientRects().length) continue;
        const pair = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => b - a);
        found.push([(pair[0] + 0.05) / (pair[1] + 0.05), text]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(open_tab, scheme):
    """At least 4.5:1, as WCAG's level AA asks."""
    tab = open_tab(color_scheme=scheme)
    change(tab, Longest_answer=16)
    ask(tab, "How many shapes are there?", SHAPES)
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 20 and [(ratio, text) for ratio, text in found if ratio < 4.5] == []


# ---- without a browser ----


def run(turn):
    for _ in turn:
        pass


def test_other_slices_go_on_with_the_same_history(nano):
    conversation = Conversation(*nano)
    run(conversation.ask("What is this?", [SHAPES], Settings(max_new_tokens=8)))
    seen = conversation.seen
    run(conversation.ask("And now?", [], Settings(max_new_tokens=8, max_slice_nums=1)))
    assert seen[0].layout.grid is not None and conversation.seen[0].layout.grid is None
    assert [message["role"] for message in conversation.messages].count("user") == 2
    pictures = conversation.seen[0].tokens
    assert f"<b>{pictures}</b> images" in render(conversation.seen, conversation.output)


def test_a_failed_retry_keeps_the_old_answer(nano):
    conversation = Conversation(*nano)
    run(conversation.ask("What is this?", [SHAPES], Settings(max_new_tokens=8)))
    messages, seen = conversation.messages, conversation.seen
    too_long = Settings(max_new_tokens=nano[0].config.max_position_embeddings)
    with pytest.raises(ValueError, match="max_tokens"):
        run(conversation.retry(too_long))
    assert (conversation.messages, conversation.seen) == (messages, seen)
    assert conversation.undo() == ("What is this?", [SHAPES])
    with pytest.raises(ConversationError, match="no question"):
        conversation.undo()


def test_a_turn_stopped_before_its_first_word_did_not_happen(nano):
    conversation = Conversation(*nano)
    turn = conversation.ask("What is this?", [SHAPES], Settings())
    next(turn)  # the question is shown
    assert conversation.messages[0]["role"] == "user"
    with pytest.raises(ConversationError, match="Wait"):
        run(conversation.ask("And this?", [], Settings()))
    conversation.stop()
    with pytest.raises(ConversationError, match="Stopped"):
        run(turn)
    assert conversation.messages == [] and conversation.seen == []
    run(conversation.ask("What is this?", [], Settings(max_new_tokens=8)))
    assert conversation.output.prompt_tokens


def test_names_and_answers_are_text_not_tags(nano, tmp_path):
    file = tmp_path / "<img src=x onerror=alert(1)>.jpg"
    shutil.copy(SHAPES, file)
    conversation = Conversation(*nano)
    run(conversation.ask("Where is <ref>it</ref>?", [str(file)], Settings(max_new_tokens=8)))
    assert "<img src=x" not in render(conversation.seen, conversation.output)
    assert conversation.messages[0]["content"][-1] == "Where is &lt;ref>it&lt;/ref>?"


def test_boxes_in_an_answer_are_text_not_tags(nano, monkeypatch):
    of_answer, (model, processor) = Settings.of_answer.fget, nano
    tokens = iter([*processor.tokenizer("<box>1 2 3 4</box>")["input_ids"], model.generation_config.eos_token_id[0]])
    forced = {"prefix_allowed_tokens_fn": lambda *_: [next(tokens)]}
    monkeypatch.setattr(Settings, "of_answer", property(lambda self: of_answer(self) | forced))
    conversation = Conversation(*nano)
    run(conversation.ask("Where is it?", [], Settings()))
    assert conversation.messages[-1]["content"] == "&lt;box>1 2 3 4&lt;/box>"


def test_a_long_pdf_and_other_files_are_refused_with_the_remedy(nano, tmp_path):
    pages = [Image.new("RGB", (40, 40))] * (MOST_PAGES + 1)
    pages[0].save(tmp_path / "book.pdf", save_all=True, append_images=pages[1:])
    (tmp_path / "notes.txt").write_text("no image")
    for name, words in (
        ("book.pdf", f"{MOST_PAGES + 1} pages.*Save the pages"),
        ("notes.txt", "not an image, a video"),
    ):
        with pytest.raises(ConversationError, match=f"{name} .*{words}"):
            run(Conversation(*nano).ask("What is this?", [str(tmp_path / name)], Settings()))


# ---- the command ----


def command(*arguments):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    program = [sys.executable, "-m", "minicpmv.commands.main", "web", "-m", str(NANO), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background lets its children ignore what Ctrl-C sends.
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(program, env=environment, cwd=REPOSITORY, **pipes)


def test_a_port_that_is_taken_is_refused_in_one_line(app, nano, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: nano)
    port = app.url.split(":")[-1].strip("/")
    outcome = CliRunner().invoke(cli, ["web", "-m", str(NANO), "--port", port])
    assert outcome.exit_code == 1
    assert outcome.stderr.strip().count("\n") == 0 and port in outcome.stderr


def test_the_command_serves_until_it_is_interrupted():
    served = command()
    for line in served.stdout:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            break
    reply = urllib.request.urlopen(found[0])
    assert reply.status == 200 and reply.headers["content-security-policy"] == web_page.ONLY_FROM_HERE
    served.send_signal(signal.SIGINT)  # as Ctrl-C does
    _, errors = served.communicate(timeout=120)
    assert served.returncode in (0, 130) and "Traceback" not in errors


def test_only_the_page_needs_gradio():
    program = (
        "import sys; sys.modules['gradio'] = None\n"
        f"sys.argv = ['minicpmv', 'web', '-m', {str(NANO)!r}]\n"
        "from minicpmv.commands.main import app; app()"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert outcome.returncode == 1
    assert (
        outcome.stderr.strip().splitlines()[-1]
        == "minicpmv: gradio is not installed: pip install -e '.[web]' in a clone"
    )
