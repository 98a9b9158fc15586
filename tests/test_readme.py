"""The model card keeps its word: its metadata is well-formed, its commands run, its code prints what it says."""

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard


REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    """`(line number of the first code line, code)` of every fenced block of a language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, match.start(1)) + 1, match.group(1)


PYTHON_BLOCKS = list(code_blocks("python"))
BASH_BLOCKS = list(code_blocks("bash"))


def test_metadata_is_what_the_hub_expects():
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert "custom_code" in data.tags
    assert all((REPOSITORY / example["src"]).is_file() and example["text"] for example in data.widget)


def test_every_link_into_the_repository_leads_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert targets and [target for target in targets if not (REPOSITORY / target).exists()] == []


def test_every_code_file_at_the_top_is_in_the_file_table():
    table = README.split("## Files")[1].split("## ")[0]
    assert [file.name for file in sorted(REPOSITORY.glob("*.py")) if f"`{file.name}`" not in table] == []


def test_the_list_of_files_that_run_with_trust_remote_code_is_complete():
    security = README.split("## Security")[1].split("## ")[0]
    for file in REPOSITORY.glob("*.py"):
        assert f"`{file.name}`" in security or f"`{file.name.removesuffix('minicpmv.py')}`" in security, file.name


def test_every_fenced_block_is_run_or_known_not_to_be():
    languages = re.findall(r"^```(.*)\n", README, re.MULTILINE)[::2]  # every second fence closes a block
    assert set(languages) <= {"python", "bash", "text", "bibtex"}
    assert len(PYTHON_BLOCKS) >= 6 and BASH_BLOCKS


@pytest.mark.parametrize(("line", "script"), BASH_BLOCKS, ids=[f"line{line}" for line, _ in BASH_BLOCKS])
def test_commands_run(line, script, monkeypatch):
    """make only says what it would do: its targets run in CI, some of them this very test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    python = f'"{sys.executable}"'
    prelude = (
        "set -euo pipefail\n"
        'make() { command make --dry-run "$@"; }\n'
        f'python() {{ {python} "$@"; }}\n'
        f'minicpmv() {{ {python} -m minicpmv.cli "$@"; }}\n'
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["bash", "-c", prelude + script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"README.md, line {line}: {done.stderr}"


def test_python_blocks_run_in_order_and_print_what_their_comments_say(monkeypatch):
    """All blocks share one namespace, as a reader's session does. `print(x)  # prints: y` promises the output y."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = README.splitlines()
    printed = []

    def record(*values, **options):
        printed.append((sys._getframe(1).f_lineno, " ".join(map(str, values))))
        builtins.print(*values, **options)

    namespace = {"__name__": "__readme__", "print": record}
    for line, code in PYTHON_BLOCKS:
        # Blank lines in front give tracebacks the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), namespace)

    assert printed
    for number, output in printed:
        promise = re.search(r"# prints: (.*)$", lines[number - 1])
        if promise:
            assert output == promise.group(1), f"README.md, line {number}"
