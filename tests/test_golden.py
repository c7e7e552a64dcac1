"""The golden command: which ways it goes, that it goes them, and that it says what differs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stf_kernels import cpu_backend, golden, pipeline
from stf_kernels.golden import Way

ONE_CASE = "levels exact"
needs_extension = pytest.mark.skipif(
    cpu_backend.extension() is None, reason="the extension stf_kernels._C is not built"
)


@pytest.fixture
def one_case(monkeypatch):
    """The command with one case only."""
    monkeypatch.setattr(golden, "CASES", {ONE_CASE: golden.CASES[ONE_CASE]})


def run(monkeypatch, capsys, *chosen: Way, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Exit status and lines of the command where these are the ways there are."""
    monkeypatch.setattr(golden, "ways", lambda: iter(chosen))
    monkeypatch.setattr("sys.argv", ["golden", *options])
    status = golden.main()
    return status, capsys.readouterr().out.splitlines()


@needs_extension
def test_ways_are_all_there_are_on_a_cpu():
    found = set(golden.ways())
    for code in cpu_backend.extension().isas():
        for threads in (1, 2):
            assert Way("cpu", "cpu", code, threads) in found
    for references in ("resident", "file"):
        for workspace in ("default", "least"):
            assert Way("cpu", "torch", references=references, workspace=workspace) in found
    if dist.is_available() and dist.is_gloo_available():
        counts = {way.processes for way in found if way.backend == "cpu"}
        assert counts == {0, 1, 2, 3, 4}


@needs_extension
def test_a_way_is_gone(one_case):
    """Threads, instruction set, placement and chunks are those that the way names."""
    seen = []
    run_pipeline, stages = pipeline.run, cpu_backend.extension()
    before = torch.get_num_threads(), stages.isa()

    def spy(backend, queries, refs, precision, statistics, workspace, ranks):
        limbs = 4
        cut = pipeline.plan(backend, len(queries.x), len(refs.norms), refs, limbs, workspace)
        seen.append((backend.NAME, refs.values.placement, cut.columns, stages.isa()))
        seen[-1] += (torch.get_num_threads(),)
        return run_pipeline(backend, queries, refs, precision, statistics, workspace, ranks)

    with mock.patch.object(pipeline, "run", spy):
        way = Way("cpu", "cpu", "baseline", 2, references="file", workspace="least")
        (outcome,) = golden.check([way])
    assert outcome.verdict == "equal"
    assert seen == [("cpu", "file", 128, "baseline", 2)]
    assert (torch.get_num_threads(), stages.isa()) == before


def test_equal_bits_are_exit_status_0(one_case, monkeypatch, capsys):
    status, lines = run(monkeypatch, capsys, Way("cpu", "torch"), options=("--cases",))
    assert status == 0
    assert lines[0].endswith(f"{golden.RECORDED[ONE_CASE]} equal")
    assert any(line.startswith("cpu     torch") and line.endswith("equal") for line in lines[1:])


def test_a_different_bit_is_named_and_exit_status_1(one_case, monkeypatch, capsys):
    compute = golden.Problem.compute

    def one_bit_off(self, *args, **where):
        out = compute(self, *args, **where)
        out.view(torch.int32)[3, 5] ^= 1
        return out

    monkeypatch.setattr(golden.Problem, "compute", one_bit_off)
    status, lines = run(monkeypatch, capsys, Way("cpu", "torch"))
    assert status == 1
    assert lines[0].startswith(f"cpu torch - 1 resident default -: {ONE_CASE}")
    assert lines[0].endswith("DIFFERENT")
    assert any(line.endswith(f"DIFFERENT: {ONE_CASE}") for line in lines[1:])


def test_a_way_that_fails_is_exit_status_1(one_case, monkeypatch, capsys):
    status, lines = run(monkeypatch, capsys, Way("cpu", "none"), Way("cpu", "torch"))
    assert status == 1
    assert "FAILED: ValueError: backend must be one of" in lines[1]
    assert lines[2].endswith("equal")


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs Gloo")
def test_processes_return_one_outcome_for_each_way():
    found = list(golden.check([Way("cpu", "none", processes=2), Way("cpu", "auto", processes=2)]))
    assert [outcome.verdict.split(" ")[0] for outcome in found] == ["FAILED:", "equal"]
    assert set(found[1].digests) == set(golden.CASES)
