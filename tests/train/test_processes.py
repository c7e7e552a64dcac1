"""Training by two processes is that by one, up to the order of float sums."""

import os
import socket
from collections import namedtuple

import pytest
import torch
import torch.multiprocessing as mp

from stf_train import build, loop, run
from stf_train.compute import Compute, launched
from stf_train.config import Config

Seen = namedtuple("Seen", "losses weights orders sources targets masks")


def watched(values: dict, how: Compute) -> Seen:
    """What happens in three steps."""
    config = Config.from_dict(values)
    state, loss = run.initial_state(config), build.loss(config)
    orders, sources, targets, masks = [], [], [], []
    target = loss.target

    def spy(x_t, origin, order):
        orders.append(order)
        sources.append(origin.sources)
        targets.append(target(x_t, origin, order))
        return targets[-1]

    loss.target = spy
    for layer in state.network.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(lambda m, x, y: masks.append(y == 0))
            break
    steps = loop.train(
        state, loss, steps=3, batch=16, lr=1e-3, rampup=0, clip=config.clip, compute=how
    )
    losses = [step.loss for step in steps]
    weights = {k: v.clone() for k, v in state.network.state_dict().items()}
    return Seen(losses, weights, orders, sources, targets, masks)


# Name: preset, batch_gpu, other options. One half of a step of 16 is of 1, 2 or 4 parts.
CASES = {
    "whole": ("digits-edm", None, {"clip": 0.5}),
    "two parts": ("digits-edm-cond", 4, {"clip": 0.5}),
    "sequences in four parts": ("digits-seq", 2, {"clip": 0.5}),
    "dropout": ("digits-vp", None, {"dropout": 0.5}),
}
SIMILAR = [name for name in CASES if name != "dropout"]


def child(rank: int, port: int, cases: dict, path: str) -> None:
    os.environ |= {
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Of accelerate launch; the run says what holds.
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    }
    torch.set_num_threads(1)
    for name, (values, batch_gpu) in cases.items():
        accelerator = launched("cpu")
        assert accelerator.num_processes == 2
        assert accelerator.process_index == rank
        seen = watched(values, Compute(accelerator, batch_gpu))
        torch.save(seen._asdict(), f"{path}/{name} {rank}")
    accelerator.end_training()


@pytest.fixture(scope="module")
def values(tiny):
    """The config of each case."""
    return {
        name: tiny(preset=preset, references=200, **options).as_dict()
        for name, (preset, _, options) in CASES.items()
    }


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, processes, values):
    """What two processes saw, which go through all cases: to start them takes longer than that."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cases = {name: (values[name], CASES[name][1]) for name in CASES}
    method = processes.get_start_method()
    mp.start_processes(child, (port, cases, str(folder)), nprocs=2, start_method=method)
    return {
        name: [Seen(**torch.load(folder / f"{name} {rank}")) for rank in (0, 1)] for name in CASES
    }


@pytest.mark.parametrize("name", SIMILAR)
def test_two_processes_are_one(by_two, values, name):
    one = watched(values[name], Compute())
    first, second = by_two[name]

    # All draw the same order, whose first n entries are the references, in every part.
    parts = 16 // 2 // (CASES[name][1] or 8)
    assert len(first.orders) == len(second.orders) == 3 * parts
    for i, order in enumerate(one.orders):
        for other in (first, second):
            assert all(torch.equal(order, o) for o in other.orders[i * parts : (i + 1) * parts])

    # Each takes its share of the sources, and the targets are the same bits.
    def gathered(what, step):
        slots = slice(step * parts, (step + 1) * parts)
        kept = [getattr(seen, what)[slots] for seen in (first, second)]
        K = len(one.targets[0]) // 16
        # K points of each source, in K parts.
        split = [p.unflatten(0, (K, -1)) for share in kept for p in share]
        return torch.cat(split, dim=1).flatten(0, 1)

    for step in range(3):
        assert torch.equal(gathered("sources", step), one.sources[step])
    # x_t depends on no weights, so all targets are comparable to the bit.
    for step in range(3):
        assert torch.equal(gathered("targets", step), one.targets[step])

    assert first.losses == second.losses == pytest.approx(one.losses, rel=1e-5)
    for key, weight in one.weights.items():
        assert torch.equal(first.weights[key], second.weights[key]), key
        torch.testing.assert_close(first.weights[key], weight, rtol=0, atol=1e-4)  # of 3 x 1e-3


def test_each_process_drops_out_by_itself(by_two):
    first, second = by_two["dropout"]
    assert len(first.masks) == 3
    for a, b in zip(first.masks, second.masks, strict=True):
        assert 0.4 < (a != b).float().mean() < 0.6
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)


def test_another_number_of_processes_is_refused(tmp_path, tiny):
    run.create(tmp_path, tiny(processes=2))
    with pytest.raises(ValueError, match=r"processes must be 2 as when the run .*, got 1"):
        next(run.advance(tmp_path))


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """The environment of `accelerate launch --cpu --num_processes 2`, which starts one."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launched("cpu") is None  # one was asked for
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"accelerate launch must start .* torchrun"):
        launched("cpu")
