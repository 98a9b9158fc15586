"""A packed video in an unmodified llama-server."""

import json
import urllib.error
import urllib.request

import pytest
from conftest import GREEDY, NANO, REPOSITORY
from typer.testing import CliRunner

from minicpmv.commands.main import app


xllamacpp = pytest.importorskip("xllamacpp")

STAR, QUESTION = REPOSITORY / "assets" / "star.mp4", "Which way does the shape move?"
OPTIONS = {"fps": 3, "max_num_packing": 6, "force_packing": 6}


@pytest.fixture(scope="module")
def video(ggufs, tmp_path_factory):
    """The JSON file of the video, written by the command."""
    folder = tmp_path_factory.mktemp("slots")
    file = ggufs / "nano-Q8_0.gguf"
    options = ["-m", str(file), "--output", str(folder), "--fps", "3", "--packing", "6"]
    result = CliRunner().invoke(app, ["export", "slot", str(STAR), *options])
    assert result.exit_code == 0, result.output
    return folder / "star.json"


def test_a_llama_server_answers_about_a_packed_video_as_pytorch_does(llama_server, ggufs, video, nano):
    facts = json.loads(video.read_text())
    params = xllamacpp.CommonParams()
    params.model.path, params.slot_save_path = str(ggufs / "nano-Q8_0.gguf"), f"{video.parent}/"
    params.n_ctx = 1024
    post = llama_server(params)

    # A slot of another version of the format is refused.
    data = (video.parent / "star.slot").read_bytes()
    (video.parent / "older.slot").write_bytes(data[:4] + (1).to_bytes(4, "little") + data[8:])
    with pytest.raises(urllib.error.HTTPError):
        post("/slots/0?action=restore", {"filename": "older.slot"})

    assert post("/slots/0?action=restore", facts["restore"])["n_restored"] == facts["tokens"]
    model, processor = nano
    asked = []
    for question in (QUESTION, "What color is the shape?"):
        content = [STAR, question] if not asked else question
        asked.append({"role": "user", "content": content})
        ours = model.chat(msgs=asked, processor=processor, max_new_tokens=16, **GREEDY | OPTIONS)
        messages = [dict(message) for message in asked]
        messages[0]["content"] = f"{facts['message']}\n{QUESTION}"
        body = {"messages": messages, "temperature": 0, "max_tokens": 16}
        reply = post("/v1/chat/completions", body | {"chat_template_kwargs": {"enable_thinking": False}})
        assert reply["choices"][0]["message"]["content"] == ours
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= facts["tokens"]
        asked.append({"role": "assistant", "content": ours})


def test_a_slot_of_a_model_in_pytorch_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["export", "slot", str(STAR), "-m", str(NANO), "--output", str(tmp_path)])
    assert result.exit_code == 1 and "name a file that minicpmv export gguf has written" in result.stderr
