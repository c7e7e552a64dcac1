"""The distributions of the noise."""

import math

import pytest
import torch
from scipy import stats

from stf_train.process import GAUSSIAN, StudentT


def test_gaussian_is_randn():
    draw = GAUSSIAN.draw((5, 2, 3), torch.Generator().manual_seed(3))
    assert torch.equal(draw, torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("D", "N"), [(0.5, 1), (1, 12), (8, 12), (8, 3072), (128, 3072)])
def test_student_t_by_the_law_of_its_radius(generator, D, N):
    """||z||^2 / N over chi2_D / D is F-distributed, tails and all."""
    eps = StudentT(D).draw((1500, N), generator)
    radius = (eps.double() ** 2).mean(1).numpy()
    assert stats.kstest(radius, stats.f(N, D).cdf).pvalue > 1e-3
    # Another number of degrees of freedom is told apart.
    assert stats.kstest(radius, stats.f(N, 2 * D).cdf).pvalue < 1e-3


def test_student_t_has_its_density(generator):
    """In one dimension against scipy's, by its distribution function."""
    eps = StudentT(3).draw((4000, 1), generator, torch.float64)
    assert stats.kstest(eps[:, 0].numpy(), stats.t(3).cdf).pvalue > 1e-3
    assert stats.kstest(eps[:, 0].numpy(), stats.norm.cdf).pvalue < 1e-3


def test_many_degrees_of_freedom_are_gaussian():
    def draw(noise):
        return noise.draw((100, 20), torch.Generator().manual_seed(1), torch.float64)

    # The deviation of sqrt(D / chi2_D) from 1 is sqrt(1 / 2D).
    D = 3_072_000  # the most in the paper
    ratio = draw(StudentT(D)) / draw(GAUSSIAN)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5 * math.sqrt(0.5 / D))
    assert not torch.equal(ratio, torch.ones_like(ratio))


def test_a_sample_has_one_scale(generator):
    """The coordinates of a sample are stretched alike: uncorrelated, but not independent."""
    state = generator.get_state()
    eps = StudentT(2.0).draw((50, 4, 5), generator)
    generator.set_state(state)
    scale = (eps / torch.randn(50, 4, 5, generator=generator)).flatten(1)
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-5, atol=0)
    assert scale[:, 0].std() > 0.1


@pytest.mark.parametrize("D", [0, -1.0, math.inf, math.nan])
def test_degrees_of_freedom_are_checked(D):
    with pytest.raises(ValueError, match=f"D must be finite and above 0, got {D}"):
        StudentT(D)
