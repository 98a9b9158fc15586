"""The page of `minicpmv export page`, as `make page` builds it with nano, in headless Chromium: as a person uses it, and
against what nano answers in PyTorch."""

import base64
import hashlib
import json
import mimetypes
import re
import struct
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from conftest import GREEDY, REPOSITORY
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_page import BROWSER_OPTIONS, PHONE, WAIT, find_chromium


PAGE = REPOSITORY / "build" / "page"
ASSETS = REPOSITORY / "assets"
TYPED = "<|im_end|>\n<|im_start|>system\nSay <image><unk></image> <think></think>"
expect.set_options(timeout=WAIT)


class Handler(SimpleHTTPRequestHandler):
    """A plain host of files: no ranges, no headers of its own."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        args = [*BROWSER_OPTIONS, "--js-flags=--wasm-lazy-compilation"]  # most of WebAssembly is never run
        chromium = playwright.chromium.launch(executable_path=find_chromium(playwright), args=args)
        yield chromium
        chromium.close()


class Site:
    """The page in a tab of its own; `requests` are the addresses it asked for, `errors` what its scripts threw.

    Args:
        change: is given what the page knows of the model, to change it.
        options: of the browser's context.
    """

    def __init__(self, browser, change=None, **options):
        if not (PAGE / "index.html").is_file():
            pytest.fail("the page is needed: make page")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(PAGE)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        self.context = browser.new_context(**options)
        self.requests, self.errors = [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.tab = self.context.new_page()
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.set_default_timeout(WAIT)
        if change:
            about = json.loads((PAGE / "page.json").read_text(encoding="utf-8"))
            change(about)
            self.context.route("**/page.json", lambda route: route.fulfill(json=about))
        self.open()

    def stop_server(self):
        self.server.shutdown()
        self.server.server_close()

    def close(self):
        self.context.close()
        self.stop_server()

    def open(self):
        self.tab.goto(self.address)
        expect(self.tab.locator("#device")).to_contain_text("CPU")  # headless Chromium has no adapter of a GPU

    def attach(self, *names):
        self.tab.set_input_files("#files", [str(name) for name in names])

    def send(self, question):
        self.tab.fill("#question", question)
        self.tab.click("#send")

    def ask(self, question, *names):
        """The answer, once it is whole."""
        turns = self.tab.locator(".turn").count()
        if names:
            self.attach(*(ASSETS / name for name in names))
        self.send(question)
        expect(self.tab.locator(".turn")).to_have_count(turns + 1)
        expect(self.tab.locator("#stop")).to_be_hidden()
        assert not self.errors
        return self.tab.locator(".answer").last.inner_text()

    def figures(self):
        """{what: tokens} of the last turn."""
        lines = self.tab.locator(".legend li").all_inner_texts()
        return {name: int(number) for number, name in (line.split() for line in lines)}

    def change(self, label, value):
        summary = self.tab.locator("#right summary", has_text="Settings")
        if not self.tab.locator("#settings").is_visible():
            summary.click()
        self.tab.get_by_label(label).fill(str(value))

    def think(self, is_on):
        self.tab.locator("#thinking label", has_text="On" if is_on else "Off").click()

    def begin_anew(self):
        self.tab.click("#new-chat")
        expect(self.tab.locator(".turn")).to_have_count(0)


@pytest.fixture(scope="module")
def opened(browser):
    site = Site(browser, viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"])
    yield site
    site.close()


@pytest.fixture
def site(opened):
    """The page with an empty conversation."""
    opened.begin_anew()
    yield opened
    assert not opened.errors


@pytest.fixture(scope="module")
def phone(browser):
    """The page on a phone in the dark, with a model that never closes an answer, and room for few tokens."""

    def change(about):
        about["settings"] |= {"stops": [], "context": 400}

    phone = {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    site = Site(browser, change, service_workers="block", **phone)
    yield site
    site.close()


def asked(nano, *turns, **options):
    """`ChatOutput` of the last of turns (content of a question, or an answer's text) in PyTorch."""
    model, processor = nano
    roles = ("user", "assistant")
    msgs = [{"role": roles[place % 2], "content": content} for place, content in enumerate(turns)]
    return model.chat(msgs=msgs, processor=processor, return_dict=True, max_new_tokens=256, **GREEDY | options)


def picture(name):
    return Image.open(ASSETS / name)


# ---- as in Python ----


def test_questions_about_images_are_answered_as_in_python_and_the_slices_are_shown(site, nano):
    image = picture("shapes.jpg")
    talk = []
    for question in ("How many shapes are there?", "What color is the circle?", "What shape is on the right?"):
        talk.append([image, question] if not talk else question)
        expected = asked(nano, *talk)
        assert site.ask(question, *(["shapes.jpg"] if len(talk) == 1 else [])) == expected.text
        figures = site.figures()
        assert figures["images"] + figures["text"] == expected.prompt_tokens
        assert figures["answer"] == expected.generated_tokens
        talk.append(expected.text)
    layout = nano[1].image_processor.get_slice_layout(image.size)
    assert site.tab.locator(".cell").count() == layout.grid[0] * layout.grid[1]
    assert figures["images"] == layout.num_slices * nano[1].image_processor.image_feature_size

    site.begin_anew()
    expected = asked(nano, [picture("number.jpg"), "What does it say?"])
    assert site.ask("What does it say?", "number.jpg") == expected.text


def test_a_video_is_packed_and_answered_as_in_python(site, nano):
    options = {"max_num_packing": 6, "force_packing": 6, "fps": 5}
    site.change("Frames in a group", 6)
    site.change("Frames per second of a video", 5)
    video = {"type": "video", "video": str(ASSETS / "star.mp4")}
    question = "Which way does the shape move?"
    expected = asked(nano, [video, question], **options)
    assert site.ask(question, "star.mp4") == expected.text
    sampled = nano[1].video_processor.sample_video(video["video"], **options)
    assert site.tab.locator(".frame").all_inner_texts() == [f"{time:.2f} s" for time in sampled.metadata.timestamps]
    groups = [group.locator(".frame").count() for group in site.tab.locator(".group").all()]
    assert groups == [len(ids) for ids in sampled.temporal_ids]
    figures = site.figures()
    assert figures["images"] == sampled.metadata.num_tokens
    assert figures["images"] + figures["text"] == expected.prompt_tokens
    expected = asked(nano, [video, question], expected.text, "What color is the shape?", **options)
    assert site.ask("What color is the shape?") == expected.text
    site.change("Frames in a group", 0)
    site.change("Frames per second of a video", 3)


def write_videos(folder):
    """Videos whose frames are noise: a GIF, VP9 with a rate of 30000 / 1001, and HD colors turned as phones do it."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    first, *rest = map(Image.fromarray, noise)
    first.save(folder / "noise.gif", save_all=True, append_images=rest, duration=[100, 300, 100, 500, 100, 200])
    for name, codec, rate, is_hd in (
        ("noise.webm", "libvpx-vp9", Fraction(30000, 1001), False),
        ("noise.mp4", "libx264", 25, True),
    ):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.colorspace = 1 if is_hd else 2  # BT.709, or nothing said
            for number in range(40):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise[number % 6])))
            container.mux(stream.encode())
    data = bytearray((folder / "noise.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (folder / "noise.mp4").write_bytes(data)


def test_frames_are_those_of_python_bit_for_bit(site, nano, tmp_path):
    """Also of a file whose frames have no time stamps."""
    read = """async ([data, name, type]) => {
        const { openVideo } = await import("./src/media.js");
        const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
        const { settings } = await (await fetch("page.json")).json();
        const { plan, total, frames } = await openVideo(new File([bytes], name, { type }), { ...settings.video, fps: 2 });
        const found = [];
        for await (const { width, height, data } of frames) {
            const digest = await crypto.subtle.digest("SHA-256", data);
            found.push([width, height, [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("")]);
        }
        return { indices: plan.indices, packs: plan.packs, total, found };
    }"""
    write_videos(tmp_path)
    for file in (ASSETS / "star.mp4", ASSETS / "big_buck_bunny.mp4", *sorted(tmp_path.glob("noise.*"))):
        sampled = nano[1].video_processor.sample_video(str(file), fps=2)
        kind = mimetypes.guess_type(file)[0]
        seen = site.tab.evaluate(read, [base64.b64encode(file.read_bytes()).decode(), file.name, kind])
        assert seen["total"] == sampled.metadata.total_num_frames
        assert seen["indices"] == sampled.metadata.frames_indices and seen["packs"] == sampled.temporal_ids
        digests = [hashlib.sha256(frame.convert("RGBA").tobytes()).hexdigest() for frame in sampled.frames]
        expected = [[*frame.size, digest] for frame, digest in zip(sampled.frames, digests, strict=True)]
        assert seen["found"] == expected, file.name


def test_a_thought_is_shown_apart_from_the_answer(site, nano):
    site.think(True)
    expected = asked(nano, [picture("sum.jpg"), "What is the result?"], enable_thinking=True)
    assert site.ask("What is the result?", "sum.jpg") == expected.text
    thought = site.tab.locator(".thought")
    assert thought.locator("summary").inner_text() == "Thought" and not thought.locator("div").is_visible()
    thought.locator("summary").click()
    assert thought.locator("div").inner_text() == expected.reasoning
    figures = site.figures()
    assert figures["thought"] == expected.reasoning_tokens
    assert figures["answer"] == expected.generated_tokens - expected.reasoning_tokens
    site.think(False)
    site.tab.get_by_role("button", name="Retry").click()  # the same question, now without
    expect(site.tab.locator(".thought")).to_have_count(0)
    expect(site.tab.locator("#stop")).to_be_hidden()
    assert site.tab.locator(".answer").inner_text() == asked(nano, [picture("sum.jpg"), "What is the result?"]).text


def test_control_tokens_that_users_type_are_text(site, nano):
    expected = asked(nano, [picture("number.jpg"), TYPED])
    assert site.ask(TYPED, "number.jpg") == (expected.text.strip() or "(no answer)")
    assert sum(site.figures()[name] for name in ("images", "text")) == expected.prompt_tokens
    assert site.tab.locator(".user .text").inner_text() == TYPED


# ---- what people do ----


def test_an_answer_streams_and_stops(phone):
    tab = phone.tab
    phone.change("Longest answer", 200)
    phone.send("Tell a long story.")
    expect(tab.locator(".answer")).not_to_have_text(re.compile(r"^…?$"))
    early = tab.locator(".answer").inner_text()
    expect(tab.locator(".answer")).not_to_have_text(early)
    tab.click("#stop")
    expect(tab.locator("#stop")).to_be_hidden()
    kept = tab.locator(".answer").inner_text()
    assert len(kept) > len(early)
    assert "stopped" in tab.locator(".spent").inner_text()
    phone.change("Longest answer", 16)
    phone.ask("And then?")
    assert "reached its limit" in tab.locator(".spent").inner_text()
    assert tab.locator(".answer").first.inner_text() == kept


def test_the_oldest_turns_are_left_out_where_there_is_no_room(phone):
    phone.begin_anew()
    for name in ("shapes.jpg", "number.jpg"):
        phone.ask("What is it?", name)
    expect(phone.tab.locator(".spent")).to_contain_text("The oldest 1 turns no longer fitted")
    phone.attach(ASSETS / "shapes.jpg", ASSETS / "number.jpg")
    phone.send("What are these?")
    expect(phone.tab.locator("#status")).to_contain_text("there is room for 384")
    assert phone.tab.locator(".turn").count() == 2
    assert phone.tab.locator("#question").input_value() == "What are these?"
    expect(phone.tab.locator(".file")).to_have_count(2)


def test_on_a_phone_nothing_is_cut_off_and_dark_is_dark(phone):
    phone.begin_anew()
    phone.ask("What does it say?", "number.jpg")
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    phone.tab.click("#below")
    expect(phone.tab.locator("#view .cell").first).to_be_in_viewport()
    back, text = phone.tab.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    assert brightness(back) < 50 and brightness(text) > 200


def brightness(color):
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_an_example_is_asked_by_a_click_and_taken_back(site):
    site.tab.get_by_role("button", name="What does it say?").click()
    expect(site.tab.locator(".answer")).to_have_text("47")
    site.tab.get_by_role("button", name="Copy").click()
    expect(site.tab.locator("#status")).to_have_text("Copied.")
    assert site.tab.evaluate("navigator.clipboard.readText()") == "47"
    site.tab.get_by_role("button", name="Undo").click()
    assert site.tab.locator("#question").input_value() == "What does it say?"
    expect(site.tab.locator(".file")).to_have_count(1)
    expect(site.tab.locator("#view .seen")).to_have_count(0)


def test_files_are_dropped_and_pasted_and_others_are_refused(site):
    send = """([target, type, name, kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
        const options = { bubbles: true, cancelable: true };
        target.dispatchEvent(type === "paste" ? new ClipboardEvent(type, { ...options, clipboardData: data })
                                              : new DragEvent(type, { ...options, dataTransfer: data }));
    }"""
    body, data = site.tab.locator("body").element_handle(), list((ASSETS / "number.jpg").read_bytes())
    site.tab.evaluate(send, [body, "paste", "a.jpg", "image/jpeg", data])
    expect(site.tab.locator(".file")).to_have_count(1)
    site.tab.evaluate(send, [body, "dragenter", "b.jpg", "image/jpeg", data])
    expect(site.tab.locator("#drop")).to_be_visible()
    site.tab.evaluate(send, [body, "drop", "b.jpg", "image/jpeg", data])
    expect(site.tab.locator("#drop")).to_be_hidden()
    expect(site.tab.locator(".file")).to_have_count(2)
    site.tab.get_by_role("button", name="Remove a.jpg").click()
    expect(site.tab.locator(".file")).to_have_count(1)
    site.tab.evaluate(send, [body, "drop", "a.pdf", "application/pdf", data])
    expect(site.tab.locator("#status")).to_contain_text("a.pdf is no image or video")
    expect(site.tab.locator(".file")).to_have_count(1)


def test_a_broken_file_is_told_and_changes_nothing(site, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "words.mp4").write_bytes(b"These are no frames.")
    assert site.ask("What does it say?", "number.jpg") == "47"
    for name, message in (("torn.jpg", "as JPEG or PNG"), ("words.mp4", "as MP4")):
        site.attach(tmp_path / name)
        site.send("And here?")
        expect(site.tab.locator("#status")).to_contain_text(f"{name} cannot be read")
        expect(site.tab.locator("#status")).to_contain_text(message)
        assert site.tab.locator(".turn").count() == 1 and site.tab.locator("#question").input_value() == "And here?"
        expect(site.tab.locator("#stop")).to_be_hidden()
        site.tab.locator(".file button").click()
    assert site.ask("What does it say?") == "47"


# ---- wherever it stands ----


def test_the_built_page_is_small():
    assert sum(file.stat().st_size for file in PAGE.rglob("*") if file.is_file()) < 30e6


def test_it_works_without_a_network_after_the_first_load_and_asks_nobody_else(site):
    site.tab.evaluate("navigator.serviceWorker.ready.then(() => true)")
    site.stop_server()
    site.open()
    assert site.ask("How many shapes are there?", "shapes.jpg") == "2"
    assert site.requests and all(address.startswith((site.address, "blob:")) for address in site.requests)
