"""Writing for TensorBoard: with a writer in its place that remembers, and with its own."""

import io
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from matplotlib.image import imread

from stf_train import board, metrics, run


@pytest.fixture
def written(monkeypatch):
    """What was written: (folder, purge_step) of each writer, the scalars and the pictures."""
    writers, scalars, pictures = [], [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            writers.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def add_image(self, name, page, step, dataformats):
            pictures.append((name, page, step, dataformats))

        def close(self):
            writers.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return writers, scalars, pictures


def test_holds_what_the_metrics_hold(written, tiny, tmp_path):
    writers, scalars, pictures = written
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
    assert pictures == []  # they come every 50 ticks


def test_holds_the_pictures_of_the_folder(written, tiny, tmp_path):
    config = tiny(tensorboard=True, references=200, snap=2)  # ticks of 4 steps
    config = replace(config, sampling=replace(config.sampling, steps=2))
    run.create(tmp_path, config)
    list(run.advance(tmp_path))
    ((name, page, step, dataformats),) = written[2]
    assert (name, step, dataformats) == ("samples", 8, "HWC")
    image = imread(tmp_path / f"samples-{8 * 16:09d}.png")
    np.testing.assert_array_equal(page, (image[..., :3] * 255).round())


def test_tensorboard_reads_back_what_was_written(tiny, tmp_path):
    """Of a run that was stopped after step 5 and went on from the checkpoint of step 4."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(tensorboard=True, references=200, snap=2)
    config = replace(config, sampling=replace(config.sampling, steps=2))
    run.create(tmp_path, config)
    iterator = run.advance(tmp_path)
    for _ in range(5):
        next(iterator)
    iterator.close()
    list(run.advance(tmp_path))

    found = reader.EventAccumulator(str(tmp_path / run.BOARD), size_guidance={"scalars": 0})
    found.Reload()
    steps = metrics.read(tmp_path / run.METRICS)
    for name in ("loss", "grad_norm", "lr", "skipped"):
        expected = [(step.step, np.float32(getattr(step, name))) for step in steps]
        assert [(event.step, event.value) for event in found.Scalars(name)] == expected
    panel = {f"ess/sigma 2^{one.octave}" for one in metrics.read_panel(tmp_path / run.METRICS)}
    assert {tag for tag in found.Tags()["scalars"] if tag.startswith("ess/")} == panel
    (picture,) = found.Images("samples")
    assert picture.step == 8
    shown = imread(io.BytesIO(picture.encoded_image_string), format="png")
    np.testing.assert_array_equal(shown, imread(tmp_path / f"samples-{8 * 16:09d}.png")[..., :3])


def test_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="--tensorboard needs tensorboard: pip install"):
        board.check()
