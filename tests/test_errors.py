"""Which errors end a command in one line, and which show their traceback."""

import pytest
from conftest import ground_floor

from minicpmv.errors import MiniCPMVError, MissingPackageError, one_line_errors, require


def shown(error, capsys, *also):
    with pytest.raises(SystemExit) as ended, one_line_errors(*also):
        raise error
    assert ended.value.code == 1 and ended.value.__cause__ is error
    return capsys.readouterr().err


@pytest.mark.parametrize("base", [MiniCPMVError, ground_floor("configuration_minicpmv").MiniCPMVError])
def test_errors_of_the_package_and_of_the_model_end_in_one_line(base, capsys):
    class OwnError(base):
        pass

    assert shown(OwnError("give\n  another file"), capsys) == "minicpmv: give another file\n"


def test_other_types_end_in_one_line_only_where_a_command_names_them(capsys):
    assert shown(FileNotFoundError("gone"), capsys, OSError) == "minicpmv: gone\n"
    with pytest.raises(FileNotFoundError), one_line_errors():
        raise FileNotFoundError("gone")


@pytest.mark.parametrize("bug", [ValueError, TypeError, RuntimeError])
def test_a_bug_shows_its_traceback(bug, capsys):
    with pytest.raises(bug), one_line_errors(OSError):
        raise bug("a bug")
    assert capsys.readouterr().err == ""


def test_a_message_cannot_steer_the_terminal(capsys):
    assert shown(MiniCPMVError("\x1b]0;title\x07 \x9b2J"), capsys) == "minicpmv: \ufffd]0;title\ufffd \ufffd2J\n"


def test_all_packages_that_lack_are_named_with_their_extra():
    require("train", "json", "email")
    with pytest.raises(
        MissingPackageError, match=r"nowhere, neverland are not installed: pip install -e '\.\[train\]'"
    ):
        require("train", "nowhere", "json", "neverland")
