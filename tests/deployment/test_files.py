"""The files in deploy/ that people copy agree with the programs they start, and with each other."""

import re
import shlex
from pathlib import Path

import pytest
import tomllib
import yaml
from conftest import NANO, REPOSITORY
from huggingface_hub import SpaceCard

from minicpmv.commands.main import app


DEPLOY = REPOSITORY / "deploy"
KUBERNETES = {
    document["kind"]: document
    for document in yaml.safe_load_all((DEPLOY / "kubernetes" / "minicpmv.yaml").read_text(encoding="utf-8"))
}
POD = KUBERNETES["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def docker_command(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return yaml.safe_load(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1])


def compose_command(name):
    command = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))["services"]["minicpmv"]["command"]
    return shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", command))


def systemd_command():
    program, *words = shlex.split(
        re.search(r"^ExecStart=(.*)$", (DEPLOY / "minicpmv.service").read_text(encoding="utf-8"), re.MULTILINE)[1]
    )
    assert program.endswith("/bin/minicpmv")
    return words


COMMANDS = {
    "Dockerfile": docker_command("Dockerfile"),
    "cuda.Dockerfile": docker_command("deploy/cuda.Dockerfile"),
    "compose.yaml": compose_command("compose.yaml"),
    "compose.cuda.yaml": compose_command("compose.cuda.yaml"),
    "minicpmv.service": systemd_command(),
    "kubernetes": CONTAINER["args"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_that_the_program_takes(name):
    import typer

    group = typer.main.get_command(app)
    verb, *words = COMMANDS[name]
    context = group.commands[verb].make_context(verb, words)  # an unknown option or value would end it
    assert context.params["host"] in ("0.0.0.0", "127.0.0.1") and context.params["port"] == 8000


def test_probes_ask_what_the_server_answers():
    from minicpmv.serving import app as server

    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"http": 8000}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": "http"}
    source = Path(server.__file__).read_text(encoding="utf-8")
    assert '"/health"' in source and '"/metrics"' in source
    notes = POD["metadata"]["annotations"]
    assert notes["prometheus.io/path"] == "/metrics" and notes["prometheus.io/port"] == "8000"
    assert KUBERNETES["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def test_the_number_of_pods_follows_the_queue():
    (metric,) = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["metrics"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    (rule,) = adapter["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    names = re.search(r'__name__=~"(.*?)"', rule["seriesQuery"])[1].split("|")
    from minicpmv.serving import metrics

    assert names[0] in Path(metrics.__file__).read_text(encoding="utf-8") and names[1].startswith("vllm:")


def test_everything_is_selected_by_the_label_that_the_pods_have():
    label = {"app": "minicpmv"}
    spec = {kind: document["spec"] for kind, document in KUBERNETES.items()}
    assert POD["metadata"]["labels"] == spec["Service"]["selector"] == label
    assert spec["Deployment"]["selector"]["matchLabels"] == label
    assert spec["PodDisruptionBudget"]["selector"]["matchLabels"] == label
    assert spec["NetworkPolicy"]["podSelector"]["matchLabels"] == label
    assert spec["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == KUBERNETES["Deployment"]["metadata"]["name"]


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {*project["dependencies"], *(line for lines in extras.values() for line in lines)}
    for file in DEPLOY.glob("*/requirements.txt"):
        assert set(file.read_text(encoding="utf-8").split("\n")) - {""} <= known, file


def test_the_space_says_what_to_run():
    card = SpaceCard.load(DEPLOY / "space" / "README.md", ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["sdk"] == "gradio" and (DEPLOY / "space" / data["app_file"]).is_file()
    pinned = re.search(r"^gradio==(.*)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert data["sdk_version"] == pinned[1]


def test_an_inference_endpoint_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(DEPLOY / "endpoint"))
    from handler import EndpointHandler

    handler = EndpointHandler(str(NANO))
    image = {"type": "image_url", "image_url": {"url": data_url("number.jpg")}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What does it say?"}]}]
    for request in ({"messages": messages, "temperature": 0}, {"inputs": messages, "parameters": {"temperature": 0}}):
        assert handler(request)["choices"][0]["message"]["content"] == "47"
    assert handler({"inputs": "Hello", "parameters": {"max_tokens": 1}})["usage"]["completion_tokens"] == 1
    file = {"type": "image_url", "image_url": {"url": str(REPOSITORY / "assets" / "number.jpg")}}
    refused = handler({"messages": [{"role": "user", "content": [file]}]})
    assert refused["error"]["type"] == "invalid_request_error"
    handler.engine.close()


def data_url(name):
    import base64

    content = (REPOSITORY / "assets" / name).read_bytes()
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
