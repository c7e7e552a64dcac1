"""What stf-train does before it writes, and how runs find their data again."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from stf_kernels import References, storage
from stf_train import build, checkpoint, data, prepare, presets, run
from stf_train.cli import evaluate, sample, train

TINY = "--batch 8 --duration 0.000032 --tick 0.016 --cbase 16 --threads 1 --device cpu"


def invoke(command, line):
    return CliRunner().invoke(command, line.split(), catch_exceptions=False)


def said(result):
    return " ".join(result.output.split())


def images(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    build._load.cache_clear()  # by path: other files may have had it
    monkeypatch.setattr(run, "draw_pictures", lambda folder: None)  # which take longest
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def moved(in_tmp):
    """A run whose data were given by a relative path, and the folder they lie in."""
    Path("there").mkdir()
    np.save("there/own.npy", images(40, 8))
    result = invoke(train, f"{TINY} --data there/own.npy --arch unet --outdir run")
    assert result.exit_code == 0, result.output
    return result


def test_a_run_finds_its_data_from_anywhere(moved, in_tmp, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    build._load.cache_clear()
    longer = invoke(train, "--resume ../run --duration 0.000048")
    assert longer.exit_code == 0, longer.output
    assert checkpoint.read(in_tmp / "run" / run.CHECKPOINT).step == 6
    result = invoke(evaluate, "../run --n 10 --sets 1 --steps 2 --extractor pixels")
    assert result.exit_code == 0, result.output


def test_samples_need_no_data(moved):
    Path("there/own.npy").unlink()
    build._load.cache_clear()
    result = invoke(sample, "run --steps 2 --seeds 0-3 --output s.npy")
    assert result.exit_code == 0, result.output
    assert np.load("s.npy").shape == (4, 3, 8, 8)


RESUME, EVAL = "--resume run --duration 0.000048", "run --n 10 --sets 1 --steps 2"


@pytest.mark.parametrize(("command", "line"), [(train, RESUME), (evaluate, EVAL)])
def test_data_that_have_moved(moved, in_tmp, command, line):
    """Gone, then other ones, then the same elsewhere under another name."""
    Path("there/own.npy").rename("new.npy")
    np.save("other.npy", images(40, 8, seed=1))
    build._load.cache_clear()
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    gone = invoke(command, line)
    assert gone.exit_code == 2
    assert f"--data: there is no {in_tmp / 'there' / 'own.npy'} any more" in said(gone)
    other = invoke(command, f"{line} --data other.npy")
    assert other.exit_code == 2
    assert "must be the data that the run was started with, own, 40 samples" in said(other)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    same = invoke(command, f"{line} --data new.npy")
    assert same.exit_code == 0, same.output
    if command is train:
        kept = checkpoint.read(Path("run", run.CHECKPOINT))
        assert (kept.step, kept.config.data) == (6, str(in_tmp / "new.npy"))


def test_data_that_were_changed_in_place_are_refused(moved):
    changed = images(40, 8)
    changed[17, 2, 7, 7] ^= 1
    np.save("there/own.npy", changed)
    build._load.cache_clear()
    result = invoke(train, RESUME)
    assert result.exit_code == 2
    assert "--data:" in said(result)
    assert "checksum" in said(result)


def test_facts_tell_data_apart():
    def facts(pixels, labels=None):
        references = References(pixels, value_range=(-1, 1), labels=labels)
        return data.Facts.of(data.DataSet("x", "all", references, (-1, 1), 256))

    pixels, labels = torch.from_numpy(images(20, 4)), torch.arange(20) % 3
    one = facts(pixels, labels)
    assert (one.count, one.shape, one.classes) == (20, (3, 4, 4), 3)
    assert one.same(facts(pixels.clone(), labels.clone()))
    assert not one.same(facts(pixels, labels.flip(0)))
    assert not one.same(facts(pixels.flip(0), labels))
    assert not one.same(facts(pixels))


@pytest.mark.parametrize("kind", ["unet", "ddpmpp-edm"])
def test_images_that_cannot_be_halved_leave_no_folder(in_tmp, kind):
    np.save("odd.npy", images(20, 15))
    result = invoke(train, f"{TINY} --data odd.npy --arch {kind} --outdir run")
    assert result.exit_code == 2
    assert (
        f"--data: images must have sides that are multiples of 2 for {kind}, which halves them "
        "1 time, got 15x15 pixels"
    ) in said(result)
    assert not Path("run").exists()


def pictures(folder, count, size):
    Path(folder).mkdir()
    for i, pixels in enumerate(images(count, 16)):
        picture = PIL.Image.fromarray(pixels.transpose(1, 2, 0)).resize(size)
        picture.save(f"{folder}/{i:03d}.png")


def test_both_sides_are_looked_at(in_tmp):
    pictures("wide", 12, (15, 16))
    result = invoke(train, f"{TINY} --data wide --arch unet --outdir run")
    assert result.exit_code == 2
    assert "got 15x16 pixels" in said(result)
    assert invoke(train, f"{TINY} --data wide --arch unet --size 8 --outdir run").exit_code == 0


def test_own_data_have_settings_and_a_folder_of_their_own(in_tmp):
    pictures("My Photos", 20, (16, 16))
    result = CliRunner().invoke(train, [*TINY.split(), "--data", "My Photos"])
    assert result.exit_code == 0, result.output
    config = json.loads(Path("runs/00000-my-photos-edm-stf/config.json").read_text())
    assert (config["preset"], config["arch"]) == ("images-edm", "ddpmpp-edm")
    assert config["data"] == str(in_tmp / "My Photos")
    assert config["references"] == "all"  # there are 20
    for text in (
        "data My Photos, 20 samples of 3x16x16, no classes",
        "preset images-edm",
        "network ddpmpp-edm, 0.1",
        "edm, target stf with all references, 4 steps of 8",
    ):
        assert text in said(result)


def test_the_preset_follows_the_data():
    assert presets.of_data(None) == presets.of_data("Digits") == presets.DEFAULT
    assert presets.of_data("patches") == "patches-edm"
    assert presets.of_data("digits.zip") == "images-edm"
    for line in ("--preset digits-ve --data x.npy", "--data x.npy --preset digits-ve"):
        context = train.make_context("stf-train", line.split())
        assert context.params["preset"] == "digits-ve"
        assert context.params["process"] == "ve"
        assert context.params["data"] == "x.npy"
    context = train.make_context("stf-train", ["--data", "x.npy"])
    assert (context.params["preset"], context.params["arch"]) == ("images-edm", "ddpmpp-edm")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "digits-edm-stf"),
        ({"preset": "digits-edm-cond", "target": "dsm"}, "digits-edm-cond-dsm"),
        ({"preset": "digits-flow"}, "digits-flow-to-noise-stf"),
        ({"facts": data.Facts("CIFAR-10 (1)", 9, (3, 2, 2), 0, "")}, "cifar-10-1-edm-stf"),
    ],
)
def test_a_run_is_named_after_data_and_settings(tiny, options, expected):
    assert prepare.name(tiny(**options)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size 9 --data own.npy", "--size: own.npy has the size it has, got 9"),
        ("--data patches --size 7", "--size: size of a patch must be even"),
        ("--range 1 -1", "--range: LOW must be below HIGH, got 1 -1"),
        ("--data floats.npy --range 0 1", "--range: is for bytes"),
        ("--cond 1 --data own.npy", "--cond:"),
        ("--target class --data own.npy", "--target:"),
        ("--target class --cbase 12", "--cbase: channels must be a multiple of 8, got 12"),
        ("--target class --arch unet", "--arch: --target class has a network"),
        ("--target class --references 50", "--references: --target class has no references"),
        ("--duration 1e-7", "--duration: there is less than one image in it"),
        ("--cbase 8", "--cbase: channels must be a multiple of 16, got 8"),
        ("--cbase 1000000", "--cbase: the network would not fit the memory"),
        ("--cache 0", "--cache: digits cannot stay on the disk"),
        ("--cache 0 --data floats.npy", "floats.npy cannot stay on the disk"),
        ("--preset digits-vp --attention 3", "--attention: attention must be among [8, 4]"),
        ("--preset digits-vp --beta_min 30", "--beta_min: beta_min must lie in (0, beta_max"),
        ("--data damaged.npy", "--data:"),
        ("--data flat.npy", "--data: data must be images [C, H, W], got [12]"),
        ("--data text.txt", "text.txt must be a folder or end in"),
        ("--outdir text.txt/run", "--outdir:"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(in_tmp, line, message):
    np.save("own.npy", images(40, 8))
    np.save("floats.npy", np.zeros((40, 3, 8, 8), np.float32))
    np.save("flat.npy", np.zeros((40, 12), np.uint8))
    Path("damaged.npy").write_bytes(Path("own.npy").read_bytes()[:100])
    Path("text.txt").touch()
    before = set(in_tmp.rglob("*"))
    result = invoke(train, f"--batch 8 --device cpu --threads 1 {line}")
    assert result.exit_code == 2, result.output
    assert message.replace("own.npy", str(in_tmp / "own.npy")) in said(result) or message in said(
        result
    )
    assert set(in_tmp.rglob("*")) == before


def test_a_finished_run_says_so_and_how_to_go_on(moved):
    result = invoke(train, "--resume run")
    assert result.exit_code == 0, result.output
    assert "run is finished, with 4 steps or 3.2e-05 million images. To go on:" in said(result)
    assert "stf-train --resume run --duration MIMG" in said(result)
    assert "finished" not in said(invoke(train, "--resume run --duration 0.000048"))


@pytest.mark.parametrize("kind", ["own.npy", "own.stf"])
@pytest.mark.parametrize("flips", [0, 1])
def test_data_stay_in_their_file(in_tmp, monkeypatch, kind, flips):
    """The bits of a run with them in memory, and never more than a step's references are read."""
    pixels = images(400, 8)
    np.save("own.npy", pixels)
    References(torch.from_numpy(pixels), value_range=(-1, 1)).save("own.stf")
    line = f"{TINY} --data {kind} --arch unet --references 32 --xflip {flips}"
    assert invoke(train, f"{line} --outdir memory").exit_code == 0
    build._load.cache_clear()

    gathered = []
    gather = storage.OnFile.gather

    def watched(self, index):
        gathered.append(len(index))
        return gather(self, index)

    monkeypatch.setattr(storage.OnFile, "gather", watched)
    for whole in (storage.OnFile, storage.Flipped):
        monkeypatch.setattr(whole, "load", lambda self: pytest.fail("loaded whole"))
    result = invoke(train, f"{line} --cache 0 --outdir file")
    assert result.exit_code == 0, result.output
    kept = checkpoint.read(Path("file", run.CHECKPOINT))
    assert build.loss(kept.config).data.placement == "file"
    training = [count for count in gathered if count < 400]
    assert 32 in training  # the references of a step
    assert max(training) == 32
    # Only the checksum and sigma_data look at all of them.
    assert sum(count == 400 for count in gathered) <= 4
    other = checkpoint.read(Path("memory", run.CHECKPOINT))
    for name, tensor in other.tensors.items():
        assert torch.equal(tensor, kept.tensors[name]), name
    assert Path("file", run.METRICS).read_bytes() == Path("memory", run.METRICS).read_bytes()
