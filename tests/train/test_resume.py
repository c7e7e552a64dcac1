"""A stopped and resumed run equals one that never stopped, to the last bit of every file."""

import itertools
import os
import random
import signal
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from stf_train import build, checkpoint, loop, run
from stf_train.presets import PRESETS

FILES = (run.CHECKPOINT, run.METRICS, run.CONFIG)


def whole(folder, config):
    run.create(folder, config)
    steps = list(run.advance(folder))
    assert [step.step for step in steps] == list(range(1, config.steps + 1))
    return contents(folder)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def stop_after(folder, steps):
    """Walks away from the loop, which leaves the folder as a kill between two steps does."""
    iterator = run.advance(folder)
    list(islice(iterator, steps))
    iterator.close()


@pytest.mark.parametrize("target", ["dsm", "stf"])
@pytest.mark.parametrize("stops", [[0], [4], [6], [11], [3, 5, 7]])
def test_bit_for_bit(tmp_path, tiny, target, stops):
    config = tiny(target=target, references=200)
    for stop in stops:
        if not (tmp_path / "b").exists():
            run.create(tmp_path / "b", config)
        stop_after(tmp_path / "b", stop)
    list(run.advance(tmp_path / "b"))
    assert contents(tmp_path / "b") == whole(tmp_path / "a", config)


RUNS = {
    **{name: {"preset": name} for name in PRESETS if name.startswith("digits-")},
    "dropout": {"preset": "digits-vp", "dropout": 0.3},
    "fourier": {"preset": "digits-ve", "arch": "ncsnpp-ve", "cres": (1,), "blocks": 1}
    | {"attention": (), "dropout": 0.1},
    "flow to data": {"preset": "digits-flow", "process": "flow-to-data"},
    "parts": {"preset": "digits-edm-cond", "batch_gpu": 4, "bf16": True, "ls": 8.0, "clip": 0.1},
    "mirrored": {"xflip": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run(tmp_path, tiny, name):
    config = tiny(references=200, **RUNS[name])
    run.create(tmp_path / "b", config)
    stop_after(tmp_path / "b", 6)
    torch.manual_seed(123)  # must not matter
    list(run.advance(tmp_path / "b"))
    assert contents(tmp_path / "b") == whole(tmp_path / "a", config)


def test_compiled(tmp_path, tiny, monkeypatch):
    """What torch.compile makes of the network, but for the C++, whose making takes a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile(network, backend="aot_eager"))
    options = {"cres": (1,), "blocks": 1, "attention": (), "dropout": 0.3, "references": 200}
    plain = tiny("digits-vp", **options)
    config = replace(plain, compile=True)
    run.create(tmp_path / "b", config)
    stop_after(tmp_path / "b", 6)
    list(run.advance(tmp_path / "b"))
    assert contents(tmp_path / "b") == whole(tmp_path / "a", config)
    whole(tmp_path / "eager", plain)
    compiled, eager = (
        checkpoint.read(tmp_path / f / run.CHECKPOINT).tensors for f in ("a", "eager")
    )
    assert compiled.keys() == eager.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)


def test_dropout_is_drawn_anew_at_every_step(tmp_path, tiny):
    """With one seed for all steps, or none at all, the test above could not see what it should."""
    masks = []
    config = tiny(preset="digits-vp", dropout=0.5, references=200)
    state = run.initial_state(config)
    layer = next(m for m in state.network.modules() if isinstance(m, torch.nn.Dropout))
    layer.register_forward_hook(lambda m, x, y: masks.append(y == 0))
    list(loop.train(state, build.loss(config), steps=3, batch=16, lr=0.0, rampup=0))
    shares = [mask.float().mean().item() for mask in masks]
    assert all(0.45 < share < 0.55 for share in shares)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("change", [{"seed": 2}, {"target": "dsm"}, {"references": 1000}])
def test_other_options_give_other_bits(tmp_path, tiny, change):
    """Without this the tests above might compare what nothing can change."""
    ours = whole(tmp_path / "a", tiny())
    theirs = whole(tmp_path / "b", tiny(**change))
    assert ours[run.METRICS] != theirs[run.METRICS]
    a, b = (checkpoint.read(tmp_path / name / run.CHECKPOINT) for name in "ab")
    assert (a.tensors["ema.leave.weight"] != b.tensors["ema.leave.weight"]).any()


@pytest.mark.parametrize(
    "rest", [b'{"step": 5, "ima', b'{"step": 99}\n{"step": 100}\n', b"\0" * 64]
)
def test_what_follows_the_checkpoint_in_the_metrics_is_cut_off(tmp_path, tiny, rest):
    run.create(tmp_path / "b", tiny())
    stop_after(tmp_path / "b", 4)
    with open(tmp_path / "b" / run.METRICS, "ab") as file:
        file.write(rest)
    list(run.advance(tmp_path / "b"))
    assert contents(tmp_path / "b") == whole(tmp_path / "a", tiny())


def test_metrics_shorter_than_the_checkpoint_knows_are_refused(tmp_path, tiny):
    run.create(tmp_path, tiny())
    stop_after(tmp_path, 4)
    path = tmp_path / run.METRICS
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"must hold the \d+ bytes .* got 50"):
        next(run.advance(tmp_path))
    assert len(path.read_bytes()) == 50


def test_a_longer_run_is_one_that_was_planned_so(tmp_path, tiny):
    short, long = tiny(), tiny(duration=16 * 20 / 1e6)
    run.create(tmp_path / "b", short)
    list(run.advance(tmp_path / "b"))
    run.change(tmp_path / "b", duration=long.duration)
    list(run.advance(tmp_path / "b"))
    assert contents(tmp_path / "b") == whole(tmp_path / "a", long)


def test_nothing_outside_the_run_is_random(tmp_path, tiny):
    """The global generator neither decides nor notices anything."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = whole(tmp_path / "a", tiny())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert whole(tmp_path / "b", tiny()) == first


def train(folder, fatal_fsync=0):
    """Trains to the end, or to the SIGKILL in place of one of its calls of fsync."""
    fsync, calls = os.fsync, itertools.count(1)

    def counting(file):
        if next(calls) == fatal_fsync:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(os, "fsync", counting)
    for _ in run.advance(folder):
        pass
    monkey.undo()


@pytest.fixture
def every_step(tiny):
    """Runs of so many steps that write a checkpoint after each."""
    return lambda steps: tiny(target="dsm", duration=16 * steps / 1e6, tick=16 / 1e3)


def test_killed_around_a_checkpoint(tmp_path, processes, every_step):
    """At the fsync of config.json and its folder, metrics, new checkpoint, its folder, metrics."""
    config = every_step(6)
    run.create(tmp_path / "b", config)
    reached = []
    for fatal_fsync in range(1, 7):
        child = processes.Process(target=train, args=(tmp_path / "b", fatal_fsync))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        reached.append(checkpoint.read(tmp_path / "b" / run.CHECKPOINT).step)
    assert reached == [0, 0, 0, 0, 1, 2]
    train(tmp_path / "b")
    assert contents(tmp_path / "b") == whole(tmp_path / "a", config)


def train_on_a_fuse(folder, steps, fuse):
    """Trains a few steps, then lights a fuse at whose end the kernel ends this process.

    Its length is a multiple of the shortest step seen: however slow the machine is, it burns for
    about as many steps. Nobody has to look on in time, as one would who kills from outside.
    """
    begun, shortest = time.monotonic(), float("inf")
    for done, _ in enumerate(run.advance(folder), start=1):
        now = time.monotonic()
        begun, shortest = now, min(shortest, now - begun)
        if done == steps:
            # SIGALRM without a handler: no more code of this process runs, as with SIGKILL.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, fuse * shortest)


def test_killed_at_any_moment(tmp_path, processes, every_step):
    """In the middle of whatever a step does: the sweep, the update, a file half written."""
    # Longer than four sessions of at most five steps and what a fuse lasts for.
    config = every_step(40)
    run.create(tmp_path / "b", config)
    chance = random.Random(0)
    reached = [0]
    for _ in range(4):
        steps = chance.randint(2, 5)
        folder, fuse = tmp_path / "b", chance.uniform(0.01, 2)
        child = processes.Process(target=train_on_a_fuse, args=(folder, steps, fuse))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGALRM  # it had not come to its end
        reached.append(checkpoint.read(tmp_path / "b" / run.CHECKPOINT).step)
        # The checkpoint of every step that was reported is there.
        assert reached[-1] >= reached[-2] + steps
    train(tmp_path / "b")
    assert contents(tmp_path / "b") == whole(tmp_path / "a", config)
