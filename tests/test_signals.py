"""Signals: one KeyboardInterrupt, between steps and never inside a write."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from ks import signals


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Handlers and state as in a process that has just begun its main function."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    for name, value in {"handled": (), "running": False, "depth": 0, "came": False, "raised": False}.items():
        monkeypatch.setattr(signals._State, name, value)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's & sets it
    signals.install("script.py")
    signals.begin()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_the_first_signal_interrupts_and_the_others_are_ignored(number):
    assert not signals.came()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signals.came()
    for another in signals.STOPPING:
        os.kill(os.getpid(), another)
    signals.check()


@signals.deferred()
def interrupt_and(done: list, inner=contextlib.nullcontext, error: Exception | None = None) -> None:
    with inner():
        os.kill(os.getpid(), signal.SIGINT)
    done.append("all of it")
    if error:
        raise error


@pytest.mark.parametrize("inner", [contextlib.nullcontext, signals.deferred])
def test_an_interrupt_waits_for_the_end_of_what_belongs_together(inner):
    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_and(done, inner)
    assert done == ["all of it"]


def test_an_interrupt_lands_where_it_is_asked_for():
    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_and(done, inner=lambda: contextlib.closing(Checked()))
    assert done == []


class Checked:
    def close(self):
        signals.check()


def test_an_error_is_not_hidden_by_an_interrupt():
    with pytest.raises(OSError, match="full"):
        interrupt_and([], error=OSError("full"))


def test_at_the_end_signals_change_nothing():
    signals.end()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not signals.came()


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install("script.py")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert callable(signal.getsignal(signal.SIGINT))


def test_before_the_main_function_a_signal_is_one_line():
    code = "import os, signal; from ks import signals; signals.install('a/b.py'); os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "b.py: interrupted\n")


def test_without_a_script_no_handler_changes():
    code = (
        "import signal; before = [signal.getsignal(n) for n in signal.valid_signals()]; import train_with_random;"
        "train_with_random.main(['--weight_path', 'missing.pth']);"
        "assert before == [signal.getsignal(n) for n in signal.valid_signals()]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_signals_that_a_platform_lacks_are_left_out():
    code = (
        "import signal; del signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR1; from ks import signals;"
        "signals.install('a.py'); assert [each.name for each in signals.STOPPING] == ['SIGINT', 'SIGTERM']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
