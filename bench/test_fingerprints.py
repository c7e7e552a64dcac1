"""docs/fingerprints.md is what its rows say, and says what is not so."""

from __future__ import annotations

import copy
import json

import pytest

from bench import fingerprints, provenance
from stf_kernels import golden
from stf_kernels.golden import Outcome, Way

WAY = Way("cpu", "torch")


def outcome(**changed: str) -> Outcome:
    return Outcome(WAY, {**golden.RECORDED, **changed})


@pytest.fixture
def rows() -> list[dict]:
    return [json.loads(line) for line in fingerprints.ROWS.read_text().splitlines()]


def test_the_document_is_made_of_its_rows(rows):
    assert fingerprints.TABLE.read_text() == fingerprints.document(rows)


def test_no_gpu_is_claimed_that_no_row_names(rows):
    one = copy.deepcopy(rows[:1])
    one[0]["provenance"]["gpu"] = None
    assert "No GPU has run it" in fingerprints.document(one)
    one[0]["provenance"]["gpu"] = {"name": "H200", "driver": "580.1", "cuda": "13.0"}
    text = fingerprints.document(one)
    assert "No GPU" not in text
    assert "H200, driver 580.1, CUDA 13.0" in text


def test_a_row_keeps_what_differs():
    good, bad = outcome(), outcome(float32="0" * 64)
    made = fingerprints.row([good, bad, Outcome(WAY, {}, "it fell")], "command", None)
    assert [found["is"] for found in made["outcomes"]] == [
        "equal",
        "DIFFERENT: float32",
        "FAILED: it fell",
    ]
    first, second, third = (found["sha256"] for found in made["outcomes"])
    assert first == made["recorded"] == golden.fingerprint(golden.RECORDED)
    assert second not in (first, None)
    assert third is None
    assert json.loads(json.dumps(made)) == made


def test_a_row_for_other_hashes_is_not_called_equal():
    made = fingerprints.row([outcome()], "command", None)
    assert "| equal |" in fingerprints.document([made])
    made["outcomes"][0]["sha256"] = "0" * 64
    assert "| equal |" not in fingerprints.document([made])


def test_the_command_s_exit_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fingerprints, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(fingerprints, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr("sys.argv", ["fingerprints", "--record"])
    for found, expected in ((outcome(), 0), (outcome(statistics="0" * 64), 1)):
        monkeypatch.setattr(golden, "check", lambda _, found=found: iter([found]))
        assert fingerprints.main() == expected
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert "DIFFERENT: statistics" in (tmp_path / "table.md").read_text()
    assert "DIFFERENT: statistics" in capsys.readouterr().out


def test_the_driver_of_a_gpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda *command: "580.82.07\n580.82.07")
    assert provenance._driver() == "580.82.07"
    monkeypatch.undo()
    assert provenance._output("no-such-command-here") is None
