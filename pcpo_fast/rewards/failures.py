"""A reward that fails: the message, and what remains of a batch when a run continues without the group."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcpo_fast.errors import UserError


class RewardFailure(UserError):
    """A reward gave no usable answer; the message names it and the prompts.

    Args:
        message: one sentence.
        scores: float32 [B], the answers for all images of the call with NaN where there is none; None: there is none
            at all.
        retry: whether asking again for some of the images may help; a server that stays away will not answer that.
    """

    def __init__(self, message: str, scores: Tensor | None = None, *, retry: bool = True) -> None:
        super().__init__(message)
        self.scores = scores
        self.retry = retry


def scores_of_what_works(
    call: Callable[[list[int]], Tensor], prompts: Sequence[str]
) -> tuple[Tensor, tuple[RewardFailure, ...]]:
    """Score a batch; where that fails, score it prompt by prompt.

    Args:
        call: scores of some of the images, by position; raises :class:`RewardFailure`.
        prompts: those of the B images; equal ones are a group.

    Returns:
        float32 [B], NaN where there is no score, and the failures.
    """
    everything = list(range(len(prompts)))
    try:
        return call(everything), ()
    except RewardFailure as failure:
        whole = failure
    if whole.scores is not None:
        return whole.scores, (whole,)
    scores = torch.full((len(prompts),), torch.nan)
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
