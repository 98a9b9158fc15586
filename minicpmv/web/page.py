"""The page of `minicpmv web`: layout and events, in Gradio.

What is special:
- Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, and the browser is told to load nothing
  from any other host, so that a picture in an answer cannot carry the conversation away.
- A tab has a conversation of its own; the server keeps a bounded number of them, the newest.
- The buttons of the running answer do not wait in the queue behind it.
"""

import os
import re
from html import escape
from pathlib import Path


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from minicpmv import examples
from minicpmv.web.conversation import MAX_PACKING, THINKING, Conversation, Settings
from minicpmv.web.view import render


FOLDER = Path(__file__).parent
EXAMPLES = [
    ("shapes.jpg", 0),
    ("number.jpg", 0),
    ("shapes.jpg", 1),
]  # picture, place of its question in examples.IMAGES
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
ONLY_FROM_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
KEEP_FILES = (3600, 24 * 3600)  # seconds: how often uploads are cleared away, and from which age on
LARGEST_FILE = "1gb"
CONCURRENT_ANSWERS = 4
# What a turn can fail with, and the page tells: unreadable files and settings; a busy session or a full memory.
EXPECTED = (ValueError, RuntimeError, OSError)


def build(model, processor, name: str) -> gr.Blocks:
    """The page for a model; `name` is shown. `launch` serves it."""
    most_tokens = min(8192, model.config.max_position_embeddings // 2)

    with gr.Blocks(title="MiniCPM-V", analytics_enabled=False, fill_width=True, delete_cache=KEEP_FILES) as page:
        conversation, camera_is_open = gr.State(), gr.State(False)
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
                    placeholder="## Ask about a picture or a clip\nDrop it here, paste it, or take one with the camera.",
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
                    file_types=["image", "video"],
                    file_count="multiple",
                    max_plain_text_length=100_000,  # a longer text would be pasted as a file
                    max_lines=8,
                    autofocus=True,
                )
                with gr.Row(elem_id="under-box"):
                    thinking = gr.Radio(list(THINKING), value="Off", label="Thinking", elem_id="thinking", scale=1)
                    snap = gr.Button("Camera", size="sm", elem_id="snap", scale=0, min_width=96)
            with gr.Column(scale=2, min_width=320, elem_id="right"):
                with gr.Accordion("What the model sees", open=True, elem_id="sees"):
                    view = gr.HTML(render([]), elem_id="view")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    temperature = gr.Slider(
                        0, 2, 0.7, step=0.05, label="Temperature", info="0: the likeliest word each time"
                    )
                    top_p = gr.Slider(
                        0.05, 1, 0.8, step=0.05, label="Top p", info="Share of likely words to choose from"
                    )
                    max_new_tokens = gr.Slider(
                        16,
                        most_tokens,
                        min(2048, most_tokens),
                        step=16,
                        label="Longest answer",
                        info="Tokens, thought included",
                    )
                    slices = gr.Slider(
                        1,
                        20,
                        processor.image_processor.max_slice_nums,
                        step=1,
                        label="Slices of a picture",
                        info="More read finer print",
                    )
                    fps = gr.Slider(0.5, 10, 3, step=0.5, label="Frames a second of a clip")
                    num_frames = gr.Slider(0, 180, 0, step=1, label="Frames of a clip in all", info="0: by its length")
                    packing = gr.Slider(
                        0,
                        MAX_PACKING,
                        0,
                        step=1,
                        label="Frames in a group",
                        info="A group costs as much as a picture. 0: by its length",
                    )
        settings = [thinking, temperature, top_p, max_new_tokens, slices, fps, num_frames, packing]
        shown = [conversation, chatbot, view]

        def begin():
            return Conversation(model, processor)

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
                    yield talk, talk.messages, sees, gr.update(value=None, submit_btn=False, stop_btn=True)
            except EXPECTED as error:
                gr.Warning(_told(error), duration=30)
                yield talk, talk.messages, render(talk.seen, talk.output), gr.update(value=restore)

        def ask(talk, value, *chosen):
            if talk is None:
                gr.Warning("The conversation was no longer kept by the server. A new one begins.")
                talk = begin()
            files = value["files"]
            yield from follow(talk, talk.ask(value["text"], files, Settings(*chosen)), value)

        def ask_example(talk, example: gr.SelectData, *chosen):
            files = [file["path"] for file in example.value.get("files", [])]
            yield from ask(talk, {"text": example.value["text"], "files": files}, *chosen)

        def retry(talk, *chosen):
            if talk is not None:
                yield from follow(talk, talk.retry(Settings(*chosen)), None)

        def undo(talk):
            try:
                text, files = talk.undo()
            except EXPECTED as error:
                gr.Warning(_told(error))
                return talk, talk.messages, gr.skip(), gr.skip()
            return talk, talk.messages, render(talk.seen), {"text": text, "files": files}

        def stop(talk):
            if talk is not None:
                talk.stop()

        def begin_anew(talk):
            stop(talk)
            return begin(), [], render([]), IDLE

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
        page.load(begin, None, conversation, api_visibility="private")
        answers = [
            listen(
                handler,
                [conversation, *inputs, *settings],
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
        box.stop(stop, conversation, None, **at_once)
        # In the queue, since only from there a warning reaches the page; but behind no answer.
        chatbot.undo(
            undo,
            conversation,
            [*shown, box],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        new.click(begin_anew, conversation, [*shown, box], cancels=answers, **at_once)
        snap.click(
            lambda is_open: (not is_open, gr.update(value=None, visible=not is_open)),
            camera_is_open,
            [camera_is_open, camera],
            **at_once,
        )
        camera.input(take_picture, [box, camera], [box, camera, camera_is_open], **at_once)
    return page


def launch(page: gr.Blocks, host: str, port: int | None, share: bool = False, most_conversations: int = 16, **options):
    """Serve the page; `options` are those of `Blocks.launch`. Returns what that returns.

    Args:
        port: None takes a free one from 7860 on.
        most_conversations: tabs whose conversation is kept; the one unused for longest is forgotten.
    """
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONOSPACE),
        css_paths=FOLDER / "page.css",
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        max_file_size=LARGEST_FILE,
        state_session_capacity=most_conversations,
        app_kwargs={"middleware": [Middleware(_only_from_here)]},
        _frontend=False,  # Gradio would ask itself for the page, and give up where a proxy or a busy machine delays it
        **options,
    )


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


def _told(error):
    """The first line of an error as HTML, without the folders of uploads."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return escape(re.sub(re.escape(gr.utils.get_upload_folder()) + r"/[^/]*/", "", text), quote=False)
