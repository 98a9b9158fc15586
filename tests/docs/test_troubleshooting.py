"""The messages of docs/troubleshooting.md are those that the code gives."""

import ast
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Of the published code, of torch and of vLLM.
FOREIGN = (
    "all_tied_weights_keys",
    "transformers_modules",
    "torchvision::nms",
    "Sizes of tensors",
    "torch.hstack",
    "CUDA out of memory",
    "reasoning_content",
    "2.0, …",
    "Got (4, 5)",
    "operator",
    "undefined symbol",
    "nano/",
    "generate",
    "PromptTooLongError",
)


@pytest.fixture(scope="module")
def texts_of_the_code():
    """Every piece of text in the code, as one; what an f-string fills in is left out."""
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "minicpmv").rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_every_message_of_this_repository_is_one_that_it_gives(texts_of_the_code):
    messages = [
        message
        for row in re.findall(r"^\| (.*?) \| ", PAGE, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
    ]
    ours = [message for message in messages if not any(part in message for part in FOREIGN)]
    pieces = [piece.strip() for message in ours for piece in message.split("…")]
    assert len(ours) > 20
    assert [piece for piece in pieces if piece not in texts_of_the_code] == []
