"""stf-sample: where its results go, what guidance costs, and classifiers from the outside."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from stf_train import run
from stf_train.cli import evaluate, sample, train

TINY = "--batch 16 --duration 0.000064 --tick 0.064 --threads 1 --device cpu"


def invoke(command, line):
    return CliRunner().invoke(command, line.split(), catch_exceptions=False)


def said(result):
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name, without pictures."""
    lines = {
        "edm": "--cbase 16",
        "cond": "--preset digits-edm-cond --cbase 16",
        "flow": "--preset digits-flow --cbase 16",
        "pfgmpp": "--preset digits-pfgmpp --cbase 16",
        "classes": "--target class --preset digits-vp --cbase 16 --lr 0.01",
        "patches": "--data patches --size 8 --target class --cbase 8",
    }
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_pictures", lambda folder: None)
        torch.set_num_threads(1)
        for name, line in lines.items():
            result = invoke(train, f"{TINY} {line} --outdir {folder / name}")
            assert result.exit_code == 0, result.output
    return {name: folder / name for name in lines}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_samples_go_beside_the_run_and_replace_nothing(runs, in_tmp):
    folder, line = runs["edm"], f"{runs['edm']} --seeds 3-4 --steps 2"
    for name in ("samples-heun-3-4.png", "samples-heun-3-4-1.png"):
        result = invoke(sample, line)
        assert result.exit_code == 0, result.output
        assert f"{folder / name}: 2 samples" in result.stdout
        assert (folder / name).exists()
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (sample, "--seeds 0 --steps 2 --output s"),
        (evaluate, "--extractor pixels --n 10 --sets 1 --steps 2 --output s"),
    ],
)
def test_a_file_is_replaced_only_where_that_is_asked_for(runs, in_tmp, command, line):
    name = "s.npy" if command is sample else "s.json"
    line = f"{runs['edm']} {line.removesuffix(' s')} {name}"
    Path(name).write_text("kept")
    result = invoke(command, line)
    assert result.exit_code == 2
    assert f"--output: {name} is there; --overwrite replaces it" in said(result)
    assert Path(name).read_text() == "kept"
    assert invoke(command, f"{line} --overwrite").exit_code == 0
    assert Path(name).read_bytes() != b"kept"
    result = invoke(command, f"{line.removesuffix(name)} nowhere/{name}")
    assert result.exit_code == 2
    assert "--output: there is no folder nowhere" in said(result)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("{edm}", 7),  # 4 steps of Heun
        ("{cond} --class 3", 7),
        ("{cond} --class 3 --guidance 1", 14),
        ("{edm} --guide {edm} --guidance 1", 14),
        ("{edm} --classifier {classes} --guidance 1", 14),
        ("{edm} --sampler em --guide {edm} --guidance 1", 8),
    ],
)
def test_every_network_counts(runs, line, count):
    result = invoke(sample, line.format(**runs) + " --steps 4 --seeds 0-2 --output s.npy")
    assert result.exit_code == 0, result.output
    assert f"{count} network evaluations each" in result.stdout


def test_evaluation_counts_every_network(runs):
    line = "{edm} --n 10 --sets 1 --steps 2 --guide {edm} --guidance 1 --extractor pixels"
    assert "NFE 6" in said(invoke(evaluate, line.format(**runs)))


def values(line):
    result = invoke(sample, f"{line} --output s.npy --overwrite --steps 4")
    assert result.exit_code == 0, result.output
    return np.load("s.npy")


@pytest.mark.parametrize("kind", ["edm", "cond", "flow"])
def test_a_classifier_guides_any_run(runs, kind):
    """Scale 0 is none; the class is that of --class, or of the seed."""
    base = f"{runs[kind]} --seeds 12-14"
    guided = f"{base} --classifier {runs['classes']}"
    plain = values(base)
    np.testing.assert_allclose(values(f"{guided} --guidance 0"), plain, atol=1e-6)
    led = values(f"{guided} --guidance 30")
    assert not np.allclose(led, plain, atol=1e-3)
    if kind != "cond":
        one = values(f"{guided} --guidance 30 --class 3")
        np.testing.assert_allclose(one[1], led[1], atol=1e-4)  # seed 13
        assert not np.allclose(one[0], led[0], atol=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{classes}", "RUN: {classes} has learnt classes, which is for --classifier"),
        ("{edm} --classifier {classes}", "--classifier: needs --guidance W"),
        ("{edm} --classifier {edm} --guidance 1", "was not trained with --target class"),
        ("{edm} --guide {classes} --guidance 1", "--guide: {classes} has learnt classes"),
        (
            "{edm} --guide {edm} --classifier {classes} --guidance 1",
            "--classifier: is another guidance than --guide",
        ),
        ("{edm} --classifier {patches} --guidance 1", "--classifier: {patches} knows other data"),
        ("{edm} --classifier {classes} --guidance 1 --class 10", "--class: there are 10 classes"),
        ("{pfgmpp} --classifier {classes} --guidance 1", "--classifier: needs Gaussian noise"),
        (
            "{flow} --classifier {classes} --guidance 1 --sampler ddim",
            "--classifier: ddim starts from noise without any signal",
        ),
        ("{pfgmpp} --sampler pc", "--sampler: a sampler of the SDE needs Gaussian noise"),
        ("{pfgmpp} --S_churn 1", "--S_churn: churn needs Gaussian noise"),
        ("{pfgmpp} --sampler ddim --eta 1", "--eta: eta above 0 needs Gaussian noise"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_drawn(runs, in_tmp, line, message):
    for command in (sample, evaluate):
        result = invoke(command, line.format(**runs))
        assert result.exit_code == 2, result.output
        assert message.format(**runs) in said(result)
    assert list(in_tmp.iterdir()) == []


def test_flows_are_drawn_by_euler_maruyama(runs):
    assert np.isfinite(values(f"{runs['flow']} --sampler em --seeds 0-2")).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n 1", "'--n': 1 is not in the range x>=10"),
        ("--extractor inception --weights nowhere.pth", "--weights: weights must be torch-fidel"),
    ],
)
def test_evaluation_names_the_option(runs, line, message):
    result = invoke(evaluate, f"{runs['edm']} {line}")
    assert result.exit_code == 2
    assert message in said(result)


def test_inception_without_torch_fidelity_is_named(runs, monkeypatch):
    Path("w.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    result = invoke(evaluate, f"{runs['edm']} --extractor inception --weights w.pth")
    assert result.exit_code == 2
    assert "--extractor: Inception features need torch-fidelity" in said(result)
