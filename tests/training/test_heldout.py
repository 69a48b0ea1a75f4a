"""Held-out evaluation: shares of the ranks, which images are shown, and how much those of a prompt differ."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pcpo_fast.training.heldout
from pcpo_fast.config.schema import EvaluationConfig, RewardConfig
from pcpo_fast.method.diversity import mean_pixel_diversity
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet
from pcpo_fast.training.heldout import SHOWN, HeldOut

PROMPTS = [Prompt(f"prompt {n}", {"n": n}) for n in range(5)]


def numbers(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that notices every mix-up of images, prompts and metadata."""
    if not all(prompt.endswith(str(row["n"])) for prompt, row in zip(prompts, metadata, strict=True)):
        raise ValueError("prompts and metadata do not belong together")
    return images[:, 0, 0, 0] + torch.tensor([100.0 * row["n"] for row in metadata])


def heldout(folder: Path, images_per_prompt: int = 1, rewards: tuple[RewardConfig, ...] = ()) -> HeldOut:
    specs = rewards or (RewardConfig(name="test_heldout:numbers", weight=2.0),)
    settings = EvaluationConfig(images_per_prompt=images_per_prompt)
    unused: Any = None
    return HeldOut(unused, PROMPTS, RewardSet(specs), unused, settings, folder)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_scores_are_the_same_for_any_number_of_ranks(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(5, 3, 2, 2)
    watched = RewardConfig(name="jpeg_compressibility", evaluation_only=True)
    evaluation = heldout(tmp_path, rewards=(RewardConfig(name="test_heldout:numbers", weight=2.0), watched))
    expected = evaluation.rewards.score(images, [p.text for p in PROMPTS], [p.metadata for p in PROMPTS])
    shares: list[Tensor] = []

    def on_rank(number: int, gather: Any) -> Any:
        monkeypatch.setattr(pcpo_fast.training.heldout, "rank", lambda: number)
        monkeypatch.setattr(pcpo_fast.training.heldout, "world_size", lambda: ranks)
        monkeypatch.setattr(pcpo_fast.training.heldout, "gather_rows", gather)
        return evaluation._score(images, PROMPTS)

    def collect(rows: Tensor) -> Tensor:
        shares.append(rows)
        return rows

    for number in range(ranks):
        on_rank(number, collect)
    assert len({share.shape for share in shares}) == 1  # a gather needs equal shares
    for number in range(ranks):
        scores = on_rank(number, lambda _: torch.cat(shares))
        assert torch.equal(scores.total, expected.total)
        assert list(scores.components) == ["test_heldout:numbers", "jpeg_compressibility"]
        for name, part in expected.components.items():
            assert torch.equal(scores.components[name], part)


def test_shown_images_are_one_of_each_prompt_first(tmp_path: Path) -> None:
    shown = heldout(tmp_path, images_per_prompt=4)
    assert len(shown.captions) == SHOWN
    assert shown.captions == [prompt.text for _ in range(4) for prompt in PROMPTS][:SHOWN]
    assert shown._shown()[:6] == [0, 4, 8, 12, 16, 1]
    assert heldout(tmp_path).captions == [prompt.text for prompt in PROMPTS]


def test_first_images_are_kept_and_replaced(tmp_path: Path) -> None:
    kept = heldout(tmp_path / "before")
    assert kept.first() is None
    kept.last = torch.rand(3, 3, 4, 6)
    kept.keep_as_first()
    first = kept.first()
    assert first is not None
    torch.testing.assert_close(first, kept.last, rtol=0, atol=0.51 / 255)
    kept.last = torch.zeros(2, 3, 4, 6)
    kept.keep_as_first()
    assert torch.equal(kept.first(), kept.last)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_prompt", [2, 3, 5])
def test_diversity_is_the_mean_distance_of_a_prompts_images(per_prompt: int) -> None:
    images = torch.rand(4 * per_prompt, 3, 5, 7)
    of_prompts = []
    for prompt in range(4):
        group = images[prompt * per_prompt : (prompt + 1) * per_prompt].double()
        squares = [((one - other) ** 2).mean() for one, other in combinations(group, 2)]
        of_prompts.append(float(torch.stack(squares).mean().sqrt()))
    assert mean_pixel_diversity(images, per_prompt) == pytest.approx(sum(of_prompts) / 4, rel=1e-12)
    assert mean_pixel_diversity(images[:1].expand(2, -1, -1, -1), 2) == 0
    assert mean_pixel_diversity(torch.stack((torch.zeros(3, 2, 2), torch.ones(3, 2, 2))), 2) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2])
def test_diversity_is_a_metric_where_a_prompt_has_several_images(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(5 * count, 3, 4, 4)
    monkeypatch.setattr(pcpo_fast.training.heldout, "generate", lambda *_: images)
    metrics, _ = heldout(tmp_path, images_per_prompt=count).evaluate()
    assert metrics.get("heldout/diversity") == (None if count == 1 else pytest.approx(mean_pixel_diversity(images, 2)))
