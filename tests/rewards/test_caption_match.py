"""The caption-match reward: true scenes score high, everything else lower, and small improvements count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.caption_match import caption_match, measure_scenes
from pcpo_fast.rewards.scenes import COLORS, SHAPES, Scene, all_scenes, render

SCENES = all_scenes()
CAPTIONS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return render(SCENES, torch.Generator().manual_seed(3))


def score(images: Tensor, scenes: list[Scene]) -> Tensor:
    captions = [scene.caption for scene in scenes]
    return caption_match(images, captions, [{}] * len(captions))


def turned(name: str, by: int, among: list[str], avoid: str = "") -> str:
    chosen = among[(among.index(name) + by) % len(among)]
    return turned(chosen, 1, among, avoid) if chosen == avoid else chosen


def share(part: Tensor) -> float:
    return part.float().mean().item()


def blur(images: Tensor, width: int) -> Tensor:
    kernel = torch.full((3, 1, width, width), 1 / width**2)
    return F.conv2d(F.pad(images, (width // 2,) * 4, mode="replicate"), kernel, groups=3)


def test_true_scenes_score_near_one_and_are_all_measured_right(images: Tensor) -> None:
    scores = score(images, SCENES)
    assert scores.shape == (224,) and scores.dtype == torch.float32
    assert scores.min() > 0.9 and scores.mean() > 0.97 and scores.max() <= 1
    found = measure_scenes(images, CAPTIONS)
    assert found.background.all() and found.color.all() and found.shape.all()


@pytest.mark.parametrize("part", ["background", "color", "shape"])
def test_each_wrong_word_costs_its_share(images: Tensor, part: str) -> None:
    colors, shapes = list(COLORS), list(SHAPES)
    wrong = [
        Scene(
            turned(s.color, 1, colors, s.background) if part == "color" else s.color,
            turned(s.shape, 1, shapes) if part == "shape" else s.shape,
            turned(s.background, 1, colors, s.color) if part == "background" else s.background,
        )
        for s in SCENES
    ]
    scores, found = score(images, wrong), measure_scenes(images, [s.caption for s in wrong])
    share = {"background": 0.25, "color": 0.25, "shape": 0.5}[part]
    assert (score(images, SCENES) - scores).mean() == pytest.approx(share, abs=0.04)
    for name, right in (("background", found.background), ("color", found.color), ("shape", found.shape)):
        assert right.all() if name != part else not right.any()


def test_small_improvements_count(images: Tensor) -> None:
    """From a gray image to the true one, and from a blur to a sharp shape, the mean reward rises at every step."""
    gray = torch.full_like(images, 0.5)
    steps = [score(torch.lerp(gray, images, w), SCENES).mean().item() for w in (0.0, 0.5, 0.7, 0.85, 1.0)]
    assert steps == sorted(steps) and steps[-1] - steps[0] > 0.8
    steps = [score(blur(images, width), SCENES).mean().item() for width in (9, 7, 5, 3, 1)]
    assert steps == sorted(steps) and steps[-1] - steps[0] > 0.2


def test_noise_costs_little_at_first(images: Tensor) -> None:
    noisy = (images + 0.06 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    drop = (score(images, SCENES) - score(noisy, SCENES)).mean()
    assert 0 < drop < 0.02


@pytest.mark.parametrize("trick", ["flat", "no shape", "tiny", "huge", "two", "stripes", "noise", "ring", "half"])
def test_tricks_do_not_pay(images: Tensor, trick: str) -> None:
    """Pictures that are no scene at all stay well below a true scene (0.98)."""
    background, color = images[:, :, :1, :1], images[:, :, 16:17, 16:17]
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    middle = ((x - 15.5) ** 2 + (y - 15.5) ** 2).float().sqrt()
    masks = {
        "no shape": torch.zeros(32, 32),
        "tiny": (middle < 2.5).float(),
        "huge": (middle < 15.5).float(),
        "two": (((x - 8) ** 2 + (y - 15.5) ** 2 < 25) | ((x - 23) ** 2 + (y - 15.5) ** 2 < 25)).float(),
        "stripes": (x // 4 % 2).float(),
        "ring": ((middle > 7) & (middle < 9)).float(),
        "half": (x > 15).float(),
    }
    limits = {"flat": 0.26, "no shape": 0.26, "noise": 0.15, "stripes": 0.55}
    if trick == "noise":
        pictures = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    elif trick == "flat":
        pictures = color.expand_as(images)
    else:
        pictures = torch.lerp(background, color, masks[trick])
    assert score(pictures, SCENES).mean() < limits.get(trick, 0.7)


def test_a_blob_between_the_shapes_earns_half_of_the_shape_at_most() -> None:
    """A rounded square overlaps circle and square alike by more than 0.9; plain overlap would pay for it in full."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    mask = ((x.abs() ** 3.3 + y.abs() ** 3.3) < 7.2**3.3).float()
    picture = torch.lerp(
        torch.tensor(COLORS["white"])[:, None, None], torch.tensor(COLORS["blue"])[:, None, None], mask
    )
    scores = score(picture.expand(2, -1, -1, -1), [Scene("blue", s, "white") for s in ("circle", "square")])
    assert scores.sum() < 1.0 + 0.55 and scores.max() < 0.85


def test_drifting_colors_cost_before_they_are_taken_for_others(images: Tensor) -> None:
    drifted = torch.lerp(images, torch.full_like(images, 0.5), 0.35)
    found = measure_scenes(drifted, CAPTIONS)
    assert share(found.background) > 0.9 and share(found.color) > 0.9
    assert (score(images, SCENES) - score(drifted, SCENES)).mean() > 0.05


def test_an_exaggerated_shape_earns_less_than_a_true_one() -> None:
    """A square with hollow sides is less of a circle than a true square is; the comparison alone would prefer it."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    square = torch.maximum(x.abs(), y.abs()) < 7
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    hollow = square & ((far - 12) ** 2 + near**2 > 49)
    ends = torch.tensor([COLORS["white"], COLORS["blue"]])[:, :, None, None]
    pictures = torch.lerp(ends[:1], ends[1:], torch.stack([square, hollow]).float()[:, None])
    true, exaggerated = score(pictures, [Scene("blue", "square", "white")] * 2).tolist()
    assert measure_scenes(pictures, ["a blue square on a white background"] * 2).shape.all()
    assert true > exaggerated + 0.03


def test_any_image_size_scores_alike(images: Tensor) -> None:
    scenes = SCENES[::7]
    small = score(render(scenes, torch.Generator().manual_seed(1), 32), scenes)
    for size in (64, 48, 100, 16):
        other = score(render(scenes, torch.Generator().manual_seed(1), size), scenes)
        assert (other - small).abs().mean() < (0.12 if size == 16 else 0.03)


def test_rows_are_judged_alone(images: Tensor) -> None:
    together = caption_match(images[:8], CAPTIONS[:8], [{}] * 8)
    alone = torch.cat([caption_match(images[i : i + 1], CAPTIONS[i : i + 1], [{}]) for i in range(8)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    assert caption_match(images[:0], [], []).shape == (0,)


def test_half_precision_and_values_out_of_range_are_accepted(images: Tensor) -> None:
    plain = score(images, SCENES)
    assert (score(images.to(torch.bfloat16), SCENES) - plain).abs().max() < 0.02
    assert torch.isfinite(score(images * 40 - 20, SCENES)).all()


def test_a_prompt_that_is_no_scene_is_named(images: Tensor) -> None:
    captions = [*CAPTIONS[:2], "a photo of a cat"]
    for judge in (lambda: caption_match(images[:3], captions, [{}] * 3), lambda: measure_scenes(images[:3], captions)):
        with pytest.raises(UserError, match=r"caption_match.*'a photo of a cat'.*red, green"):
            judge()


def test_wrong_shapes_are_refused(images: Tensor) -> None:
    for wrong in (images[:2], images[:3, :1], images[0]):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            caption_match(wrong, CAPTIONS[:3], [{}] * 3)
