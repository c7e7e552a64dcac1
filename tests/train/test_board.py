"""Writing for TensorBoard, with a writer in its place that remembers."""

import sys
from types import ModuleType

import pytest

from stf_train import board, run


@pytest.fixture
def written(monkeypatch):
    """What was written: (folder, purge_step) of each writer, and the scalars."""
    writers, scalars = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            writers.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def close(self):
            writers.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return writers, scalars


def test_holds_what_the_metrics_hold(written, tiny, tmp_path):
    writers, scalars = written
    run.create(tmp_path, tiny(tensorboard=True, references=200))
    iterator = run.advance(tmp_path)
    steps = [next(iterator) for _ in range(5)]
    iterator.close()
    steps += list(run.advance(tmp_path))
    folder = str(tmp_path / run.BOARD)
    # The second session begins after the checkpoint of step 4.
    assert writers == [(folder, 1), "closed", (folder, 5), "closed"]
    losses = [(value, step) for name, value, step in scalars if name == "loss"]
    assert losses == [(step.loss, step.step) for step in steps]
    names = {name.split("/")[0] for name, _, step in scalars if step == 9}
    assert names == {"loss", "grad_norm", "lr", "skipped", "V_DSM", "V_STF", "removed"} | {
        "ess",
        "entropy",
    }


def test_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="--tensorboard needs tensorboard: pip install"):
        board.check()
