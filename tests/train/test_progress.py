"""Bars on a terminal, lines in a log."""

import sys

import pytest

from stf_train import progress
from stf_train.progress import EVERY, SOON, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_a_log_has_a_line_now_and_then(clock, capsys):
    with Progress(1000, "step", "run", done=100) as bar:
        for step in range(900):
            clock(0.5)
            bar.update(note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run: step 120/1000, loss 19, 10 s"
    assert lines[-1] == "run: step 1000/1000, loss 899, 450 s"
    assert len(lines) == 2 + int((450 - SOON) // EVERY)
    assert not any("\r" in line for line in lines)


def test_brief_work_is_not_worth_a_line(clock, capsys):
    with Progress(3, "sample") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    with Progress(3, "sample", brief=False) as bar:
        bar.update(2)
        bar.update()
    assert capsys.readouterr().err == "sample 3/3, 0 s\n"


def test_quiet_says_nothing(clock, capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with Progress(3, "sample", brief=False, quiet=True) as bar:
            clock(100)
            bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(16, "step", brief=False) as bar:
        for _ in range(16):
            bar.update(note="loss 1")
    said = capsys.readouterr().err
    assert "\r" in said
    assert "16/16" in said
    assert "loss 1" in said
