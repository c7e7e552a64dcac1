"""The report's parts, and that documents and figures are what the kept rows give."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import cases, documents, figures, parts, provenance, report, runs, sweeps
from bench.conftest import CPU
from bench.fresh import in_fresh_process
from bench.problems import Problem
from bench.rows import Row
from bench.runs import Run
from bench.sweeps import CURVES, Shape

ORIGIN = {
    "gpu": None,
    "cpu": "processor",
    "cores": 2,
    "flags": ["avx2"],
    "torch": "2",
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "abc",
    "command": "python -m bench.report",
}


def fake(by: str, score: Callable[[Problem], Tensor] = lambda problem: problem.x) -> cases.Case:
    return cases.Case("STF", by, lambda problem: lambda: score(problem))


def synthetic() -> Run:
    """A run with every kind of row, of times that follow from B n d."""
    rows = [
        Row("product", "fp32", 2048, 4096, 3072, 1.0, 3, rate=1e11),
        Row("copy", "device", 1, 1, 1 << 28, 1.0, 3, rate=1e10),
        Row("step", "small DSM", 128, 1024, 3072, 900.0, 5),
        Row("step", "small STF", 128, 4096, 3072, 990.0, 5, overhead=0.1),
        Row("file", "read for the norms", 1, 1000, 12_288, 1e3, 1),
        Row("file", "targets", 4, 1000, 12_288, 2e3, 1, error=1e-8, extra_bytes=10**8),
    ]
    for axis, curve in CURVES.items():
        for i, name in enumerate(sweeps.curve_names(axis, "cpu exact")):
            for shape in curve.shapes:
                row = sweeps.empty(fake(name.removeprefix("STF ")), shape)
                if name == "STF paper" and shape.B * shape.n > 1 << 18:
                    rows.append(replace(row, note="48 s a call"))
                    break
                ms = 1e-9 * (1 + i) * row.B * row.n * row.d
                rows.append(replace(row, ms=ms, rounds=3, error=1e-7, extra_bytes=10**6 * (i + 1)))
    for by in ("cpu exact", "Gram fp32", "16 nearest"):
        for sigma in (0.002, 0.4, 80.0):
            row = Row("STF", by, 1, 4096, 3072, None, 0, error=1e-7 / sigma, sigma=sigma)
            rows.append(replace(row, bias=0.1 if "nearest" in by else None))
    return Run("processor.json", ORIGIN, tuple(rows))


def test_documents_say_what_the_kept_rows_give():
    kept = runs.load()
    for path in documents.DOCUMENTS:
        assert path.read_text() == documents.filled(path, kept), "python -m bench.report --draw"


def test_every_block_stands_in_a_document():
    named = {
        match[2]
        for path in documents.DOCUMENTS
        for match in documents.BLOCK.finditer(path.read_text())
    }
    assert named == set(documents.BLOCKS)


def test_figures_are_those_of_the_kept_rows():
    drawn = {f"-{run.kind}.png": run.name for run in runs.drawn(runs.load())}
    kept = sorted(report.FIGURES.glob("*.png"))
    assert bool(kept) == bool(drawn)
    for path in kept:
        name = next(name for ending, name in drawn.items() if path.name.endswith(ending))
        assert Image.open(path).text["Source"] == name, "python -m bench.report --draw"


def test_every_figure_has_a_title_and_can_be_drawn():
    assert set(figures.FIGURES) == set(documents.FIGURE_TITLES)
    assert all(figure(synthetic()) is not None for figure in figures.FIGURES.values())
    empty = replace(synthetic(), rows=())
    assert all(figure(empty) is None for figure in figures.FIGURES.values() if figure)


def test_drawing_twice_gives_the_same_bytes(tmp_path):
    def drawn(name: str) -> bytes:
        run = synthetic()
        figure = figures.bias(run)
        assert figure is not None
        return figures.save(figure, run, tmp_path / name).read_bytes()

    assert drawn("first.png") == drawn("second.png")


def test_what_no_gpu_measured_is_said():
    text = "\n".join(
        line for block in documents.BLOCKS.values() for line in block([synthetic()], "")
    )
    assert text.count(documents.NO_GPU) == 10
    gpu = replace(synthetic(), origin=ORIGIN | {"gpu": {"name": "GPU"}})
    text = "\n".join(line for block in documents.BLOCKS.values() for line in block([gpu], ""))
    assert documents.NO_GPU not in text


def test_a_curve_that_stops_says_why():
    lines = documents.stops([synthetic()], "")
    assert "| paper's formula | n = 16 384 | 48 s a call |" in lines


def test_a_comparison_keeps_the_order_of_its_values():
    lines = documents.BLOCKS["noise"]([synthetic()], "")
    noise = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert noise[2:] == [noise for noise in ("edm", "ve", "flow") for _ in range(4)]


def test_the_newest_run_of_a_kind_of_machine_counts():
    old = synthetic()
    new = replace(old, name="new", origin=ORIGIN | {"date": "2026-02-01"})
    other = replace(old, name="vnni", origin=ORIGIN | {"flags": ["avx512_vnni"]})
    empty = replace(old, name="empty", rows=())
    assert [run.name for run in runs.drawn([empty, new, old, other])] == ["vnni", "new"]


def test_spread_labels_keep_their_order_and_distance():
    heights = [0.1, 0.11, 0.12, 0.5, 0.9, 0.9]
    found = figures.spread(heights)
    assert found == sorted(found)
    assert min(b - a for a, b in pairwise(found)) > 0.999 * figures.GAP
    assert found[3] == 0.5
    assert sum(found) == pytest.approx(sum(heights))


def test_a_curve_ends_where_time_or_memory_is_not_enough(monkeypatch):
    shapes = [Shape(1, n, 8) for n in (16, 64, 256)]

    def hungry(problem):
        if len(problem.refs) > 200:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes")
        return torch.zeros_like(problem.x)

    rows: list[Row] = []
    sweeps.measure(fake("peer", hungry), shapes, CPU, rows.append)
    assert [(row.n, row.note) for row in rows] == [(16, None), (64, None), (256, "out of memory")]
    assert rows[0].ms is not None
    assert rows[0].error == 1.0
    assert rows[2].ms is None

    monkeypatch.setattr(sweeps, "LEAST_EXTRAPOLATED", 0.0)
    monkeypatch.setattr(sweeps, "LONGEST", dict.fromkeys((True, False), 0.0))
    rows.clear()
    sweeps.measure(fake("peer", hungry), shapes, CPU, rows.append)
    assert [row.note for row in rows] == [None, "0 s a call"]

    with pytest.raises(RuntimeError, match="allocate"):
        sweeps.measure(fake("cpu exact", hungry), shapes[2:], CPU, rows.append)


def test_a_curve_has_a_process_for_each_case_and_fails_with_one(tmp_path, monkeypatch):
    started: list[str] = []

    def start(call: object, name: str, case: str, *rest: object) -> None:
        (problem,) = tmp_path.glob("problem-32-*")
        assert torch.load(problem, weights_only=False).truth.shape == (8, 3, 32, 32)
        started.append(case)
        if "flash" in case:
            raise BrokenProcessPool

    monkeypatch.setattr(sweeps, "in_fresh_process", start)
    with pytest.raises(SystemExit, match="failed: STF SDPA flash fp32"):
        sweeps.curves("kernels", tmp_path / "rows", CPU, quick=True)
    assert started == sweeps.curve_names("kernels", "cpu exact")
    assert not list(tmp_path.iterdir())


def test_a_process_of_a_curve_leaves_its_rows(tmp_path):
    file = tmp_path / "rows"
    case = "STF SDPA cuDNN fp32"
    in_fresh_process(sweeps.case_alone, "kernels", case, file, CPU, quick=True)
    (row,) = parts.read(file)
    assert (row.by, *row.shape) == ("SDPA cuDNN fp32", 32, 256, 3072)
    assert str(row.note).startswith("torch refuses: ")


def test_errors_have_a_row_for_each_level(monkeypatch):
    found = cases.cases(CPU)
    wanted = {name: found[name] for name in ("DSM -", "STF torch exact", "STF 16 nearest")}
    monkeypatch.setattr(sweeps, "cases", lambda device: wanted)
    rows: list[Row] = []
    sweeps.errors(CPU, rows.append, quick=True)
    exact = [row for row in rows if row.by == "torch exact"]
    assert [row.sigma for row in exact] == pytest.approx([0.002, 0.028284, 0.4, 5.6569, 80], 1e-4)
    assert max(row.error or 1 for row in exact) < 2**-24
    if (nearest := [row for row in rows if row.by == "16 nearest"])[0].note is None:
        assert max(row.bias or 0 for row in nearest) > 0.1


def test_rows_of_a_report_are_kept_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    row = Row("STF", "cpu exact", 1, 2, 3, 4.0, 5)
    code = f"import sys; open(sys.argv[1], 'a').write({json.dumps(asdict(row))!r} + chr(10))"
    monkeypatch.setattr(
        report, "PARTS", (parts.Part("errors", (sys.executable, "-c", code, "{rows}"), 1.0),)
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (outcome,) = report.measure(["errors"], 60.0, quick=False)
    assert outcome.failure is None
    (run,) = runs.load()
    assert run.rows == (row,)
