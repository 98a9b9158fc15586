"""The front door: `import minicpmv` is light, and its public names lead where they should."""

import subprocess
import sys
from importlib import metadata

import pytest

import minicpmv


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import minicpmv; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {"minicpmv", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", minicpmv.__all__)
def test_every_public_name_is_there(name):
    assert getattr(minicpmv, name) is not None
    assert name in dir(minicpmv)


def test_the_loader_is_a_public_name_and_evaluate_a_package_of_names():
    from minicpmv import evaluate, load
    from minicpmv.checkpoint import load as loader

    assert load is loader
    assert callable(evaluate.measure)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        minicpmv.lode  # noqa: B018


def test_a_name_whose_packages_are_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "minicpmv.data.load", raising=False)
    with pytest.raises(minicpmv.MissingPackageError, match=r"datasets is not installed: pip install -e '.\[train\]'"):
        minicpmv.load_conversations  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert metadata.version("minicpmv") == minicpmv.__version__
