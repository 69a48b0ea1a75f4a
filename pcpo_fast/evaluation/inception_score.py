"""The Inception Score, from class logits."""

import numpy as np
import torch
from torch import Tensor

SPLITS = 10
SPLIT_FROM = 10_000
_SEED = 2020


def inception_score(logits: Tensor) -> float:
    """``exp(mean KL(p(y|x) || p(y)))`` (Salimans et al., arXiv 1606.03498, section 4).

    From 10,000 images, the mean over ten random splits as published (torch-fidelity's permutation); below that, one
    score over all images, because a split of n images cannot score more than n.

    Args:
        logits: [n, classes].

    Raises:
        ValueError: there are no images.
    """
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits must be [n, classes], got {list(logits.shape)}")
    wide = logits.detach().to("cpu", torch.float64)
    splits = SPLITS if len(wide) >= SPLIT_FROM else 1
    if splits > 1:
        wide = wide[torch.from_numpy(np.random.RandomState(_SEED).permutation(len(wide)))]
    scores = []
    ends = [place * len(wide) // splits for place in range(splits + 1)]
    for part in (wide[ends[place] : ends[place + 1]] for place in range(splits)):
        log_p = part.log_softmax(dim=1)
        marginal = log_p.exp().mean(dim=0)
        divergence = (log_p.exp() * (log_p - marginal.log())).nan_to_num(0.0).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return sum(scores) / len(scores)
