"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repository():
    """The model folder, with its tokenizer.json built."""
    from minicpmv.build_tokenizer import build

    return build(Path(__file__).parents[1])[0].parent


@pytest.fixture(scope="session")
def tokenizer(repository):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
