"""The pages keep their word: the card's metadata is well-formed, links lead somewhere, commands run, code prints what it says."""

import builtins
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import minicpmv
import minicpmv.chat


REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "nano" / "README.md"]
CHINESE = REPOSITORY / "README_zh.md"
OTHERS = [CHINESE, *(REPOSITORY / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "ROADMAP", "SECURITY"))]
README = PAGES[0].read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(REPOSITORY)).removesuffix(".md")


def code_blocks(page, language):
    """`(line number of the first code line, code)` of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)) + 1, match.group(1)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors that GitHub and the site make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_metadata_is_what_the_hub_expects():
    data = ModelCard(README).data
    assert data.license == "apache-2.0"
    assert data.to_dict()["library_name"] == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert "custom_code" in data.tags
    assert all((REPOSITORY / example["src"]).is_file() and example["text"] for example in data.widget)


def test_the_readme_is_a_first_page():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_every_link_into_the_repository_leads_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!https?://)([^)]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_of_the_site_is_in_its_navigation():
    config = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w-]+\.md)$", config.split("\nnav:")[1], re.MULTILINE)
    assert sorted(listed) == [page.name for page in sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_api_page_has_every_public_name():
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    public = {name for package in (minicpmv, minicpmv.chat) for name in package.__all__} - {"__version__"}
    assert [name for name in sorted(public) if not re.search(rf"^::: .*\b{name}\b", page, re.MULTILINE)] == []


def test_figures_of_nano_are_those_of_its_card():
    figures = README.split("## Figures")[1].split("Speed against")[0]
    card = (REPOSITORY / "nano" / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- nano table -->\n(.*?)\n<!-- end -->", card, re.DOTALL)
    shares = re.findall(r"[\d.]+ %", figures)
    assert shares and [share for share in shares if f" {share}" not in table] == []


@pytest.mark.parametrize("page", [*PAGES, CHINESE], ids=name_of)
def test_every_fenced_block_is_run_or_known_not_to_be(page):
    # Every second fence closes a block.
    languages = re.findall(r"^```(.*)\n", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    assert set(languages) <= {"python", "bash", "text", "json", "bibtex"}


@pytest.mark.parametrize("page", [page for page in PAGES if list(code_blocks(page, "bash"))], ids=name_of)
def test_commands_run(page, warm_python, monkeypatch):
    """The blocks of a page run in one shell. make only says what it would do: its targets run in CI, one of them this test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = (
        "set -euo pipefail\n"
        'make() { command make --dry-run "$@"; }\n'
        f'python() {{ {shlex.quote(warm_python)} "$@"; }}\n'
        'minicpmv() { python -m minicpmv "$@"; }\n'
    )
    for line, code in code_blocks(page, "bash"):
        script += f"echo 'line {line}' >&2\n{code}"
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, f"{name_of(page)}: {done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if list(code_blocks(page, "python"))], ids=name_of)
def test_python_blocks_run_in_order_and_print_what_their_comments_say(page, monkeypatch):
    """The blocks of a page share one namespace, as a reader's session does. `print(x)  # prints: y` promises y."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = page.read_text(encoding="utf-8").splitlines()
    promises = {
        number: promise.group(1)
        for number, line in enumerate(lines, start=1)
        if (promise := re.search(r"^ *print\(.*# prints: (.*)$", line))
    }
    assert sum("# prints: " in line for line in lines) == len(promises)
    printed = []

    def record(*values, **options):
        printed.append((sys._getframe(1).f_lineno, " ".join(map(str, values))))
        builtins.print(*values, **options)

    namespace = {"__name__": "__readme__", "print": record}
    for line, code in code_blocks(page, "python"):
        # Blank lines in front give tracebacks the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, page.name, "exec"), namespace)
    assert dict(output for output in printed if output[0] in promises) == promises


# ---- the Chinese README says what the English one says ----


def sections(text):
    """The texts between headings, without code blocks; the first is what stands above all of them."""
    return re.split(r"^#+ .*$", without_code(text), flags=re.MULTILINE)


def test_the_readmes_have_the_same_code_blocks_apart_from_comments():
    def without_comments(page):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        return [(language, re.sub(r" *#(?! prints: ).*", "", code)) for language, code in blocks]

    assert without_comments(CHINESE) == without_comments(PAGES[0])


def test_each_section_of_the_readmes_has_the_same_names_in_code_links_and_figures():
    english, chinese = sections(README), sections(CHINESE.read_text(encoding="utf-8"))
    for ours, theirs in zip(english[2:], chinese[2:], strict=True):  # below the title, where they link to each other
        for pattern in (r"`[^`\n]+`", r"\]\(([^)]+)\)"):
            assert set(re.findall(pattern, theirs)) == set(re.findall(pattern, ours))
        tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (ours, theirs)]
        for row, translated in zip(*tables, strict=True):
            numbers = r"\d+(?:\.\d+)*"
            assert re.findall(numbers, translated) == re.findall(numbers, row), translated
