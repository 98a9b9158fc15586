"""The `minicpmv` command: what it prints, its exit codes, and that it stays light."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import minicpmv
from minicpmv import build_tokenizer, examples
from minicpmv import fetch as weights
from minicpmv.commands.main import app
from minicpmv.evaluate.scoring.boxes import iou


REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *parts):
    assert result.exit_code == 1
    assert result.stderr.startswith("minicpmv: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts)
    assert result.stdout == ""


def test_without_a_command_the_help_lists_them_all():
    result = run()
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "--help" in result.output


@pytest.mark.parametrize("name", ["chat", "ask", "read", "video", "serve", "web", "show", "fetch", "demo"])
def test_help_shows_how_a_command_is_used(name):
    shown = " ".join(run(name, "--help").output.split())
    assert f"Examples: minicpmv {name}" in shown


def test_a_shell_completes_commands_and_options():
    def completed(words):
        line = {"_MINICPMV_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        code = "from minicpmv.commands.main import app; app(prog_name='minicpmv')"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | line, capture_output=True, text=True
        )
        return done.stdout.split()

    assert completed("minicpmv as") == ["ask"]
    assert set(completed("minicpmv chat --thi")) == {"--think", "--thinking-budget"}


def test_help_shows_whole_names_and_no_type_of_flags():
    shown = run("ask", "--help").output
    assert "--trust-remote-code" in shown and "<bool>" not in shown


def test_the_version_is_that_of_the_package():
    result = run("--version")
    assert result.exit_code == 0 and result.output == f"minicpmv {minicpmv.__version__}\n"


def test_show_tells_what_a_checkpoint_is_without_loading_it():
    facts = json.loads(run("show", "-m", REPOSITORY / "nano", "--json").stdout)
    assert facts["parameters"] == 7_323_968 and facts["types"] == ["BF16"] and facts["context"] == 4096
    assert "drawn shapes" in facts["knows"] and "knows" in run("show", "-m", REPOSITORY / "nano").stdout


def test_show_of_what_is_no_model_is_a_one_line_error(tmp_path):
    assert_one_line_error(run("show", "-m", tmp_path / "nowhere"), "nowhere", "not a folder")
    assert_one_line_error(run("show", "-m", tmp_path), "no config.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert_one_line_error(run("show", "-m", tmp_path), "damaged")


def test_help_does_not_import_torch_or_transformers():
    code = (
        "import sys; from typer.testing import CliRunner; from minicpmv.commands.main import app; "
        "assert CliRunner().invoke(app, ['fetch', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fetch_outside_a_clone_is_a_one_line_error_with_the_remedy(tmp_path):
    assert_one_line_error(run("fetch", tmp_path), "config.json", "clone of this repository")


def test_check_only_without_weights_is_a_one_line_error_with_the_remedy(tmp_path):
    assert_one_line_error(run("fetch", tmp_path, "--check-only"), weights.INDEX, "minicpmv fetch")


def test_check_only_reports_what_it_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "published_shapes", lambda: {"a": [2, 3]})
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    result = run("fetch", tmp_path, "--check-only")
    assert result.exit_code == 0
    assert "published names and shapes" in result.stdout


def test_fetch_hands_repository_and_revision_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(weights, "fetch", lambda *arguments: calls.append(arguments) or weights.Weights(7, None))
    assert run("fetch", tmp_path, "--repo", "me/mine", "--revision", "abc").exit_code == 0
    assert calls == [(tmp_path, "me/mine", "abc")]


def test_build_tokenizer_without_its_config_is_a_one_line_error(tmp_path):
    assert_one_line_error(run("build-tokenizer", tmp_path), "tokenizer_config.json")


def test_build_tokenizer_says_whether_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(build_tokenizer, "build", lambda *arguments: (tmp_path / "tokenizer.json", True))
    assert run("build-tokenizer", tmp_path).stdout.strip().endswith("tokenizer.json: written")


def test_the_demo_shows_an_answer_of_every_kind_and_all_are_right():
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for right in (
        "How many shapes are there? 2",
        "What does it say? 47",
        "What is the TOTAL? 12.50",
        "What does the first picture say? 47",
        "What color is the square in the second picture? blue",
        "TIME: 18:05",  # of the page
        "thinking 17 thought: 7+5-3+8 | 7+5=12 | 12-3=9 | 9+8=17",
        "Which way does the shape move? right",
    ):
        assert any(line.startswith(right) for line in shown), (right, shown)
    for name, drawn in (("red circle", (65, 145, 255, 335)), ("blue square", (398, 158, 561, 322))):
        line = next(line for line in shown if line.startswith(name))
        assert iou([float(number) for number in line.removeprefix(name).split(",")], drawn) >= 0.5, line


def test_demo_of_a_folder_without_a_model_is_a_one_line_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert_one_line_error(run("demo", "--model", tmp_path), "holds no model")


def test_demo_outside_a_clone_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examples, "__file__", str(tmp_path / "minicpmv" / "examples.py"))
    assert_one_line_error(run("demo"), "not in a clone")


def test_training_without_its_packages_is_a_one_line_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "minicpmv.train.sft", raising=False)
    result = CliRunner().invoke(app, ["train", "sft", "--help"])
    assert result.exit_code == 1
    assert result.stderr == "minicpmv: trl is not installed: pip install -e '.[train]' in a clone\n"


def test_an_unknown_option_exits_with_2_and_names_it(tmp_path):
    result = run("fetch", tmp_path, "--revison", "abc")
    assert result.exit_code == 2
    assert "--revison" in result.stderr
