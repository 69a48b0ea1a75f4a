"""Settings that do nothing in a run as short, or as small, as this one are named; those that nobody chose are not."""

from pathlib import Path

import pytest

from pcpo_fast.config.loading import load_config
from pcpo_fast.training.idle_settings import idle_settings

ROOT = Path(__file__).resolve().parents[2]
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
        "advantage.gain_lambda_rise has no effect: it takes three evaluations before the end, more than "
        "evaluation.every=5 gives in 15 epochs (train.epochs)",
    ),
    (
        ("window.size=2", "window.interval=3", "train.epochs=3"),
        "train.epochs=4",
        "window.schedule=progressive does not move the window in 3 epochs (train.epochs): window.interval=3",
    ),
    (
        ("window.size=2", "window.schedule=random", "train.epochs=25"),
        "train.epochs=26",
        "window.schedule=random does not move the window in 25 epochs (train.epochs): window.interval=25",
    ),
    (
        (*RUNNING, "advantage.min_count=17", "advantage.buffer_size=17"),  # 320 draws of 100 prompts
        "advantage.min_count=8",
        "advantage.normalization=running compares every image with all of its epoch, as global does: no prompt gets "
        "17 rewards (advantage.min_count) in 80 epochs (train.epochs), only 16",
    ),
    (
        ("algorithm=pcpo_ddpo", "advantage.min_count=5", "train.epochs=1"),  # 256 draws of 100 prompts
        "advantage.min_count=3",
        "advantage.normalization=running compares every image with all of its epoch, as global does: no prompt gets "
        "5 rewards (advantage.min_count) in 1 epoch (train.epochs), only 3",
    ),
    (
        ("evaluation.min_diversity=0.5", "evaluation.images_per_prompt=2", "train.epochs=1", "evaluation.every=1"),
        "train.epochs=2",
        "evaluation.min_diversity has no effect: there is no evaluation before the end (evaluation.every=1, "
        "train.epochs=1)",
    ),
    (
        ("checkpoint.keep_best=2", "evaluation.every=4", "checkpoint.every=6", "train.epochs=12"),
        "train.epochs=13",
        "checkpoint.keep_best has no effect: no evaluation meets a checkpoint before the end (evaluation.every=4, "
        "checkpoint.every=6, train.epochs=12)",
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


@pytest.mark.parametrize("ranks", [1, 8])
def test_nothing_is_idle_in_what_is_shipped(ranks: int) -> None:
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/config.yaml")]
    configs = {file: load_config(file) for file in files}
    said = {file: idle_settings(config, 1000, config.evaluation.prompts, ranks) for file, config in configs.items()}
    assert len(said) > 20 and {file: lines for file, lines in said.items() if lines} == {}
