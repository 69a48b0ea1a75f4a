"""Evaluating a policy on finished images: distances, diversity, rewards, and HTML pages.

    from pcpo_fast.evaluation import frechet_distance

docs/evaluating.md explains every number; ``pcpo-fast evaluate`` computes them.
"""

from pcpo_fast.evaluation.frechet import Gaussian, frechet_distance
from pcpo_fast.evaluation.inception_score import inception_score
from pcpo_fast.evaluation.kernel_distance import kernel_distance
from pcpo_fast.method.diversity import feature_diversity, pixel_diversity

__all__ = [
    "Gaussian",
    "feature_diversity",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "pixel_diversity",
]
