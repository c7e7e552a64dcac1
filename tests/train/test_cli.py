"""The commands, from the outside."""

import json
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imread
from sklearn.datasets import load_digits

from stf_train import checkpoint, metrics, run
from stf_train.cli import evaluate, sample, train

# 16 steps of 16 images, 4 checkpoints, on one thread.
TINY = "--batch 16 --duration 0.000256 --tick 0.064 --cbase 16 --threads 1 --device cpu"


def invoke(command, line):
    return CliRunner().invoke(command, line.split(), catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and what the command said."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(train, f"{TINY} --outdir {folder} --references 100")
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_leaves_a_run_folder(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == set(run.CONTENTS)
    for name in (str(folder), *run.CONTENTS):
        assert name in result.stdout


def test_config_is_what_was_asked_for(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    asked = {"target": "stf", "references": 100, "batch": 16, "cbase": 16, "threads": 1}
    assert {name: config[name] for name in asked} == asked
    values = load_digits().data / 8 - 1
    assert config["sigma_data"] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-12)


def test_metrics_have_a_line_for_every_step(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").open()]
    steps = [line for line in lines if "variance_at" not in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert [line["variance_at"] for line in lines if "bins" in line] == [1, 5, 9, 13]


def test_pictures_show_something(finished):
    for name in ("samples.png", "loss.png"):
        assert imread(finished[0] / name)[:, :, :3].std() > 0.05


def test_progress_goes_to_stderr(finished):
    result = finished[1]
    assert "16/16" in result.stderr
    assert "16/16" not in result.stdout


def test_runs_are_numbered(in_tmp):
    for number, target in enumerate(["stf", "dsm", "stf"]):
        result = invoke(train, f"{TINY} --duration 0.000016 --target {target}")
        assert result.exit_code == 0, result.output
        assert (in_tmp / f"runs/{number:05d}-digits-edm-{target}/samples.png").exists()


def test_resuming_a_finished_run_only_draws_its_pictures_anew(finished):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "samples.png").unlink()
    result = invoke(train, f"--resume {folder}")
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_stopping_and_resuming(in_tmp):
    assert invoke(train, f"{TINY} --outdir a").exit_code == 0
    assert invoke(train, f"{TINY} --outdir b --duration 0.0001").exit_code == 0
    result = invoke(train, f"{TINY} --resume b")
    assert result.exit_code == 0, result.output
    for name in run.CONTENTS:
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_interrupt_says_how_to_continue(in_tmp, monkeypatch):
    def interrupted(folder):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "advance", interrupted)
    result = invoke(train, f"{TINY} --outdir a")
    assert result.exit_code == 1
    assert "stf-train --resume a continues from step 0 of 16" in result.stderr


def test_divergence_keeps_the_last_checkpoint(in_tmp):
    result = invoke(train, f"{TINY} --outdir a --lr 1e30 --tick 0.016")
    assert result.exit_code == 1
    assert "10 steps in a row had no finite gradient" in result.stderr
    assert "a lower --lr may help" in result.stderr
    kept = checkpoint.read(Path("a", run.CHECKPOINT))
    assert f"keeps the checkpoint of step {kept.step}" in result.stderr
    steps = metrics.read(Path("a", run.METRICS))
    assert kept.step == len(steps)
    assert [step.skipped for step in steps][-9:] == list(range(1, 10))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--references 15 --batch 16", "--references: 15 is less than --batch 16"),
        ("--references 1798", "--references: 1798 is more than the 1797 samples there are"),
        ("--references 0", "'0' is neither a number from 1 nor 'all'"),
        ("--references many", "'many' is neither a number from 1 nor 'all'"),
        ("--references 100 --target dsm", "--references: --target dsm has no references"),
        ("--batch 1798", "--batch: 1798 is more than the 1797 samples there are"),
        ("--batch 0", "'--batch': 0 is not in the range"),
        ("--lr 0", "'--lr': 0.0 is not in the range x>0"),
        ("--lr nan", "'--lr': nan is not finite"),
        ("--lr inf", "'--lr': inf is not finite"),
        ("--ema -1", "'--ema': -1.0 is not in the range x>=0"),
        ("--duration 0", "'--duration': 0.0 is not in the range x>0"),
        ("--tick 0", "'--tick': 0.0 is not in the range x>0"),
        ("--cbase 40", "--cbase: channels must be a multiple of 16, got 40"),
        ("--seed -1", "'--seed': -1 is not in the range"),
        ("--threads 0", "'--threads': 0 is not in the range 1<=x<=1024"),
        ("--target sde", "'--target': 'sde' is not one of 'stf', 'dsm'"),
        ("--resume nowhere", "'--resume': Directory 'nowhere' does not exist"),
        ("--resume .", "--resume: there is no checkpoint"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(in_tmp, line, message):
    result = invoke(train, line)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(in_tmp.iterdir()) == []


def test_cuda_is_refused_where_there_is_none(in_tmp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(train, "--device cuda")
    assert result.exit_code == 2
    assert "--device: torch finds no CUDA device" in result.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch 32", "--batch: {run} was started with 16, got 32"),
        ("--lr 0.1", "--lr: {run} was started with 0.003, got 0.1"),
        ("--target dsm", "--target: {run} was started with stf, got dsm"),
        ("--references all", "--references: {run} was started with 100, got all"),
        ("--seed 5", "--seed: {run} was started with 0, got 5"),
        ("--outdir elsewhere", "--outdir: a resumed run stays in its folder"),
        ("--duration 0.0001", "--duration: {run} has seen 0.000256 million images"),
    ],
)
def test_resuming_with_other_options_is_refused(finished, option, message):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = invoke(train, f"--resume {folder} {option}")
    assert result.exit_code == 2
    assert message.format(run=folder) in " ".join(result.stderr.split())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_in_use_is_refused(finished):
    folder, _ = finished
    result = invoke(train, f"{TINY} --outdir {folder}")
    assert result.exit_code == 2
    assert f"--outdir: {folder} is not empty" in result.stderr


def test_damage_is_reported(in_tmp):
    assert invoke(train, f"{TINY} --outdir a --duration 0.0001").exit_code == 0
    path = Path("a", run.METRICS)
    path.write_bytes(path.read_bytes()[:10])
    result = invoke(train, "--resume a --duration 0.000256")
    assert result.exit_code == 1
    assert "got 10" in result.stderr


def test_sample_draws_the_same_as_training_did(finished, in_tmp):
    result = invoke(sample, f"{finished[0]} --output s.png")
    assert result.exit_code == 0, result.output
    assert (in_tmp / "s.png").read_bytes() == (finished[0] / "samples.png").read_bytes()
    assert "s.png: 100 samples, 35 network evaluations each" in result.stdout


def test_sample_writes_values(finished, in_tmp):
    for name, batch in (("a", 7), ("b", 3)):
        line = f"{finished[0]} --output {name}.npy --seeds 3,5-10 --batch {batch} --steps 4"
        assert invoke(sample, line).exit_code == 0
    a, b = np.load("a.npy"), np.load("b.npy")
    assert a.shape == (7, 1, 8, 8)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=1e-4)  # batches differ by float32 sums alone
    assert len(np.unique(a.round(3), axis=0)) == 7


def test_sample_takes_the_options_of_the_sampler(finished, in_tmp):
    base = f"{finished[0]} --output s.npy --overwrite --seeds 0-3 --steps 5"
    results = []
    churned = ["", " --S_noise 2", " --S_max 1", " --S_min 1"]
    others = ["", "--rho 3", "--sigma_max 10", "--sigma_min 1"]
    for extra in [f"--S_churn 2{more}" for more in churned] + others:
        assert invoke(sample, f"{base} {extra}").exit_code == 0
        results.append(np.load("s.npy"))
    for i, one in enumerate(results):
        for other in results[:i]:
            assert not np.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{run} --output s.jpg", "--output: s.jpg ends neither in .png nor in .npy"),
        ("{run} --seeds 5-3", "'5-3' is empty: 3 is below 5"),
        ("{run} --seeds a", "'a' is neither a seed nor a range like 0-63"),
        (
            "{run} --sigma_min 90",
            "--sigma_min: sigma_min must lie in (0, sigma_max = 80",
        ),
        ("{run} --sigma_max inf", "'--sigma_max': inf is not finite"),
        ("{run} --steps 1", "'--steps': 1 is not in the range 2<=x"),
        ("{run} --S_churn nan", "'--S_churn': nan is not finite"),
        ("{run} --S_max nan", "--S_max: S_max must be at least 0, got nan"),
        (".", "RUN: there is no checkpoint"),
        ("nowhere", "Directory 'nowhere' does not exist"),
    ],
)
def test_bad_options_of_sample_are_refused(finished, in_tmp, line, message):
    result = invoke(sample, line.format(run=finished[0]))
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(in_tmp.iterdir()) == []


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A class-conditional run, one that learnt less, and one of another process."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("good", "worse", "ve")]
    lines = [
        "--preset digits-edm-cond --lr 0.03",
        "--preset digits-edm-cond --lr 0.01 --duration 0.000128",
        "--preset digits-ve",
    ]
    for folder, line in zip(folders, lines, strict=True):
        result = invoke(train, f"{TINY} --references 100 --outdir {folder} {line}")
        assert result.exit_code == 0, result.output
    return folders


def values(line):
    result = invoke(sample, f"{line} --output s.npy --overwrite --steps 4")
    assert result.exit_code == 0, result.output
    return np.load("s.npy")


def test_classes_are_told(conditional, in_tmp):
    run_folder = conditional[0]
    mixed, third = values(f"{run_folder} --seeds 0-12"), values(f"{run_folder} --seeds 3,13")
    np.testing.assert_allclose(mixed[3], third[0], atol=1e-4)
    forced = values(f"{run_folder} --seeds 3-5 --class 3")
    np.testing.assert_allclose(mixed[3], forced[0], atol=1e-4)
    assert not np.allclose(mixed[4:6], forced[1:], atol=1e-3)


def test_guidance_extrapolates(conditional, in_tmp):
    """At W = 0 the class alone counts, at W = -1 none of it."""
    good, worse, _ = conditional
    base = f"{good} --seeds 1-3"
    plain = values(base)
    np.testing.assert_allclose(values(f"{base} --guidance 0"), plain, atol=1e-6)
    none = [values(f"{good} --seeds 1-3 --class {c} --guidance -1") for c in (2, 7)]
    np.testing.assert_allclose(none[0], none[1], atol=1e-5)
    assert not np.allclose(values(f"{base} --guidance 2"), plain, atol=1e-3)
    led = values(f"{base} --guide {worse} --guidance -1")
    np.testing.assert_allclose(led, values(f"{worse} --seeds 1-3"), atol=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{run} --class 3", "--class: {run} is not conditional"),
        ("{good} --class 10", "--class: there are 10 classes, got 10"),
        (
            "{run} --guidance 1",
            "--guidance: needs --classifier, --guide, or a network trained with",
        ),
        ("{good} --guide {worse}", "--guide: needs --guidance W"),
        ("{good} --guide {ve} --guidance 1", "--guide: {ve} has another process"),
        (
            "{run} --guide {good} --guidance 1",
            "{good} is conditional, and the network",
        ),
        ("{run} --eta 1", "--eta: makes no difference to heun on the process edm"),
        ("{run} --sampler rk45 --steps 9", "--steps: makes no difference to rk45"),
        ("{ve} --sampler pc --rho 3", "--rho: makes no difference to pc on the process ve"),
        ("{ve} --sampler ddim --steps 1", "'--steps': 1 is not in the range 2<=x"),
    ],
)
def test_what_does_not_go_together_is_refused(finished, conditional, in_tmp, line, message):
    names = dict(zip(("good", "worse", "ve"), conditional, strict=True)) | {"run": finished[0]}
    result = invoke(sample, line.format(**names))
    assert result.exit_code == 2
    assert message.format(**names) in " ".join(result.stderr.split())


@pytest.mark.parametrize("sampler", ["ddim --eta 1", "rk45 --tolerance 0.1", "pc --snr 0.1", "em"])
@pytest.mark.parametrize("which", [0, 2])
def test_every_sampler_draws(conditional, in_tmp, sampler, which):
    steps = "" if "rk45" in sampler else "--steps 3"
    line = f"{conditional[which]} --seeds 0-2 --output s.npy --sampler {sampler} {steps}"
    result = invoke(sample, line)
    assert result.exit_code == 0, result.output
    assert np.isfinite(np.load("s.npy")).all()


def test_eval_reports_on_sets_of_seeds(finished, in_tmp):
    line = f"{finished[0]} --n 20 --sets 2 --seed 5 --steps 3 --output r.json"
    result = invoke(evaluate, line)
    assert result.exit_code == 0, result.output
    report = json.loads(Path("r.json").read_text())
    assert report["seeds"] == ["5-24", "25-44"]
    assert (report["evaluations"], report["n"], report["step"]) == (5, 20, 16)
    assert report["data"] == "digits"
    for name, found in report["measures"].items():
        assert name in result.stdout
        assert len(found) == 2
    assert len(report["measures"]) == 4


@pytest.mark.parametrize("name", ["pixels", "components"])
def test_eval_compares_by_what_it_is_told(finished, in_tmp, name):
    line = f"{finished[0]} --n 20 --sets 1 --steps 3 --extractor {name}"
    result = invoke(evaluate, line)
    assert result.exit_code == 0, result.output
    assert f"extractor  {'pixels' if name == 'pixels' else '64 principal'}" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--extractor inception", "--weights: must be given with --extractor inception"),
        ("--weights w.pth", "--weights: is for --extractor inception, got convolutions"),
        ("--extractor inception --weights w.pth", "there is no w.pth"),
    ],
)
def test_bad_options_of_eval_are_refused(finished, in_tmp, options, message):
    result = invoke(evaluate, f"{finished[0]} {options}")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--augment 0.12", "--augment: EDM's augmentation is not implemented"),
        ("--preset cifar10-ve", "--data: the preset cifar10-ve needs the path of its data"),
        ("--preset digits-ve --P_mean 0", "--P_mean: is for --process edm or pfgmpp, got ve"),
        ("--preset patches-edm --cond 1 --batch 99999", "--batch: 99999 is more than the"),
        (
            "--batch 16 --batch-gpu 5",
            "--batch: batch must be a multiple of batch_gpu 5 times 1",
        ),
        ("--fp16 1 --bf16 1", "--bf16: --fp16 is asked for as well"),
        ("--data nowhere.npy", "--data: data must be 'digits', 'patches' or a path, there is no"),
        ("--size 32", "--size: digits has the size it has, got 32"),
        (
            "--preset digits-vp --cres 1,2,2,2,2",
            "--cres: images must have sides that are",
        ),
        ("--preset digits-vp --cres 1,x", "'1,x' is not a list of numbers like 1,2,2"),
        (
            "--preset digits-ve --noise_min 90",
            "--noise_min: sigma_min must lie in (0, sigma",
        ),
    ],
)
def test_presets_refuse_what_does_not_fit(in_tmp, line, message):
    result = invoke(train, line)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert list(in_tmp.iterdir()) == []


def test_a_preset_is_where_values_come_from(in_tmp):
    options = "--preset digits-vp --arch unet --references all --xflip 1 --snap 2"
    result = invoke(train, f"{TINY} --outdir a {options}")
    assert result.exit_code == 0, result.output
    config = json.loads(Path("a", "config.json").read_text())
    assert (config["process"], config["beta_max"], config["arch"]) == ("vp", 20, "unet")
    assert config["references"] == "all"
    # 4 ticks of 64 images.
    assert {p.name for p in Path("a").glob("samples-*")} == {
        "samples-000000128.png",
        "samples-000000256.png",
    }


@pytest.mark.parametrize("command", [train, sample, evaluate])
def test_help_explains_every_option(command):
    assert invoke(command, "--help").exit_code == 0
    context = click.Context(command, **command.context_settings)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help
            shown = parameter.get_help_record(context)[1]
            assert (
                "[default:" in shown
                or parameter.name in ("resume", "guide", "classifier", "overwrite")
                or (command is evaluate and parameter.name in ("output", "weights"))
            ), parameter.name
