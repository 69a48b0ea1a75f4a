"""Failures of rewards, and scoring the rest of a batch when a run continues without the failed group."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcpo_fast.errors import UserError


class RewardFailure(UserError):
    """A reward gave no usable result; the message names the reward and the prompts.

    Args:
        message: one sentence.
        scores: float64 [B], the scores of all images of the call, NaN where there is none; None: no scores at all.
        retry: whether calling again with some of the images may help; False for example if a server is unreachable.
    """

    def __init__(self, message: str, scores: Tensor | None = None, *, retry: bool = True) -> None:
        super().__init__(message)
        self.scores = scores
        self.retry = retry


def scores_of_what_works(
    call: Callable[[list[int]], Tensor], prompts: Sequence[str]
) -> tuple[Tensor, tuple[RewardFailure, ...]]:
    """Score a batch; if that fails, score it prompt by prompt.

    Args:
        call: scores the images at the given positions; raises :class:`RewardFailure`.
        prompts: prompts of the B images; images with equal prompts form a group.

    Returns:
        Scores float64 [B], NaN where there is none, and the failures.
    """
    everything = list(range(len(prompts)))
    try:
        return call(everything), ()
    except RewardFailure as failure:
        whole = failure
    if whole.scores is not None:
        return whole.scores, (whole,)
    scores = torch.full((len(prompts),), torch.nan, dtype=torch.float64)
    groups = [[row for row in everything if prompts[row] == prompt] for prompt in dict.fromkeys(prompts)]
    if len(groups) == 1 or not whole.retry:
        return scores, (whole,)
    failures = []
    for rows in groups:
        try:
            scores[rows] = call(rows).cpu()
        except RewardFailure as failure:
            failures.append(failure)
            if failure.scores is not None:
                scores[rows] = failure.scores.cpu()
            if not failure.retry:
                break
    return scores, tuple(failures)
