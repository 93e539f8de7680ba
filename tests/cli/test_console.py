"""Every way in which a script can end has its exit code, and errors of the user have one line."""

import pytest

from ks.cli import console
from ks.errors import InternalError, UsageError


def ending_with(error):
    @console.script
    def main(argv=None):
        raise error

    return main


def test_an_exit_code_is_handed_on(capsys):
    main = console.script(lambda argv=None: 3)
    assert main() == main(["--flag"]) == 3
    assert capsys.readouterr() == ("", "")


def test_what_the_user_did_is_one_line(capsys):
    assert ending_with(UsageError("--rank 0: too small"))([]) == 2
    assert ending_with(KeyboardInterrupt())([]) == 130
    lines = ["test_console.py: error: --rank 0: too small", "test_console.py: interrupted"]
    assert capsys.readouterr() == ("", "\n".join([*lines, ""]))


def test_an_error_of_the_system_is_one_line_with_its_place(capsys):
    for error in (OSError(28, "full", "some/file"), OSError(5, "broken"), OSError("words\nof a library")):
        assert ending_with(error)([]) == 1
    advice = "fix the cause, then rerun the same command"
    shown = ("full: some/file", "broken", "words of a library")
    assert capsys.readouterr() == ("", "".join(f"test_console.py: {text}; {advice}\n" for text in shown))


@pytest.mark.parametrize("error", [ValueError("x"), InternalError("x")], ids=lambda error: type(error).__name__)
def test_any_other_exception_is_a_fault_of_the_program(capsys, error):
    assert ending_with(error)([]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert type(error).__name__ in lines[-2]
    assert lines[-1] == "test_console.py: internal error; please report it with the command line"


def test_notes_are_on_stderr_unless_quiet(capsys):
    console.note("one")
    console.note("two", quiet=True)
    assert capsys.readouterr() == ("", "one\n")
