"""Distances and diversity: closed forms, the published formulas, and what must not break them."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pcpo_fast.evaluation import (
    Gaussian,
    feature_diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    pixel_diversity,
)
from pcpo_fast.evaluation.frechet import distance, sample_notes
from pcpo_fast.evaluation.inception_score import SPLIT_FROM, SPLITS
from pcpo_fast.method.diversity import pairs

EPS = torch.finfo(torch.float64).eps


def covariance(d: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(rank or 2 * d, d, dtype=torch.float64)
    return factor.T @ factor / len(factor)


def published(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """As FID's own code forms it: SciPy's square root of a matrix."""
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    difference = (mean1 - mean2).numpy()
    return float(difference @ difference + cov1.trace() + cov2.trace() - 2 * np.trace(root.real))


def by_eigenvalues(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """As torch-fidelity forms it: eigenvalues of the product."""
    values = np.linalg.eigvals((cov1 @ cov2).numpy()).astype(complex)
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.sqrt(values).real.sum())


def test_diagonal_gaussians() -> None:
    std1, std2 = torch.rand(2, 9, dtype=torch.float64)
    mean1, mean2 = torch.randn(2, 9, dtype=torch.float64)
    exact = float((mean1 - mean2).square().sum() + (std1 - std2).square().sum())
    found = frechet_distance(mean1, torch.diag(std1**2), mean2, torch.diag(std2**2))
    assert found == pytest.approx(exact, rel=100 * EPS * 9)


def test_commuting_covariances() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    std1, std2 = torch.rand(2, 12, dtype=torch.float64)
    cov1, cov2 = (basis @ torch.diag(std**2) @ basis.T for std in (std1, std2))
    zero = torch.zeros(12, dtype=torch.float64)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(float((std1 - std2).square().sum()), rel=1e-10)


def test_scaled_covariance() -> None:
    """Of S and c S: tr S (1 - sqrt c)^2."""
    cov = covariance(15)
    zero = torch.zeros(15, dtype=torch.float64)
    exact = float(cov.trace()) * (1 - math.sqrt(3)) ** 2
    assert frechet_distance(zero, cov, zero, 3 * cov) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("form", [published, by_eigenvalues])
def test_published_formulas(form: object) -> None:
    mean1, mean2 = torch.randn(2, 24, dtype=torch.float64)
    cov1, cov2 = covariance(24), covariance(24)
    expected = form(mean1, cov1, mean2, cov2)  # type: ignore[operator]
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean2.numpy(), cov2.numpy(), mean1.numpy(), cov1.numpy()) == pytest.approx(
        expected, rel=1e-9
    )


def test_equal_gaussians_are_at_no_distance_even_if_singular() -> None:
    mean = torch.randn(30, dtype=torch.float64)
    for cov in (covariance(30), covariance(30, rank=4), torch.zeros(30, 30, dtype=torch.float64)):
        assert 0 <= frechet_distance(mean, cov, mean, cov) <= 1e-10 * (1 + float(cov.trace()))


def test_singular_covariances_are_exact() -> None:
    """Of rank one, S = u u^T and v v^T: the trace of the root is |u . v|."""
    u, v = torch.randn(2, 40, dtype=torch.float64)
    zero = torch.zeros(40, dtype=torch.float64)
    exact = float(u @ u + v @ v - 2 * (u @ v).abs())
    # The square root of an eigenvalue that should be 0 is off by the root of the rounding.
    assert frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (10, 200), (200, 10), (200, 300)])
def test_features_with_fewer_or_more_samples_than_dimensions(n: int, m: int) -> None:
    first = torch.randn(n, 32) @ torch.randn(32, 32) + torch.randn(32)
    second = torch.randn(m, 32)
    moments = [(x.double().mean(dim=0), torch.cov(x.double().T)) for x in (first, second)]
    expected = by_eigenvalues(*moments[0], *moments[1])
    found = distance(Gaussian.of_features(first), Gaussian.of_features(second))
    # Eigenvalues of a singular product are known to about eps, and their roots to its root.
    assert found == pytest.approx(expected, rel=1e-5 if min(n, m) <= 32 else 1e-9)


def test_the_gram_form_is_the_exact_one() -> None:
    """Two samples each: the covariances are of rank one, and everything is known in closed form."""
    a, b = torch.randn(2, 2, 50, dtype=torch.float64)
    u, v = ((x[0] - x[1]) / math.sqrt(2) for x in (a, b))
    exact = float((a.mean(0) - b.mean(0)).square().sum() + u @ u + v @ v - 2 * (u @ v).abs())
    assert distance(Gaussian.of_features(a), Gaussian.of_features(b)) == pytest.approx(exact, rel=1e-12)


def test_float32_features_far_from_zero_keep_their_digits() -> None:
    base = torch.randint(-8, 8, (100, 6)).float()
    near = distance(Gaussian.of_features(base[:50]), Gaussian.of_features(base[50:]))
    far = distance(Gaussian.of_features(base[:50] + 4096), Gaussian.of_features(base[50:] + 4096))
    assert far == pytest.approx(near, rel=1e-8)


@pytest.mark.parametrize(
    ("mean", "cov", "said"),
    [
        (torch.zeros(3), torch.eye(4), "covariance"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue, -1"),
        (torch.tensor([0.0, math.nan]), torch.eye(2), "finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean: Tensor, cov: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        frechet_distance(mean, cov, torch.zeros(2), torch.eye(2))


def test_one_sample_and_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        Gaussian.of_features(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="4 and 5"):
        distance(Gaussian.of_features(torch.zeros(3, 4)), Gaussian.of_features(torch.zeros(3, 5)))


def test_notes_say_when_there_are_too_few_images() -> None:
    assert "singular" in sample_notes(100, 1024)[0]
    assert "singular" in sample_notes(1024, 1024)[0]
    assert "10,000" in sample_notes(2000, 1024)[0]
    assert sample_notes(20_000, 1024) == []


# The kernel distance.


def test_kernel_distance_is_the_published_sum() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (7, 11))

    def kernel(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-torch.cdist(a, b).square() / 200).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    # Three means near 1 cancel to about 1e-3 in the reference.
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_kernel_distance_of_two_points_and_of_equal_sets() -> None:
    x, y = torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]])
    assert kernel_distance(x, y, sigma=5, scale=1) == pytest.approx(2 - 2 * math.exp(-0.5), rel=1e-14)
    many = torch.randn(20, 5)
    assert kernel_distance(many, many) == 0


def test_kernel_distance_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(9, 4), torch.randn(5, 4)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(sys.modules["pcpo_fast.evaluation.kernel_distance"], "_BLOCK", 2)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-10)


def test_kernel_distance_refuses_what_does_not_fit() -> None:
    for x, y, said in (
        (torch.zeros(2, 3), torch.zeros(2, 4), "got"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "is empty"),
        (torch.full((2, 3), math.inf), torch.zeros(2, 3), "finite"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel_distance(x, y)


# Inception Score and diversity.


def test_inception_score_of_sure_and_of_clueless_classifiers() -> None:
    sure = 1000 * torch.eye(10).repeat(3, 1)
    assert inception_score(sure) == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.randn(1, 10).expand(30, 10)) == pytest.approx(1, rel=1e-12)


def test_inception_score_of_many_images_is_the_mean_of_ten_parts() -> None:
    """As torch-fidelity forms it (0.4.0, its defaults): NumPy's old generator, and parts that differ by one at most."""
    count = SPLIT_FROM + 7
    logits = torch.randn(count, 5)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(count))
    scores = []
    for place in range(SPLITS):
        part = logits[order].double()[place * count // SPLITS : (place + 1) * count // SPLITS]
        p = part.softmax(dim=1)
        scores.append(float((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()))
    assert inception_score(logits) == pytest.approx(sum(scores) / SPLITS, rel=1e-12)
    assert inception_score(logits) != pytest.approx(inception_score(logits[1:]), rel=1e-6)


def test_diversity_is_the_mean_over_pairs() -> None:
    images, features = torch.rand(5, 3, 4, 6), torch.randn(5, 7)
    chosen = pairs(5)
    assert len(chosen) == len(set(chosen)) == 10
    squared = [float((images[i] - images[j]).double().square().mean()) for i, j in chosen]
    assert pixel_diversity(images) == pytest.approx(math.sqrt(sum(squared) / 10), rel=1e-6)
    cosine = [float(torch.cosine_similarity(features[i].double(), features[j].double(), dim=0)) for i, j in chosen]
    assert feature_diversity(features) == pytest.approx(1 - sum(cosine) / 10, rel=1e-10)
    assert feature_diversity(features[:1].expand(3, 7)) == pytest.approx(0, abs=1e-12)


def test_diversity_of_one_image_is_refused() -> None:
    for call in (lambda: pixel_diversity(torch.rand(1, 3, 2, 2)), lambda: feature_diversity(torch.rand(1, 4))):
        with pytest.raises(ValueError, match="at least two"):
            call()
