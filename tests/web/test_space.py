"""The app of the Hugging Face Space in deploy/ opens the page with a model."""

import runpy
import shutil

import pytest
from conftest import NANO, REPOSITORY

from minicpmv.web import page


def test_the_space_opens_the_page_for_everybody(tmp_path, monkeypatch):
    shutil.copy(REPOSITORY / "deploy" / "space" / "app.py", tmp_path)
    (tmp_path / "nano").symlink_to(NANO)  # as in a clone
    opened = []
    monkeypatch.setattr(page, "launch", lambda blocks, host, port: opened.append((blocks, host, port)))
    monkeypatch.delenv("MODEL", raising=False)
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    ((blocks, host, port),) = opened
    assert (host, port) == ("0.0.0.0", 7860) and type(blocks).__name__ == "Blocks"
    monkeypatch.setenv("MODEL", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none"):
        runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
