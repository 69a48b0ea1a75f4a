"""Scenes: the caption grammar, the split, and what the renderer draws."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pcpo_fast.rewards.scenes import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    all_scenes,
    heldout_captions,
    parse_caption,
    render,
    shape_coverage,
    train_captions,
    unit_areas,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_there_are_224_different_captions_and_each_parses_back() -> None:
    scenes = all_scenes()
    assert len(scenes) == len(set(scenes)) == 224
    assert all(parse_caption(scene.caption) == scene for scene in scenes)
    assert parse_caption("a red circle on a blue background") == Scene("red", "circle", "blue")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",
        "a red circle on a red background",
        "a red circle on a pink background",
        "a red hexagon on a blue background",
        "A red circle on a blue background",
        "a red circle on a blue background.",
        "two red circles on a blue background",
        "a blue background on a red circle",
    ],
)
def test_anything_else_is_not_a_scene(text: str) -> None:
    assert parse_caption(text) is None


@given(st.text(alphabet="a redcilonbkgu", max_size=40))
def test_parsing_never_raises(text: str) -> None:
    scene = parse_caption(text)
    assert scene is None or scene.caption == text.strip()


def test_split_is_disjoint_complete_and_fixed() -> None:
    train, heldout = train_captions(), heldout_captions()
    assert len(train) == 192 and len(heldout) == 32
    assert set(train) | set(heldout) == {scene.caption for scene in all_scenes()}
    assert not set(train) & set(heldout)
    assert heldout[:2] == ["a red circle on a green background", "a red square on a yellow background"]


def test_heldout_parts_are_all_seen_in_training_and_balanced() -> None:
    train = [scene for scene in map(parse_caption, train_captions()) if scene]
    heldout = [scene for scene in map(parse_caption, heldout_captions()) if scene]
    for color, shape in itertools.product(COLORS, SHAPES):
        assert sum(s.color == color and s.shape == shape for s in heldout) == 1
        assert sum(s.background == color and s.shape == shape for s in heldout) == 1
        assert sum(s.color == color and s.shape == shape for s in train) == 6
        assert sum(s.background == color and s.shape == shape for s in train) == 6
    pairs = {(s.color, s.background) for s in train}
    assert len(pairs) == 56  # every pair of colors is seen, with other shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_center_of_the_shape(shape: str) -> None:
    radius, x, y = torch.tensor([6.7, 8.0, 9.5]), torch.tensor([15.3, 16.0, 17.2]), torch.tensor([17.1, 16.5, 14.9])
    mask = shape_coverage(shape, x, y, radius)
    assert mask.shape == (3, IMAGE_SIZE, IMAGE_SIZE) and mask.min() == 0 and mask.max() == 1
    area = mask.sum((1, 2))
    # A pixel of half a row on the outline is the error of the signed-distance rule at corners.
    expected = unit_areas()[SHAPES.index(shape)] * radius**2
    assert torch.allclose(area, expected, rtol=0.02)
    grid = torch.arange(IMAGE_SIZE) + 0.5
    assert torch.allclose((mask.sum(1) * grid).sum(1) / area, x, atol=0.1)
    assert torch.allclose((mask.sum(2) * grid).sum(1) / area, y, atol=0.1)


def test_coverage_refuses_an_unknown_shape() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"hexagon.*circle, square"):
        shape_coverage("hexagon", one, one, one)


def test_triangle_points_up_and_cross_has_four_notches() -> None:
    middle, radius = torch.tensor([16.0]), torch.tensor([9.0])
    triangle = shape_coverage("triangle", middle, middle, radius)[0]
    widths = triangle.sum(1)
    assert widths[6] < widths[12] < widths[18] and widths[23] == 0
    cross = shape_coverage("cross", middle, middle, radius)[0]
    assert cross[16, 8] == 1 and cross[8, 16] == 1 and cross[9, 9] == 0
    assert torch.equal(cross, cross.T) and torch.equal(cross, cross.flip(0))


def test_render_draws_the_named_colors_inside_and_outside() -> None:
    scenes = all_scenes()
    images = render(scenes, seeded())
    assert images.shape == (224, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    for image, scene in zip(images, scenes, strict=True):
        # Tints have a standard deviation of 0.02; 5 of those.
        assert (image[:, 0, 0] - torch.tensor(COLORS[scene.background])).abs().max() < 0.1
        assert (image[:, 16, 16] - torch.tensor(COLORS[scene.color])).abs().max() < 0.1
    rim = torch.ones(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    assert (images[:, :, rim] == images[:, :, :1, 0]).all()


def test_render_varies_by_generator_and_only_by_it() -> None:
    scenes = [Scene("red", "circle", "blue")] * 4
    first, again, other = render(scenes, seeded(1)), render(scenes, seeded(1)), render(scenes, seeded(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_render_at_another_size_is_the_same_scene() -> None:
    scenes = all_scenes()[::9]
    small, large = render(scenes, seeded(), 32), render(scenes, seeded(), 128)
    assert large.shape[-1] == 128
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.01


def test_render_of_no_scenes_is_an_empty_batch() -> None:
    assert render([], seeded()).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
