"""The instruments themselves, on any machine: `pytest bench/test_instruments.py`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import (
    cases,
    floors,
    gpu_command,
    gpu_parts,
    memory,
    parts,
    peers,
    provenance,
    rows,
    sanitizer,
    sweeps,
    training,
)
from bench.conftest import CPU
from bench.fresh import in_fresh_process
from bench.goals import verdicts
from bench.parts import Outcome, Part
from bench.problems import photographs, relative_error
from bench.rows import Row, table
from stf_kernels import cuda_backend

MEGABYTE = 10**6


def touching_100_megabytes() -> int | None:
    def call() -> torch.Tensor:
        torch.ones(16_000_000)  # 64 MB, gone before the next
        return torch.ones(25_000_000)

    torch.ones(1000)
    kept = [bytes(1000) for _ in range(30_000)]  # 30 MB of small blocks the C library may keep
    del kept
    return memory.extra_bytes(call, CPU)


def refused() -> None:
    raise ValueError("refused there")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_a_call_touches_at_its_peak():
    extra = in_fresh_process(touching_100_megabytes)
    # Linux counts resident pages in batches for each processor: about a megabyte of doubt.
    assert 99 <= extra / MEGABYTE <= 104


def test_a_fresh_process_is_another_one_each_time():
    found = {in_fresh_process(os.getpid) for _ in range(2)}
    assert len(found - {os.getpid()}) == 2


def test_a_fresh_process_raises_here_what_it_raised_or_that_it_ended():
    with pytest.raises(ValueError, match="refused there"):
        in_fresh_process(refused)
    with pytest.raises(BrokenProcessPool):
        in_fresh_process(os._exit, 3)


def test_samples_come_from_references_and_the_truth_is_known_at_low_noise():
    problem = photographs(64, 200)
    sigma = problem.sigma[:, None, None, None]
    y = problem.refs.decode(problem.source)
    deviation = ((problem.x - y) / sigma).flatten(1).std(dim=1)
    assert (deviation - 1).abs().max() < 0.1  # of 3072 normal numbers: 1 +- 0.013
    first = problem.checked[0]
    assert sigma[first] == sigma.amin()
    # At this noise no other patch has any weight: the target is that of denoising.
    exact = (y[first].double() - problem.x[first].double()) / sigma[first].double() ** 2
    error = (problem.truth[0] - exact).norm() / exact.norm()
    assert error < 2**-23 / sigma[first]  # y is rounded to float32 here, and the noise is sigma


def test_worst_error_is_that_of_the_worst_checked_row():
    problem = photographs(64, 200)
    score = torch.zeros_like(problem.x)
    score[problem.checked] = problem.truth.float()
    assert problem.worst_error(score) < 2**-24
    score[problem.checked[3]] *= 1.25
    assert problem.worst_error(score) == pytest.approx(0.25)


@pytest.mark.parametrize("function", [peers.paper, peers.gram, peers.sdpa, peers.stable_vm])
def test_peers_compute_the_score(function):
    problem = photographs(8, 200)
    # A float form may lose digits here; another formula would be off by parts of one.
    assert problem.worst_error(cases.peer(function)(problem)()) < 1e-3


def test_nearest_references_are_all_where_k_is_n_and_biased_where_it_is_less():
    pytest.importorskip("faiss")
    problem = photographs(8, 200, noise="levels")
    assert problem.worst_error(cases.truncated(1024)(problem)()) < 1e-4
    # At sigma 80 all 200 patches count alike, and 16 near ones have another mean.
    assert problem.worst_error(cases.truncated(16)(problem)()) > 1e-3


def test_stable_vm_gives_uniform_weights_where_its_clamp_meets_the_source():
    # ||x - y||^2 / (2 sigma^2) is d / 2 for the source, beyond 10 000 in 24 576 dimensions.
    y = torch.randn(3, 24_576, generator=torch.Generator().manual_seed(0))
    x = y[:1] + 0.1 * torch.randn(1, 24_576, generator=torch.Generator().manual_seed(1))
    score = peers.stable_vm(x, peers.prepare(y), torch.tensor([0.1]))
    uniform = (y.mean(0, keepdim=True) - x) / 0.1**2
    assert relative_error(score, uniform.double()).item() < 2**-20


def test_a_replayed_case_calls_once_to_compile_and_once_to_be_recorded(monkeypatch):
    done = []

    class Graph:
        def replay(self) -> None:
            done.append("replayed")

    @contextmanager
    def recording(graph: Graph) -> Iterator[None]:
        done.append("recording")
        yield
        done.append("recorded")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    case = cases.Case("STF", "mine", lambda problem: lambda: done.append("called") or problem)
    graph = cases.replayed(case)
    assert graph.name == "STF mine, graph"
    given = object()
    assert graph.build(given)() is given
    assert done == ["called", "recording", "called", "recorded", "replayed"]


def test_what_a_target_adds_has_a_standard_error():
    system = training.digits("cpu")
    (n,) = system.references
    dsm, stf = [100.0] * 9, [103.0, 107.0, 101.0, 109.0, 105.0, 102.0, 108.0, 104.0, 106.0]
    plain, stable = system.rows({None: dsm, n: stf})
    assert plain.overhead is plain.overhead_error is None
    # Of 1, ..., 9 more the median is 5, and those at 4.5 +- 1.5 from either end are 4 and 6.
    assert (stable.overhead, stable.overhead_error) == (0.05, 0.01)
    assert rows.percent(stable) == "+5.0 ± 1.0 %"


def test_kernels_that_refuse_are_named_in_torchs_words():
    found = cases.cases(CPU)
    assert found["STF SDPA math fp32"].missing is None
    assert str(found["STF SDPA cuDNN fp32"].missing).startswith("torch refuses: ")


@pytest.mark.parametrize(
    ("noise", "low", "high"), [("ve", 0.02, 100), ("flow", 1e-4, 1e4), ("levels", 0.002, 80)]
)
def test_noise_levels_fill_their_range(noise, low, high):
    sigma = photographs(512, 8, 8, noise=noise).sigma
    assert low * 0.999 <= sigma.amin() < sigma.amax() <= high * 1.001
    if noise == "flow":  # t is uniform: its mean is 1/2 within five deviations
        assert abs((sigma / (1 + sigma)).mean() - 0.5) < 5 / (12 * 512) ** 0.5
    else:
        middle, width = math.log(low * high) / 2, math.log(high / low)
        assert abs(sigma.log().mean() - middle) < 5 * width / (12 * 512) ** 0.5


@pytest.mark.parametrize("refs", ["float16", "float32, 2 limbs", "float32"])
def test_float_references_are_their_own_truth(refs):
    problem = photographs(8, 100, 8, refs=refs, noise="levels")
    assert problem.refs.limbs == (4 if refs == "float32" else 2)
    bound = 1e-6 if refs == "float32" else 1.0
    assert problem.worst_error(cases.stable("torch", "exact")(problem)()) < bound


@pytest.mark.parametrize("function", [peers.gram, peers.sdpa])
def test_half_precision_peers_give_finite_float_scores(function):
    score = cases.peer(function, torch.bfloat16)(photographs(8, 200))()
    assert score.dtype == torch.float32
    assert score.isfinite().all()


def test_every_backend_of_the_device_is_a_case():
    names = {case.name for case in cases.ours(CPU)}
    assert {"STF torch exact", "STF torch fast", cases.yardstick(CPU)} <= names
    assert names | {"DSM -"} <= set(cases.cases(CPU))


def row(what: str, by: str, ms: float, extra_bytes: int | None = None) -> Row:
    return Row(what, by, B=512, n=4096, d=3072, ms=ms, rounds=3, extra_bytes=extra_bytes)


def test_table_divides_by_ours_of_the_same_shape():
    rows = [row("STF", "cpu exact", 50.0, extra_bytes=56 * MEGABYTE), row("STF", "Gram", 175.0)]
    rows.append(Row("STF", "Gram", 64, 4096, 3072, ms=1.0, rounds=3))
    lines = [line.split() for line in table(rows, "STF cpu exact")]
    assert lines[1][6:] == ["50.00", "1.00", "-", "56"]
    assert lines[2][5:7] == ["175", "3.50"]
    assert lines[3][5:7] == ["1.00", "-"]


def test_goals_are_reached_missed_or_not_measured():
    rows = [
        row("STF", "cpu exact", 50.0, extra_bytes=65 * MEGABYTE),
        row("STF", "Gram fp32", 149.0),
        row("STF", "SDPA fp32", 150.0),
    ]
    words = [line.split(": ", 1)[1] for line in verdicts(rows)]
    assert words == [
        "at least 3, MISSED: 2.98",
        "at least 3, reached: 3",
        "at least 1000, not measured",
        "at least 0.7, not measured",
        "at most 64, MISSED: 65",
        "at most 2, not measured",
    ]


def test_results_hold_rows_and_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    origin = provenance.provenance(CPU, "pytest bench/", commit="abc")
    path = provenance.write([row("STF", "cpu exact", 50.0)], origin)
    kept = json.loads(path.read_text())
    assert kept["rows"][0]["ms"] == 50.0
    assert kept["provenance"]["commit"] == "abc"
    assert kept["provenance"]["torch"] == torch.__version__
    assert kept["provenance"]["gpu"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_command_fails_without_a_gpu():
    command = Path(gpu_command.__file__).with_name("gpu")
    done = subprocess.run([sys.executable, command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert done.stdout == ""


def test_parts_end_in_time_and_say_how(tmp_path, capfd):
    def outcome(code: str, limit: float = 60) -> Outcome:
        part = Part("part", (sys.executable, "-c", code, "{rows}"), 1.0)
        return parts.run(part, tmp_path / "rows", limit)

    assert outcome("import sys; open(sys.argv[1], 'w').write('rows')").failure is None
    assert (tmp_path / "rows").read_text() == "rows"
    assert outcome("raise SystemExit(3)").failure == "exit status 3"
    start = time.monotonic()
    late = "import subprocess; subprocess.run(['sleep', '60'])"
    assert outcome(late, 2).failure == "not done after 2 s"
    assert outcome("", 0.5).failure == "no time was left for it"
    assert time.monotonic() - start < 30
    assert capfd.readouterr().out.count("part: FAILED") == 2


def test_rows_of_an_interrupted_part_are_read(tmp_path):
    file = tmp_path / "rows"
    assert parts.read(file) == []
    kept = row("STF", "cuda exact", 0.1)
    line = json.dumps(kept.__dict__)
    file.write_text(f"{line}\n{line[:20]}")
    assert parts.read(file) == [kept]


def test_floors_come_from_the_best_rates():
    rows = [
        Row("product", kind, *size, ms=1.0, rounds=3, rate=rate)
        for kind, size, rate in [
            ("bf16", (2048, 4096, 3072), 5e14),
            ("bf16", (8192, 8192, 8192), 8e14),
            ("int8", (8192, 8192, 8192), 12e14),
        ]
    ]
    found = gpu_command.floor_rows([*rows, row("STF", "cuda exact", 0.1)])
    operations = 2 * 512 * 4096 * 3072
    assert {floor.by: floor.ms for floor in found} == {
        "two bf16 products": pytest.approx(1e3 * 2 * operations / 8e14),
        "one int8 product": pytest.approx(1e3 * operations / 12e14),
        "two int8 products, four limbs": pytest.approx(1e3 * 8 * operations / 12e14),
    }
    copied = Row("copy", "device", 1, 1, 1 << 28, ms=1.0, rounds=3, rate=2e10)
    assert floors.floors([copied], 1, 1000, 2000) == {floors.READ: pytest.approx(0.1)}
    assert gpu_command.product_ratios(rows) == ["int8 / bf16 product rate at 8192x8192x8192: 1.50"]


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The parts of bench/gpu at small shapes on the CPU, with a clock that calls once."""
    monkeypatch.setattr(sweeps, "milliseconds", lambda call, *_: (call() is None, 1))
    monkeypatch.setattr(gpu_parts, "SHAPES", ((4, 96, 16), (2, 96, 16)))
    monkeypatch.setattr(gpu_parts, "PAPER_ELEMENTS", 2 * 96 * 3 * 16**2)


@pytest.mark.parametrize("part", ["targets", "slow-peers"])
def test_parts_measure_every_case_once(part, on_the_cpu):
    rows: list[Row] = []
    gpu_parts.PARTS[part](CPU, rows.append)
    measured = [(f"{row.what} {row.by}", row.B) for row in rows]
    assert len(set(measured)) == len(measured)
    present = {case.name: case.slow for case in cases.cases(CPU).values() if not case.missing}
    slow = part == "slow-peers"
    wanted = {name for name in present if present[name] == slow} | {cases.yardstick(CPU)}
    assert set(measured) == {(name, B) for name in wanted for B in ((2,) if slow else (4, 2))}


def test_both_products_are_measured_by_every_kernel_of_the_gpu(on_the_cpu, monkeypatch):
    class NoKernels:
        def __getattr__(self, name: str) -> object:
            return lambda *arguments: True

    monkeypatch.setattr(gpu_parts, "milliseconds", lambda call, *_: (1.0 + (call() is None), 3))
    monkeypatch.setattr(cuda_backend, "_functions", NoKernels)
    monkeypatch.setattr(cuda_backend, "unavailable", lambda device: None)
    rows: list[Row] = []
    for capability, kernels in (((8, 0), ["portable"]), ((9, 0), ["portable", "hopper"])):
        monkeypatch.setattr(cuda_backend, "capability", lambda device, found=capability: found)
        rows.clear()
        gpu_parts.cuda_products(CPU, rows.append)
        assert [(row.by, row.B) for row in rows] == [
            (f"cuda {kernel}, stage {stage}", 4 * B)
            for B in (4, 2)
            for kernel in kernels
            for stage in (2, 4)
        ]
        assert rows[0].rate == pytest.approx(2 * 16 * 96 * 3 * 16**2 / 1e-3)
    assert set(cuda_backend.PRODUCTS.values()) == {"auto"}


def test_without_a_gpu_nothing_is_sanitized(capsys):
    if cuda_backend.unavailable(torch.device("cuda")) is None:
        pytest.skip("there is one")
    assert sanitizer.main() == 0
    assert "not checked: " in capsys.readouterr().out


def test_a_failing_case_of_ours_fails_its_part_at_the_end(on_the_cpu, capsys):
    def fail(problem: object) -> cases.Call:
        raise RuntimeError("no kernel")

    ours, peer = cases.yardstick(CPU), cases.Case("STF", "peer", fail)
    broken = cases.Case("STF", ours.removeprefix("STF "), fail)
    good = cases.cases(CPU)["DSM -"]
    rows: list[Row] = []
    gpu_parts.measure([(case, 2, 96, 16) for case in (peer, good)], CPU, rows.append)
    assert "not measured: STF peer at 2, 96, 16: RuntimeError" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=f"failed: {ours} at 2, 96, 16"):
        gpu_parts.measure([(case, 2, 96, 16) for case in (broken, good)], CPU, rows.append)
    assert [row.what for row in rows] == ["DSM", "DSM"]
