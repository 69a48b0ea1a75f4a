"""Settings that do nothing in a run as short, or as small, as this one are named; those that nobody chose are not."""

import pytest

from pcpo_fast.config.loading import load_config
from pcpo_fast.training.idle_settings import idle_settings

PROMPTS, HELDOUT = 100, 8
RUNNING = ("advantage.normalization=running", "rollout.images_per_prompt=4", "train.epochs=80")

# What was asked for, what it lacks to take effect, and what is said without that.
IDLE = [
    (
        ("scoring.overlap=true", "rollout.batch_size=96"),
        "rollout.batch_size=95",
        "scoring.overlap has no effect: a rank samples its 96 images in one batch (rollout.batch_size=96), none of "
        "them during the scoring",
    ),
    (
        ("advantage.steps=gain", "advantage.gain_lambda_rise=0.25", "evaluation.every=5", "train.epochs=15"),
        "train.epochs=16",
        "advantage.gain_lambda_rise has no effect: it takes three evaluations (evaluation.every=5) before the last "
        "epoch, more than there are in 15 epochs (train.epochs)",
    ),
    (
        ("window.size=2", "window.interval=3", "train.epochs=3"),
        "train.epochs=4",
        "window.interval has no effect: the window does not move in 3 epochs (train.epochs)",
    ),
    (
        (*RUNNING, "advantage.min_count=17", "advantage.buffer_size=17"),  # 320 draws of 100 prompts
        "advantage.min_count=8",
        "advantage.normalization has no effect: advantage.min_count=17 is more rewards than any prompt gets in 80 "
        "epochs (train.epochs), 16",
    ),
    (
        ("evaluation.min_diversity=0.5", "evaluation.images_per_prompt=2", "train.epochs=1", "evaluation.every=1"),
        "train.epochs=2",
        "evaluation.min_diversity has no effect: evaluation.every=1 puts no evaluation before the last epoch in 1 "
        "epoch (train.epochs)",
    ),
    (
        ("checkpoint.keep_best=2", "evaluation.every=4", "checkpoint.every=6", "train.epochs=12"),
        "train.epochs=13",
        "checkpoint.keep_best has no effect: evaluation.every=4 and checkpoint.every=6 coincide only at the end "
        "in 12 epochs (train.epochs)",
    ),
    (
        ("evaluation.prompts=9",),
        "evaluation.prompts=8",
        "evaluation.prompts has no effect: prompts.heldout has only 8 prompts, all of which are used",
    ),
]


@pytest.mark.parametrize(("asked", "enough", "said"), IDLE, ids=[said.split()[0] for _, _, said in IDLE])
def test_what_does_nothing_in_this_run_is_said(asked: tuple[str, ...], enough: str, said: str) -> None:
    assert idle_settings(load_config(None, asked), PROMPTS, HELDOUT, 1) == [said]
    assert idle_settings(load_config(None, (*asked, enough)), PROMPTS, HELDOUT, 1) == []


def test_ranks_and_candidates_count_in_the_batches_of_a_rollout() -> None:
    asked = ("scoring.overlap=true", "rollout.batch_size=48", "train.epochs=20")
    assert [len(idle_settings(load_config(None, asked), PROMPTS, HELDOUT, ranks)) for ranks in (1, 2)] == [0, 1]
    for overlapped in ("rollout.candidates=30", "advantage.steps=gain", "rollout.batch_size=auto"):
        assert idle_settings(load_config(None, (*asked, overlapped)), PROMPTS, HELDOUT, 2) == []


def test_what_nobody_chose_is_not_said() -> None:
    """Defaults and a preset's own values, in a run that only encodes and in a very short one."""
    for epochs in (0, 1):
        for asked in (("algorithm=mixgrpo",), ("algorithm=ddpo",), ("evaluation.every=1", "checkpoint.every=0")):
            assert idle_settings(load_config(None, (*asked, f"train.epochs={epochs}")), PROMPTS, 5, 1) == []
