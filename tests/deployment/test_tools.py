"""The files in deploy/ pass the tools that know their formats; nginx runs. `make deploy-check` has them all."""

import base64
import http.client
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
KEY, USERS = "0123456789abcdef", "alice:{PLAIN}wonder"


def needs(*programs):
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    found = [shutil.which(program, path=places) for program in programs]
    lacking = [program for program, place in zip(programs, found, strict=True) if place is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} is not installed")
    return found


def check(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/cuda.Dockerfile"])
def test_hadolint_finds_nothing_in_an_image(name):
    (hadolint,) = needs("hadolint")
    # DL3013: ranges, as everywhere here; the image of vLLM decides.
    check(hadolint, "--ignore", "DL3013", "--failure-threshold", "info", name, cwd=REPOSITORY)


def test_kubernetes_knows_every_field():
    (validate,) = needs("kubernetes-validate")
    told = check(validate, "--strict", "-k", "1.33", DEPLOY / "kubernetes" / "minicpmv.yaml")
    assert told.count("passed for resource") == 5


def test_compose_knows_every_field():
    compose_spec = pytest.importorskip("compose_spec")
    for name in ("compose.yaml", "compose.cuda.yaml"):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        compose_spec.PyCompose.from_yaml(
            re.sub(r"\$\{\w+:(?:-(.*?)|\?.*?)\}", lambda found: found[1] or "/weights", text)
        )


def test_compose_files_fit_together():
    (compose,) = needs("docker-compose")
    both = [compose, "-f", "deploy/compose.yaml", "-f", "deploy/compose.cuda.yaml", "config"]
    told = check(*both, cwd=REPOSITORY, env=os.environ | {"MODEL": "/weights"})
    assert "/weights:/model:ro" in told and "cuda.Dockerfile" in told
    assert "-m nano" in check(*both[:3], "config", cwd=REPOSITORY)


def test_systemd_takes_the_unit_and_finds_it_shut_in(tmp_path):
    (analyze,) = needs("systemd-analyze")
    unit = tmp_path / "minicpmv.service"
    text = (DEPLOY / "minicpmv.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/minicpmv/.venv/bin/minicpmv", "/bin/true"), encoding="utf-8")
    assert "minicpmv.service" not in check(analyze, "verify", unit)
    check(analyze, "security", "--offline=true", "--threshold=30", unit)


# ---- nginx ----


class Upstream(http.server.BaseHTTPRequestHandler):
    """What stands for the model. Of /stream the second half comes when it is let go."""

    protocol_version = "HTTP/1.1"
    seen, go = [], threading.Event()

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        if self.path == "/stream":
            self.go.wait(30)
        self.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")

    def log_message(self, *words):
        pass


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    """(of https, of http), where nginx listens before `Upstream`."""
    nginx, openssl = needs("nginx", "openssl")
    folder = tmp_path_factory.mktemp("nginx")
    new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    check(openssl, *new, "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem")
    (folder / "users").write_text(USERS + "\n")
    (folder / "keys").write_text(f'"Bearer {KEY}" off;\n')
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    https, plain = free_port(), free_port()
    site = (DEPLOY / "minicpmv.conf").read_text(encoding="utf-8")
    for old, new in {
        "/etc/nginx/secrets": str(folder),
        "http://minicpmv:8000": f"http://127.0.0.1:{upstream.server_port}",
        "listen 443 ssl": f"listen 127.0.0.1:{https} ssl",
        "listen 80": f"listen 127.0.0.1:{plain}",
    }.items():
        assert old in site
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    http_part = f"http {{ access_log off; {temporary} include {folder}/site.conf; }}"
    user = "user root;" if os.geteuid() == 0 else ""  # else it could not look into this folder
    settings = f"daemon off; {user} pid {folder}/pid; error_log stderr warn; events {{}} {http_part}"
    (folder / "nginx.conf").write_text(settings)
    told = check(nginx, "-t", "-c", folder / "nginx.conf", "-e", "stderr")
    assert "[warn]" not in told, told
    with subprocess.Popen([nginx, "-c", folder / "nginx.conf", "-e", "stderr"]) as process:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", https)) == 0:
                    break
            time.sleep(0.1)
        yield https, plain
        process.terminate()
    upstream.shutdown()


def ask(port, path, **headers):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def basic(login):
    return "Basic " + base64.b64encode(login.encode()).decode()


def test_nginx_lets_in_whoever_has_a_login_or_a_key(ports):
    https, plain = ports
    for wrong in (
        {},
        {"Authorization": f"Bearer {KEY}0"},
        {"Authorization": basic("alice:no")},
        {"Authorization": "off"},
    ):
        answer = ask(https, "/v1/models", **wrong)
        assert (answer.status, answer.getheader("WWW-Authenticate")) == (401, 'Basic realm="MiniCPM-V"')
    before = len(Upstream.seen)
    for right in (f"Bearer {KEY}", basic("alice:wonder")):
        assert ask(https, "/v1/models", Authorization=right).status == 200
    assert len(Upstream.seen) == before + 2
    assert all("Authorization" not in headers for _, headers in Upstream.seen)
    connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=20)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}", "Host": "example.com"})
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Location")) == (301, "https://example.com/v1/models")


def test_nginx_tells_health_to_everybody_and_figures_to_nobody(ports):
    assert ask(ports[0], "/health").status == 200
    assert ask(ports[0], "/metrics", Authorization=f"Bearer {KEY}").status == 404


def test_nginx_refuses_a_request_that_is_too_large_before_it_came(ports):
    assert ask(ports[0], "/v1/models", Authorization=f"Bearer {KEY}", Content_Length="100000000").status == 413


def test_nginx_hands_on_a_stream_as_it_comes(ports):
    answer = ask(ports[0], "/stream", Authorization=f"Bearer {KEY}")
    try:
        assert answer.read1() == b"first"
    finally:
        Upstream.go.set()
    assert answer.read() == b"last"
