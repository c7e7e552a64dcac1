"""The checkpoint file: whole or not there."""

import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from stf_train import build, checkpoint, loop, run


@pytest.fixture
def trained(tiny):
    """A state after two steps, and its config."""
    config = tiny()
    state = run.initial_state(config)
    steps = loop.train(state, build.loss(config), steps=2, batch=16, lr=1e-3, rampup=10)
    assert len(list(steps)) == 2
    return state, config


def tensors_of(state):
    adam = state.optimizer.state
    return (
        list(state.network.state_dict().values())
        + list(state.ema.network.state_dict().values())
        + [adam[p][k] for p in state.network.parameters() for k in sorted(adam[p])]
        + [state.generator.get_state()]
    )


def test_holds_the_whole_state(trained, tiny, tmp_path):
    state, config = trained
    checkpoint.write(tmp_path / "c", checkpoint.pack(state, config, 123))
    kept = checkpoint.read(tmp_path / "c")
    other = run.initial_state(tiny(seed=2))
    kept.restore(other)
    assert (kept.config, kept.step, kept.metrics_bytes) == (config, 2, 123)
    assert other.step == 2
    ours, theirs = tensors_of(state), tensors_of(other)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    moments = [state.optimizer.state[p]["exp_avg_sq"] for p in state.network.parameters()]
    assert any(m.abs().sum() > 0 for m in moments)


def test_equal_states_give_equal_bytes(trained, tmp_path):
    for name in "ab":
        checkpoint.write(tmp_path / name, checkpoint.pack(*trained, 0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch, call):
    path = tmp_path / "c"
    checkpoint.write(path, checkpoint.pack(*trained, 0))
    before = path.read_bytes()

    def crash(*args):
        raise OSError("no more")

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(OSError, match="no more"):
        checkpoint.write(path, checkpoint.pack(*trained, 1))
    assert path.read_bytes() == before


def test_a_write_cut_short_leaves_the_old_file(trained, tmp_path):
    """The system refuses to write more than a limit, in the middle of the file."""
    path = tmp_path / "c"
    checkpoint.write(path, checkpoint.pack(*trained, 0))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write(path, checkpoint.pack(*trained, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_is_on_the_disk_before_it_takes_the_name(trained, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    checkpoint.write(tmp_path / "c", checkpoint.pack(*trained, 0))
    assert calls[:2] == ["fsync", "replace"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        checkpoint.read(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_cut_short(trained, tmp_path, length):
    path = tmp_path / "c"
    checkpoint.write(path, checkpoint.pack(*trained, 0))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="is not a checkpoint of stf-train"):
        checkpoint.read(path)


def test_a_foreign_safetensors_file(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(ValueError, match="is not a checkpoint of stf-train"):
        checkpoint.read(tmp_path / "c")


def test_another_version(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", "stf_train 0")
    checkpoint.write(tmp_path / "c", checkpoint.pack(*trained, 0))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must have format 'stf_train 3', got 'stf_train 0'"):
        checkpoint.read(tmp_path / "c")


def test_an_unknown_option(trained, tmp_path, monkeypatch):
    state, config = trained
    values = config.as_dict() | {"flavour": 1}
    monkeypatch.setattr(type(config), "as_dict", lambda self: values)
    checkpoint.write(tmp_path / "c", checkpoint.pack(state, config, 0))
    with pytest.raises(ValueError, match="differs in flavour"):
        checkpoint.read(tmp_path / "c")
