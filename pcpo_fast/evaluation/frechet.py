"""The Fréchet distance between two Gaussians, accurate also for singular covariances."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.wording import counted

PUBLISHED_SAMPLES = 10_000
"""Number of images below which the authors of FID call it biased (Heusel et al., arXiv 1706.08500, public code)."""

_SYMMETRY = 1e-6
_NEGATIVE = 1e-6


@dataclass(frozen=True)
class Gaussian:
    """A mean and a factor of the covariance, both float64.

    Attributes:
        mean: [d].
        factor: [r, d] with covariance = factor^T factor; r is the smaller of d and the number of samples.
    """

    mean: Tensor
    factor: Tensor

    @property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float(self.factor.square().sum())

    @classmethod
    def of_moments(cls, mean: Any, covariance: Any) -> "Gaussian":
        """From a mean [d] and a symmetric, positive semi-definite covariance [d, d].

        Raises:
            ValueError: shapes do not match, a value is not finite, or the covariance is asymmetric or has a negative
                eigenvalue.
        """
        mu, sigma = (torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (mean, covariance))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
            raise ValueError(
                f"expected a mean [d] and a covariance [d, d], got {list(mu.shape)} and {list(sigma.shape)}"
            )
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("mean and covariance must be finite")
        size = float(sigma.abs().max())
        if float((sigma - sigma.T).abs().max()) > _SYMMETRY * size:
            raise ValueError("the covariance is not symmetric")
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
        if float(values[0]) < -_NEGATIVE * size:
            raise ValueError(f"the covariance has a negative eigenvalue, {float(values[0]):.3g}")
        return cls(mu, values.clamp_min(0).sqrt()[:, None] * vectors.T)

    @classmethod
    def of_features(cls, features: Tensor) -> "Gaussian":
        """From samples [n, d], with the unbiased covariance (divided by n - 1) that all published distances use.

        With fewer samples than dimensions the scaled, centred samples are themselves the factor, which avoids the
        square root of a singular matrix and its loss of accuracy.

        Raises:
            ValueError: there are fewer than two samples, or a value is not finite.
        """
        if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
            raise ValueError(f"a covariance needs at least two samples [n, d], got {list(features.shape)}")
        wide = features.detach().to("cpu", torch.float64)
        if not wide.isfinite().all():
            raise ValueError("features must be finite")
        mean = wide.mean(dim=0)
        centred = (wide - mean) / math.sqrt(len(wide) - 1)
        if len(wide) <= wide.shape[1]:
            return cls(mean, centred)
        return cls.of_moments(mean, centred.T @ centred)


def distance(first: Gaussian, second: Gaussian) -> float:
    """``|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`` (Dowson and Landau, 1982; Heusel et al., 2017, eq. 6).

    With S = F^T F the eigenvalues of S1 S2 are the squared singular values of F1 F2^T, so the last trace is the sum of
    these singular values: no square root of a nonsymmetric matrix, and no complex numbers.

    Raises:
        ValueError: the dimensions differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"dimensions differ: {len(first.mean)} and {len(second.mean)}")
    cross = float(torch.linalg.svdvals(first.factor @ second.factor.T).sum())
    means = float((first.mean - second.mean).square().sum())
    # A squared metric cannot be negative: anything below 0 is rounding.
    return max(0.0, means + first.trace + second.trace - 2 * cross)


def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians, the formula of FID and FD-DINOv2.

    Args:
        mean1: [d], tensor or array; computed in float64.
        cov1: [d, d], symmetric and positive semi-definite; may be singular.
        mean2: as ``mean1``.
        cov2: as ``cov1``.

    Raises:
        ValueError: shapes do not match, a value is not finite, or a covariance is not symmetric or has a negative
            eigenvalue beyond rounding.
    """
    return distance(Gaussian.of_moments(mean1, cov1), Gaussian.of_moments(mean2, cov2))


def sample_notes(samples: int, dimensions: int) -> list[str]:
    """Caveats for a Fréchet distance computed from this many samples, one sentence each."""
    notes = []
    if samples <= dimensions:
        notes.append(
            f"{counted(samples, 'image')} for {counted(dimensions, 'dimension')}: the covariance is singular, so the "
            "distance covers only part of the space; compare it only between equal numbers of images, and not with "
            "published values"
        )
    elif samples < PUBLISHED_SAMPLES:
        notes.append(
            f"{counted(samples, 'image')}: a Fréchet distance grows as the number of images shrinks (published "
            "values use 10,000 to 50,000); compare it only between equal numbers of images"
        )
    return notes
