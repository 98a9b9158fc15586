"""The pages keep their word: the card's metadata is well-formed, commands run, code prints what it says."""

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard


REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CHINESE = REPOSITORY / "README_zh.md"
README = PAGES[0].read_text(encoding="utf-8")


def code_blocks(page, language):
    """`(line number of the first code line, code)` of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)) + 1, match.group(1)


BASH_BLOCKS = [(page, line, code) for page in PAGES for line, code in code_blocks(page, "bash")]


def test_metadata_is_what_the_hub_expects():
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.to_dict()["library_name"] == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert "custom_code" in data.tags
    assert all((REPOSITORY / example["src"]).is_file() and example["text"] for example in data.widget)


@pytest.mark.parametrize("page", [*PAGES, CHINESE, REPOSITORY / "ROADMAP.md"], ids=lambda page: page.name)
def test_every_link_into_the_repository_leads_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_code_file_at_the_top_is_in_the_file_table():
    table = README.split("## Files")[1].split("## ")[0]
    assert [file.name for file in sorted(REPOSITORY.glob("*.py")) if f"`{file.name}`" not in table] == []


def test_the_list_of_files_that_run_with_trust_remote_code_is_complete():
    security = README.split("## Security")[1].split("## ")[0]
    for file in REPOSITORY.glob("*.py"):
        assert f"`{file.name}`" in security or f"`{file.name.removesuffix('minicpmv.py')}`" in security, file.name


@pytest.mark.parametrize("page", [*PAGES, CHINESE], ids=lambda page: page.name)
def test_every_fenced_block_is_run_or_known_not_to_be(page):
    # Every second fence closes a block.
    languages = re.findall(r"^```(.*)\n", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    assert set(languages) <= {"python", "bash", "text", "json", "bibtex"}
    assert "bash" in languages


@pytest.mark.parametrize(
    ("page", "line", "script"), BASH_BLOCKS, ids=[f"{page.stem}-line{line}" for page, line, _ in BASH_BLOCKS]
)
def test_commands_run(page, line, script, monkeypatch):
    """make only says what it would do: its targets run in CI, some of them this very test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    python = f'"{sys.executable}"'
    prelude = (
        "set -euo pipefail\n"
        'make() { command make --dry-run "$@"; }\n'
        f'python() {{ {python} "$@"; }}\n'
        f'minicpmv() {{ {python} -m minicpmv.commands.main "$@"; }}\n'
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["bash", "-c", prelude + script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{page.name}, line {line}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order_and_print_what_their_comments_say(page, monkeypatch):
    """The blocks of a page share one namespace, as a reader's session does. `print(x)  # prints: y` promises y."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = page.read_text(encoding="utf-8").splitlines()
    printed = []

    def record(*values, **options):
        printed.append((sys._getframe(1).f_lineno, " ".join(map(str, values))))
        builtins.print(*values, **options)

    namespace = {"__name__": "__readme__", "print": record}
    for line, code in code_blocks(page, "python"):
        # Blank lines in front give tracebacks the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, page.name, "exec"), namespace)

    for number, output in printed:
        promise = re.search(r"# prints: (.*)$", lines[number - 1])
        if promise:
            assert output == promise.group(1), f"{page.name}, line {number}"
    promised = sum("# prints: " in line for line in lines)
    assert promised <= len(printed)


# ---- the Chinese README says what the English one says ----


def sections(text):
    """The texts between headings, without code blocks; the first is what stands above all of them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.split(r"^#+ .*$", text, flags=re.MULTILINE)


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_readmes_have_the_same_code_blocks_apart_from_comments():
    def without_comments(page):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        return [(language, re.sub(r" *#(?! prints: ).*", "", code)) for language, code in blocks]

    assert without_comments(CHINESE) == without_comments(PAGES[0])


def test_the_readmes_have_the_same_outline():
    outlines = [
        [len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"(?s)^```.*?^```$", "", text, flags=re.M), re.M)]
        for text in (README, CHINESE.read_text(encoding="utf-8"))
    ]
    assert outlines[0] == outlines[1]


def test_each_section_of_the_readmes_has_the_same_names_in_code_and_the_same_links():
    english, chinese = sections(README), sections(CHINESE.read_text(encoding="utf-8"))
    for ours, theirs in zip(english[2:], chinese[2:], strict=True):  # below the title, where they link to each other
        for pattern in (r"`[^`\n]+`", r"\]\(([^)]+)\)"):
            assert set(re.findall(pattern, theirs)) == set(re.findall(pattern, ours))


def test_the_tables_of_the_readmes_have_the_same_rows_with_the_same_numbers():
    english, chinese = table_rows(README), table_rows(CHINESE.read_text(encoding="utf-8"))
    for ours, theirs in zip(english, chinese, strict=True):
        assert re.findall(r"\d+(?:\.\d+)*", theirs) == re.findall(r"\d+(?:\.\d+)*", ours), theirs


@pytest.mark.parametrize("page", [PAGES[0], CHINESE], ids=lambda page: page.name)
def test_the_table_of_nano_stands_between_its_marks(page):
    (table,) = re.findall(r"<!-- nano table -->\n(.*?)\n<!-- end -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert all(line.startswith("|") for line in table.splitlines()) and "| `printed_line` |" in table
