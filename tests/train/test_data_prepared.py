"""Files that `References.save` wrote."""

import numpy as np
import pytest
import torch

from stf_train import data


def same(found, whole):
    assert torch.equal(found.references.decode(), whole.references.decode())
    assert torch.equal(found.references.labels, whole.references.labels)
    assert (found.levels, found.value_range) == (whole.levels, whole.value_range)
    assert (found.name, found.split, found.shape) == ("saved", "all", whole.shape)


@pytest.mark.parametrize(
    ("spec", "value_range"),
    [("digits", (-1, 1)), ("patches", (-1, 1)), ("patches", (0, 1)), ("patches", (0, 255))],
)
def test_bytes(tmp_path, spec, value_range):
    whole = data.load(spec, value_range=value_range)
    path = tmp_path / "saved.stf"
    whole.references.save(path)
    for resident, placement in ((True, "resident"), (False, "file")):
        found = data.load(path, value_range=value_range, resident=resident)
        assert found.references.placement == placement
        same(found, whole)
        assert found.sigma_data == whole.sigma_data
    assert data.load(path, value_range=value_range, labels="none").references.labels is None


@pytest.mark.parametrize("limbs", [1, 4])
def test_floats(tmp_path, limbs):
    values = np.random.default_rng(0).normal(size=(5, 4, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=values, y=np.arange(5))
    whole = data.load(tmp_path / "x.npz", limbs=limbs)
    whole.references.save(tmp_path / "saved.stf")
    found = data.load(tmp_path / "saved.stf", resident=False)
    same(found, whole)
    assert found.levels is None


@pytest.mark.parametrize("value_range", [(0, 1), (-1, 2), (-1, 1.001), (-2, 1)])
def test_another_range_than_that_of_the_file(tmp_path, value_range):
    path = tmp_path / "saved.stf"
    data.load("patches").references.save(path)
    with pytest.raises(ValueError, match=r"value_range must be .*saved\.stf, which begin at -1 "):
        data.load(path, value_range=value_range)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.stf"):
        data.load(tmp_path / "none.stf")
    path = tmp_path / "saved.stf"
    path.write_bytes(b"not references")
    with pytest.raises(ValueError, match=r"saved\.stf"):
        data.load(path)
    with pytest.raises(ValueError, match=r"split: .* is one set"):
        data.load(path, split="train")
