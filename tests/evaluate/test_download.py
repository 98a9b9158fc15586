"""Fetching data: sizes first, goes on where it stopped, checked, and nothing half-done under a file's name."""

import hashlib
import io
import json
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from minicpmv.commands.evaluate_get import data_sets_of
from minicpmv.commands.main import app
from minicpmv.evaluate.data_sets import catalog
from minicpmv.evaluate.data_sets.catalog import DATA_SETS, HubFiles, RemoteFile
from minicpmv.evaluate.data_sets.download import Download, DownloadError, fetch, in_units, plan


CONTENT = bytes(range(256)) * 40


class Files(BaseHTTPRequestHandler):
    """Serves what is in the server's `files`; `cut` is where replies end early, `piece` after how many bytes, `ranges` whether parts are given."""

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        self.server.asked.append((self.command, self.headers.get("Range")))
        self.server.tokens.append(self.headers.get("Authorization"))
        content = self.server.files.get(self.path.partition("?")[0])
        if content is None and self.path.startswith("/api/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if content is None:
            return self.send_error(404)
        if content == "gated":
            return self.send_error(403)
        start = 0
        if self.server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self.wfile.write(content[start : self.server.cut][: self.server.piece])

    def log_message(self, *args): ...


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked, server.tokens = {"/t.tsv": CONTENT}, [], []
    server.cut, server.piece, server.ranges = None, None, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(server, monkeypatch):
    """MMStar, as if it were a file of the server."""
    address = f"http://127.0.0.1:{server.server_port}/t.tsv"
    file = RemoteFile("MMStar.tsv", address, hashlib.md5(CONTENT).hexdigest())
    data_set = replace(DATA_SETS["mmstar"], sources=(file,))
    monkeypatch.setitem(catalog.DATA_SETS, "mmstar", data_set)
    return data_set


def test_sizes_are_known_before_anything_is_fetched(server, served, tmp_path):
    (file,) = plan(served, tmp_path)
    assert (file.size, file.missing, file.is_here) == (len(CONTENT), len(CONTENT), False)
    assert server.asked == [("HEAD", None)] and not list(tmp_path.iterdir())


def test_a_file_comes_whole_and_is_not_fetched_twice(server, served, tmp_path):
    fetch(plan(served, tmp_path))
    assert (tmp_path / "MMStar.tsv").read_bytes() == CONTENT
    server.asked.clear()
    fetch(plan(served, tmp_path))
    assert server.asked == []


def test_an_interrupted_file_goes_on_where_it_stopped(server, served, tmp_path):
    server.cut = 3000
    with pytest.raises(DownloadError, match=r"MMStar\.tsv: the connection ended after 3000 of 10240 bytes"):
        fetch(plan(served, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["MMStar.tsv.part"]
    have = (tmp_path / "MMStar.tsv.part").stat().st_size
    assert have == 3000
    server.cut = None
    counted = []
    fetch(plan(served, tmp_path), counted.append)
    assert (tmp_path / "MMStar.tsv").read_bytes() == CONTENT
    assert server.asked[-1] == ("GET", "bytes=3000-") and sum(counted) == len(CONTENT) - 3000


def test_connections_that_break_are_taken_up_again_while_something_comes(server, served, tmp_path):
    server.piece = 4000
    counted = []
    fetch(plan(served, tmp_path), counted.append)
    assert (tmp_path / "MMStar.tsv").read_bytes() == CONTENT and sum(counted) == len(CONTENT)
    assert [part for _, part in server.asked[1:]] == [None, "bytes=4000-", "bytes=8000-"]


def test_a_server_without_ranges_starts_anew(server, served, tmp_path):
    (tmp_path / "MMStar.tsv.part").write_bytes(b"x" * 100)
    server.ranges = False
    fetch(plan(served, tmp_path))
    assert (tmp_path / "MMStar.tsv").read_bytes() == CONTENT


def test_a_whole_part_file_only_has_to_be_checked(server, served, tmp_path):
    (tmp_path / "MMStar.tsv.part").write_bytes(CONTENT)
    fetch(plan(served, tmp_path))
    assert (tmp_path / "MMStar.tsv").read_bytes() == CONTENT
    assert server.asked == [("HEAD", None)]


def test_a_wrong_digest_is_refused_and_leaves_nothing(server, served, tmp_path):
    server.files["/t.tsv"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match=r"MMStar\.tsv: its MD5 is \w{32}, not \w{32}"):
        fetch(plan(served, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_or_gated_is_named(server, served, tmp_path):
    server.files["/t.tsv"] = "gated"
    with pytest.raises(DownloadError, match=r"t\.tsv is not handed out to you \(403\): log in"):
        plan(served, tmp_path)
    server.files.clear()
    with pytest.raises(DownloadError, match=r"t\.tsv: the server answers 404"):
        plan(served, tmp_path)


def test_no_network_is_said_in_plain_words(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/t.tsv"
    data_set = replace(DATA_SETS["mmstar"], sources=(RemoteFile("t.tsv", address),))
    with pytest.raises(
        DownloadError, match="cannot be reached .*: check the network and proxy, and run the same command"
    ):
        plan(data_set, tmp_path)


def test_too_little_room_is_refused_before_the_download(tmp_path):
    with pytest.raises(DownloadError, match="need another 1000000.0 GB"):
        fetch([Download(tmp_path / "a", "http://127.0.0.1:1/a", 10**15, None)])


def test_archives_are_unpacked_and_not_fetched_again(server, tmp_path):
    archive, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/v1.mp4", b"one")
    with tarfile.open(fileobj=tar, mode="w") as file:
        info = tarfile.TarInfo("videos/v2.mp4")
        info.size = 3
        file.addfile(info, io.BytesIO(b"two"))
    halves = tar.getvalue()[:700], tar.getvalue()[700:]
    server.files |= {"/a.zip": archive.getvalue(), "/v.tar.part.aa": halves[0], "/v.tar.part.ab": halves[1]}
    files = [
        Download(tmp_path / name, f"http://127.0.0.1:{server.server_port}/{name}", None, None)
        for name in ("a.zip", "v.tar.part.aa", "v.tar.part.ab")
    ]
    fetch(files)
    assert (tmp_path / "data" / "v1.mp4").read_bytes() == b"one"
    assert (tmp_path / "videos" / "v2.mp4").read_bytes() == b"two"
    assert not list(tmp_path.glob("*.zip")) + list(tmp_path.glob("*.part.a?"))
    server.files.clear()
    fetch(files)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(DownloadError, match=r"a\.zip cannot be unpacked"):
        fetch([Download(tmp_path / "a.zip", "", None, None)])


def test_the_command_tells_size_and_license_and_fetches_nothing_without_being_asked(server, served, tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "get", "MMStar", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "MMStar.tsv: 10.2 kB" in result.stdout and "license: not stated" in result.stdout
    assert "add --yes" in result.stderr
    assert ("GET", None) not in server.asked and not list(tmp_path.iterdir())

    result = CliRunner().invoke(app, ["evaluate", "get", "mmstar", "--yes", "--data", str(tmp_path)])
    assert result.exit_code == 0 and (tmp_path / "MMStar.tsv").read_bytes() == CONTENT
    result = CliRunner().invoke(app, ["evaluate", "get", "mmstar", "--data", str(tmp_path)])
    assert result.exit_code == 0 and "all files are here" in result.stdout


def test_the_command_names_data_sets_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "get", "nothing", "--data", str(tmp_path)])
    assert result.exit_code == 1 and "there is no data set 'nothing'" in result.stderr


def test_suites_and_groups_name_their_data_sets():
    assert [data_set.id for data_set in data_sets_of(["mmbench", "mmstar"])] == [
        "mmbench_dev_en",
        "mmbench_dev_cn",
        "mmstar",
    ]
    ids = [data_set.id for data_set in data_sets_of(["video", "videomme", "Video-MME"])]
    assert ids.count("videomme") == 1 and "lvbench" in ids


def test_sizes_are_written_for_people():
    assert [in_units(size) for size in (None, 12, 1500, 2_500_000, 158 * 10**9)] == [
        "unknown size",
        "12 bytes",
        "1.5 kB",
        "2.5 MB",
        "158.0 GB",
    ]


@pytest.fixture
def hub(server, monkeypatch):
    """The server as the Hub, with one repository of data."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    digest = hashlib.sha256(CONTENT).hexdigest()
    siblings = [
        {"rfilename": "video_info.meta.jsonl", "size": 3, "blobId": "1" * 40},
        {"rfilename": "deep/a b.mp4", "size": len(CONTENT), "blobId": "2" * 40}
        | {"lfs": {"sha256": digest, "size": len(CONTENT), "pointerSize": 130}},
        {"rfilename": "README.md", "size": 5, "blobId": "3" * 40},
    ]
    info = {"id": "zai-org/LVBench", "sha": "abc", "siblings": siblings, "private": False}
    server.files = {
        "/api/datasets/zai-org/LVBench": json.dumps(info).encode(),
        "/datasets/zai-org/LVBench/resolve/abc/video_info.meta.jsonl": b"{}\n",
        "/datasets/zai-org/LVBench/resolve/abc/deep/a%20b.mp4": CONTENT,
    }
    return replace(DATA_SETS["lvbench"], sources=(HubFiles("zai-org/LVBench", ("*.jsonl", "*.mp4")),))


def test_files_of_the_hub_are_listed_with_their_sizes_and_checked_by_its_digests(server, hub, tmp_path):
    files = plan(hub, tmp_path)
    folder = tmp_path / "LVBench"
    assert [(file.path, file.size) for file in files] == [
        (folder / "video_info.meta.jsonl", 3),
        (folder / "deep" / "a b.mp4", len(CONTENT)),
    ]
    fetch(files)
    assert (folder / "deep" / "a b.mp4").read_bytes() == CONTENT
    assert server.tokens[-1] == "Bearer secret"

    (folder / "deep" / "a b.mp4").unlink()
    server.files["/datasets/zai-org/LVBench/resolve/abc/deep/a%20b.mp4"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match="its SHA256 is"):
        fetch(plan(hub, tmp_path))


def test_files_that_the_hub_no_longer_has_are_named(server, hub, tmp_path):
    with pytest.raises(DownloadError, match=r"zai-org/LVBench has no \*\.tar any more"):
        plan(replace(hub, sources=(HubFiles("zai-org/LVBench", ("*.tar",)),)), tmp_path)


def test_a_repository_that_the_hub_does_not_show_names_the_gate(server, hub, tmp_path):
    with pytest.raises(DownloadError, match="accept the terms at huggingface.co/datasets/MLVU/MVLU"):
        plan(DATA_SETS["mlvu"], tmp_path)


def test_a_file_that_is_gated_names_what_has_to_be_done(server, hub, tmp_path):
    files = plan(replace(hub, gate="accept the terms, then `hf auth login`"), tmp_path)
    server.files["/datasets/zai-org/LVBench/resolve/abc/video_info.meta.jsonl"] = "gated"
    with pytest.raises(DownloadError, match=r"video_info.*not handed out to you \(403\): accept the terms"):
        fetch(files)


def test_without_a_network_the_hub_is_named_as_out_of_reach(tmp_path):
    with pytest.raises(DownloadError, match="lvbench: zai-org/LVBench cannot be reached"):
        plan(DATA_SETS["lvbench"], tmp_path)
