"""The page of `minicpmv web`: layout and events, in Gradio.

What is special:
- Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, and the browser is told to load nothing
  from any other host, so that an image in an answer cannot carry the conversation away.
- A tab has a conversation of its own, which a reload keeps; the server keeps those that were used last.
- The buttons of the running answer do not wait in the queue behind it.
- Messages speak of what is on the page, not of options, variables and functions.
"""

import os
import re
import socket
from html import escape
from pathlib import Path
from typing import Any


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from minicpmv import examples
from minicpmv.errors import MiniCPMVError, is_expected
from minicpmv.web.conversation import MAX_PACKING, THINKING, ConversationError, Conversations, Settings
from minicpmv.web.view import render


FOLDER = Path(__file__).parent
EXAMPLES = [("shapes.jpg", 0), ("number.jpg", 0), ("shapes.jpg", 1)]  # image, which of its questions
ONLY_FROM_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
KEEP_FILES = (3600, 24 * 3600)  # seconds: how often uploads are cleared away, and from which age on
LARGEST_FILE = "1gb"
CONCURRENT_ANSWERS = 4
FIRST_PORT, PORTS = 7860, 100  # where a free one is looked for
# A tab's own, which a reload keeps and another tab does not see.
KEY = """() => {
    let key = sessionStorage.getItem("conversation");
    if (!key) {
        key = Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
        sessionStorage.setItem("conversation", key);
    }
    return key;
}"""
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
).set(  # at least 4.5:1 against what is behind it
    color_accent="*primary_600",
    body_text_color_subdued="*neutral_600",
    block_title_text_color="*neutral_600",
    block_label_text_color="*neutral_600",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


class PageError(MiniCPMVError):
    """The page cannot be served: the message says why and what to do."""


def build(conversations: Conversations, name: str) -> gr.Blocks:
    """The page for a model; `name` is shown. `launch` serves it.

    The sliders begin where the checkpoint's generation_config is.
    """
    model, processor = conversations.model, conversations.processor
    most_tokens = min(8192, model.config.max_position_embeddings // 2)
    decoding = model.generation_config
    labels: dict[str, str] = {}  # option -> its slider, for messages
    knows = getattr(model.config, "knows", None)  # of a miniature
    limits = f"\n\n{name} knows {knows}: anything else it guesses." if knows else ""

    def slider(option, least, most, value, step, label, info=None):
        labels[option] = label
        return gr.Slider(least, most, value, step=step, label=label, info=info)

    with gr.Blocks(title="MiniCPM-V", analytics_enabled=False, fill_width=True, delete_cache=KEEP_FILES) as page:
        key, camera_is_open = gr.Textbox(visible="hidden"), gr.State(False)
        with gr.Row(elem_id="header"):
            gr.HTML(f"<h1>MiniCPM-V <small>{escape(name)}</small></h1>", elem_id="title")
            new = gr.Button("New chat", size="sm", variant="secondary", elem_id="new-chat", scale=0, min_width=96)
        with gr.Row(elem_id="body", equal_height=False):
            with gr.Column(scale=3, min_width=340, elem_id="left"):
                chatbot = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    container=False,
                    height=None,
                    layout="bubble",
                    buttons=["copy"],
                    feedback_options=None,
                    allow_file_downloads=False,
                    latex_delimiters=[
                        {"left": "$$", "right": "$$", "display": True},
                        {"left": "\\(", "right": "\\)", "display": False},
                        {"left": "\\[", "right": "\\]", "display": True},
                    ],
                    placeholder="## Ask about an image or a video\nDrop it here, paste it, or take one with the camera."
                    + limits,
                    examples=_examples(),
                )
                camera = gr.Image(
                    sources=["webcam"],
                    type="filepath",
                    webcam_options=gr.WebcamOptions(mirror=False),
                    visible=False,
                    label="Camera",
                    elem_id="camera",
                    height=320,
                )
                box = gr.MultimodalTextbox(
                    elem_id="box",
                    show_label=False,
                    placeholder="Ask anything",
                    file_types=["image", "video", ".pdf"],
                    file_count="multiple",
                    max_plain_text_length=100_000,  # a longer text would be pasted as a file
                    max_lines=8,
                    autofocus=True,
                )
                with gr.Row(elem_id="under-box"):
                    thinking = gr.Radio(list(THINKING), value="Off", label="Thinking", elem_id="thinking", scale=1)
                    gr.HTML('<a href="#right">What the model sees ↓</a>', elem_id="below")
                    snap = gr.Button("Camera", size="sm", elem_id="snap", scale=0, min_width=96)
            with gr.Column(scale=2, min_width=320, elem_id="right"):
                with gr.Accordion("What the model sees", open=True, elem_id="sees"):
                    view = gr.HTML(render([]), elem_id="view")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    temperature = slider(
                        "temperature",
                        0,
                        2,
                        (decoding.temperature or 1.0) if decoding.do_sample else 0,
                        0.05,
                        "Temperature",
                        "0: the likeliest word each time",
                    )
                    top_p = slider(
                        "top_p", 0.05, 1, decoding.top_p or 1.0, 0.05, "Top p", "Share of likely words to choose from"
                    )
                    max_new_tokens = slider(
                        "max_new_tokens",
                        16,
                        most_tokens,
                        min(2048, most_tokens),
                        16,
                        "Longest answer",
                        "Tokens, thought included",
                    )
                    slices = slider(
                        "max_slice_nums",
                        1,
                        20,
                        processor.image_processor.max_slice_nums,
                        1,
                        "Slices of an image",
                        "More read finer print",
                    )
                    fps = slider("fps", 0.5, 10, 3, 0.5, "Frames per second of a video")
                    num_frames = slider("num_frames", 0, 180, 0, 1, "Frames of a video in all", "0: by its length")
                    packing = slider(
                        "force_packing",
                        0,
                        MAX_PACKING,
                        0,
                        1,
                        "Frames in a group",
                        "A group costs as much as an image. 0: by the length of the video",
                    )
        settings = [thinking, temperature, top_p, max_new_tokens, slices, fps, num_frames, packing]
        shown = [chatbot, view]

        def told(error):
            return gr.Error(_told(error, labels), duration=30, print_exception=False)

        def open_page(key):
            """What a tab shows when it is loaded: the conversation that it had, or a new one."""
            talk = conversations.get(key) or conversations.begin(key)
            talk.stop()  # nobody follows an answer that was cut off by the reload
            return key, talk.messages, render(talk.seen, talk.output)

        def follow(talk, turn, restore):
            """What the page shows while a turn goes on; `restore` is what the box holds should it fail."""
            view_of = seen = None
            try:
                for _ in turn:
                    if talk.seen is not seen or talk.output is not view_of:
                        seen, view_of = talk.seen, talk.output
                        sees = render(seen, talk.output)
                    else:
                        sees = gr.skip()
                    yield talk.messages, sees, gr.update(value=None, submit_btn=False, stop_btn=True)
            except (ValueError, OSError, RuntimeError) as error:
                if not _is_told(error):
                    raise
                yield talk.messages, render(talk.seen, talk.output), gr.update(value=restore)
                raise told(error) from error

        def ask(key, value, *chosen):
            talk = conversations.get(key)
            if talk is None:
                gr.Warning("The server no longer keeps the conversation. A new one begins.")
                talk = conversations.begin(key)
            yield from follow(talk, talk.ask(value["text"], value["files"], Settings(*chosen)), value)

        def ask_example(key, example: gr.SelectData, *chosen):
            files = [file["path"] for file in example.value.get("files", [])]
            yield from ask(key, {"text": example.value["text"], "files": files}, *chosen)

        def retry(key, *chosen):
            if talk := conversations.get(key):
                yield from follow(talk, talk.retry(Settings(*chosen)), None)

        def undo(key):
            talk = conversations.get(key)
            if talk is None:
                return gr.skip(), gr.skip(), gr.skip()
            try:
                text, files = talk.undo()
            except ConversationError as error:
                raise told(error) from error
            return talk.messages, render(talk.seen), {"text": text, "files": files}

        def stop(key):
            if talk := conversations.get(key):
                talk.stop()

        def begin_anew(key):
            stop(key)
            conversations.begin(key)
            return [], render([]), IDLE

        def take_picture(value, file):
            if file is None:
                return gr.skip(), gr.skip(), gr.skip()
            value = value or {"text": "", "files": []}
            return (
                {"text": value["text"], "files": [*value["files"], file]},
                gr.update(value=None, visible=False),
                False,
            )

        IDLE = gr.update(submit_btn=True, stop_btn=False)
        page.load(open_page, key, [key, *shown], js=KEY, show_progress="hidden", api_visibility="private")
        answers = [
            listen(
                handler,
                [key, *inputs, *settings],
                [*shown, box],
                concurrency_limit=CONCURRENT_ANSWERS,
                concurrency_id="answers",
                trigger_mode="once",
                show_progress="hidden",
                api_visibility="private",
            )
            for listen, handler, inputs in (
                (box.submit, ask, [box]),
                (chatbot.example_select, ask_example, []),
                (chatbot.retry, retry, []),
            )
        ]
        for answer in answers:
            answer.then(lambda: IDLE, None, box, show_progress="hidden", queue=False, api_visibility="private")
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        box.stop(stop, key, None, **at_once)
        # In the queue, since only from there a warning reaches the page; but behind no answer.
        chatbot.undo(
            undo,
            key,
            [*shown, box],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        new.click(begin_anew, key, [*shown, box], cancels=answers, **at_once)
        snap.click(
            lambda is_open: (not is_open, gr.update(value=None, visible=not is_open)),
            camera_is_open,
            [camera_is_open, camera],
            **at_once,
        )
        camera.input(take_picture, [box, camera], [box, camera, camera_is_open], **at_once)
    return page


def launch(page: gr.Blocks, host: str, port: int | None = None, share: bool = False, **options: Any) -> Any:
    """Serve the page; `options` are those of `Blocks.launch`. Returns what that returns.

    Args:
        port: None takes a free one from 7860 on.

    Raises:
        PageError: the address cannot be listened on.
    """
    return page.launch(
        server_name=host,
        server_port=_free_port(host, port),
        share=share,
        theme=THEME,
        css_paths=FOLDER / "page.css",
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        max_file_size=LARGEST_FILE,
        app_kwargs={"middleware": [Middleware(_only_from_here)]},
        _frontend=False,  # Gradio would ask itself for the page, and give up where a proxy or a busy machine delays it
        **options,
    )


def _free_port(host, port):
    """`port`, or where it is None a free one. Gradio's own errors speak of its variables and functions."""
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            with socket.create_server((host, candidate)):
                return candidate
        except OSError as error:
            reason = error
    where = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise PageError(f"{host} cannot be listened on at {where} ({reason.strerror}); choose another port with --port")


def _only_from_here(app):
    """The ASGI application `app`, whose pages may load nothing from other hosts."""

    async def answer(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", ONLY_FROM_HERE.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *policy]}
            await send(message)

        await app(scope, receive, send_with_policy if scope["type"] == "http" else send)

    return answer


def _examples():
    try:
        assets = examples.find_clone() / "assets"
    except examples.NoCloneError:
        return None
    cards = [(file, examples.IMAGES[file][place]) for file, place in EXAMPLES]
    cards.append((examples.CLIP, examples.CLIP_QUESTIONS[0]))
    return [{"text": question, "files": [str(assets / file)]} for file, question in cards]


def _is_told(error):
    """Whether the page shows an error: what can be mended, a file that is gone, and a full memory. Others are bugs."""
    import torch

    return is_expected(error) or isinstance(error, (OSError, torch.OutOfMemoryError))


def _told(error, labels):
    """The first line of an error as HTML, without the folders of uploads, and with the names of sliders for options."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(re.escape(gr.utils.get_upload_folder()) + r"/[^/]*/", "", text)
    for option, label in labels.items():
        text = re.sub(rf"\b{option}\b(=)?", lambda found, label=label: f"“{label}”" + (" " if found[1] else ""), text)
    return escape(text, quote=False)
