"""Evaluation: what is compared with what, and what the report says."""

import json
import math
import statistics
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from stf_train import data
from stf_train.evaluate import evaluate, seed_sets
from stf_train.features import Classified, Features, Pixels, PrincipalComponents
from stf_train.quality import frechet_distance, inception_score, moments, precision_recall


@dataclass
class Drawn:
    x: Tensor
    evaluations: int


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def copies(digits, noise=0.0, evaluations=lambda seeds: 35):
    """A sampler that returns digits, the one of the number of the seed, with seeded noise."""
    images = digits.references.decode()

    def sampler(seeds):
        x = images[torch.tensor(seeds) % len(images)].double()
        for place, seed in zip(x, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            place += noise * torch.randn(place.shape, generator=generator, dtype=torch.float64)
        return Drawn(x, evaluations(seeds))

    return sampler


def test_the_data_themselves_are_perfect(digits):
    report = evaluate(copies(digits), digits, Pixels(), [range(1797)])
    found = {name: values[0] for name, values in report.measures.items()}
    assert abs(found.pop("Frechet distance")) < 1e-9
    assert found == {"precision k=3": 1, "recall k=3": 1}


def test_measures_are_those_of_the_rounded_samples(digits):
    extractor = Classified(PrincipalComponents(digits, 20), digits)
    seeds = seed_sets(150, 3, 1000)
    sampler = copies(digits, noise=0.3)
    report = evaluate(sampler, digits, extractor, seeds, batch=64, neighbours=4, splits=5)
    real = extractor(digits.references.decode())
    for i, one in enumerate(seeds):
        # Counts of ink 0..16 stand for [-1, 1].
        rounded = ((sampler(one).x + 1) * 8).round().clamp(0, 16) / 8 - 1
        fake = extractor(rounded.float())
        precision, recall = precision_recall(real.features, fake.features, 4)
        expected = {
            "Frechet distance": frechet_distance(moments(real.features), moments(fake.features)),
            "inception score /5": inception_score(fake.logits, 5),
            "precision k=4": precision,
            "recall k=4": recall,
        }
        assert {name: values[i] for name, values in report.measures.items()} == pytest.approx(
            expected, rel=1e-9
        )


def test_batches_make_no_difference(digits):
    def run(batch):
        sampler = copies(digits, 0.2)
        return evaluate(sampler, digits, Pixels(), seed_sets(70, 2), batch=batch).measures

    for name, values in run(70).items():
        assert run(32)[name] == pytest.approx(values, rel=1e-12)


def test_noise_moves_samples_away(digits):
    def distance(noise):
        report = evaluate(copies(digits, noise), digits, Pixels(), [range(500)])
        return report.mean("Frechet distance")

    assert distance(0) < distance(0.2) < distance(0.5)


def test_report(digits):
    report = evaluate(
        # Fifty samples of each hundred take ten evaluations more, as with an adaptive sampler.
        copies(digits, 0.2, lambda seeds: 30 + 10 * (seeds[0] % 100 >= 50)),
        digits,
        Pixels(),
        seed_sets(100, 3, 7),
        batch=50,
    )
    assert (report.data, report.split, report.size) == ("digits", "all", 1797)
    assert (report.extractor, report.width, report.levels, report.n) == ("pixels", 64, 17, 100)
    assert report.seeds == ("7-106", "107-206", "207-306")
    values = report.measures["Frechet distance"]
    assert len(set(values)) == 3
    assert report.mean("Frechet distance") == pytest.approx(sum(values) / 3)
    mean = sum(values) / 3
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert report.sd("Frechet distance") == pytest.approx(sd)
    assert json.loads(json.dumps(report.as_dict()))["n"] == 100
    lines = str(report).splitlines()
    assert lines[0] == "data       digits, split all, 1797 samples"
    assert lines[1] == "extractor  pixels: 64 features"
    assert lines[2] == (
        "samples    3 sets of 100, seeds 7-106 / 107-206 / 207-306, rounded to 17 levels"
    )
    assert lines[3] == f"NFE        {report.evaluations:g}"
    assert lines[5].split() == ["mean", "sd", "min", "max"]
    row = next(line for line in lines if line.startswith("Frechet distance")).split()[2:]
    expected = (statistics.fmean(values), sd, min(values), max(values))
    assert [float(cell) for cell in row] == pytest.approx(expected, rel=1e-4)


def test_evaluations_are_the_mean_over_samples(digits):
    sampler = copies(digits, evaluations=lambda seeds: len(seeds))
    report = evaluate(sampler, digits, Pixels(), [range(100)], batch=60)
    assert report.evaluations == (60 * 60 + 40 * 40) / 100


def test_one_set_has_no_deviation(digits):
    report = evaluate(copies(digits), digits, Pixels(), [[5, 3, 8, 1, 9]])
    assert math.isnan(report.sd("Frechet distance"))
    assert report.seeds == ("5,..,9 (5)",)
    assert "1 set of 5, seeds 5,..,9 (5)" in str(report)
    row = next(line for line in str(report).splitlines() if line.startswith("Frechet"))
    assert row.split()[3] == "-"


def test_floats_are_compared_as_they_are(tmp_path):
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "latents.npy", values)
    latents = data.load(tmp_path / "latents.npy")
    seen = []

    class Spy(Pixels):
        def __call__(self, images: Tensor) -> Features:
            seen.append(images)
            return super().__call__(images)

    samples = 5 * torch.randn(10, 4)
    report = evaluate(lambda seeds: Drawn(samples, 1), latents, Spy(), [range(10)])
    assert torch.equal(seen[-1], samples)
    assert report.levels is None
    assert "as they are" in str(report)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], r"sets of one size, at least one, got sizes \[\]"),
        ([range(5), range(5, 11)], r"sets of one size, at least one, got sizes \[5, 6\]"),
        ([range(5), range(4, 9)], "seeds must not occur twice"),
        ([[1, 1, 2]], "seeds must not occur twice"),
    ],
)
def test_bad_seeds(digits, seeds, message):
    with pytest.raises(ValueError, match=message):
        evaluate(copies(digits), digits, Pixels(), seeds)


def test_bad_samples(digits):
    def diverging(seeds):
        x = torch.zeros(len(seeds), 1, 8, 8)
        x[2, 0, 1, 1] = math.nan
        return Drawn(x, 1)

    with pytest.raises(ValueError, match="finite samples, that of seed 12 is not"):
        evaluate(diverging, digits, Pixels(), [range(10, 20)])
    with pytest.raises(ValueError, match=r"must return \[10, 1, 8, 8\] .* got \[10, 64\]"):
        evaluate(lambda s: Drawn(torch.zeros(len(s), 64), 1), digits, Pixels(), [range(10)])


def test_seed_sets():
    assert seed_sets(4) == [range(4), range(4, 8), range(8, 12)]
    assert seed_sets(2, 2, 10) == [range(10, 12), range(12, 14)]
