"""Parts of an evaluation by themselves: what is compared, features, intervals, matching."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import write_clip, write_dinov2
from evaluation_runs import evaluated_run, fake_run  # noqa: F401 - a fixture
from PIL import Image

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.candidates import read_candidates
from pcpo_fast.evaluation.features import IMAGENET, ClipImages, DinoV2, resized_batch
from pcpo_fast.evaluation.intervals import over_prompts
from pcpo_fast.evaluation.matching import match
from pcpo_fast.files.content import digest, weights_digest
from pcpo_fast.reporting.statistics import mean
from pcpo_fast.reporting.tables import number_text
from pcpo_fast.rewards.preprocessing import CLIP_MEAN, CLIP_STD

CPU = torch.device("cpu")


def test_every_kind_of_checkpoint_is_recognised(
    evaluated_run: Path,  # noqa: F811
    pipeline_folder: Path,
    tmp_path: Path,
) -> None:
    export = Path(shutil.copytree(evaluated_run / "export", tmp_path / "moved"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    texts = ["base", f"t={evaluated_run}@0,0.5,...,1.5", str(evaluated_run / "export"), str(export)]
    texts += [str(pipeline_folder), f"old={tmp_path / 'images'}", "someone/model"]
    found = read_candidates(texts, str(evaluated_run / "config.yaml"), ["sampler.steps=3"])
    assert [one.name for one in found] == [
        *("base", "t@0", "t@0.5", "t@1", "t@1.5", "export", "moved", "pipeline", "old", "model")
    ]
    assert [one.kind for one in found] == ["base", *["run"] * 6, "pipeline", "images", "pipeline"]
    assert [one.weights for one in found[5:7]] == [evaluated_run / "export", export]
    assert {one.config.sampler.steps for one in found if one.config is not None} == {3}
    assert found[7].config is not None and found[7].config.model.path == str(pipeline_folder)


def test_a_checkpoint_of_a_run_is_its_weights_at_that_time(pipeline_folder: Path, tmp_path: Path) -> None:
    run = fake_run(tmp_path, pipeline_folder)
    checkpoint = run / "checkpoints" / "epoch_00001"
    shutil.copytree(run / "export", checkpoint / "weights")
    (checkpoint / "state.json").write_text("{}", encoding="utf-8")
    (one,) = read_candidates([str(checkpoint)], None, [])
    assert (one.kind, one.name, one.weights) == ("run", "epoch_00001", checkpoint / "weights")


def test_runs_of_another_base_model_are_refused(
    evaluated_run: Path,  # noqa: F811
    pipeline_folder: Path,
    tmp_path: Path,
) -> None:
    other = fake_run(tmp_path, pipeline_folder, model__guidance=2.0)
    with pytest.raises(UserError, match=r"model\.guidance is 2\.0 here and 3\.5"):
        read_candidates([f"a={evaluated_run}", f"b={other}"], None, [])
    assert len(read_candidates([f"a={evaluated_run}", f"b={other}"], None, ["model.guidance=1.0"])) == 2


def test_a_digest_changes_with_the_content_only(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(bytes(8 << 20))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    with (tmp_path / "b" / "x.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


# Features


def as_bytes(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width)).float() / 255


def test_dinov2_sees_what_the_published_code_shows_it(tmp_path: Path) -> None:
    """Pillow's bicubic stretch of the 8-bit image to 224 x 224, ImageNet's normalisation, the class token."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(write_dinov2(tmp_path / "dinov2")).eval()
    images = [random_image(40, 64), random_image(300, 250), random_image(224, 224)]
    found = DinoV2(str(tmp_path / "dinov2"), CPU)(images)["dinov2"]
    mean_, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    inputs = []
    for image in images:
        resized = as_bytes(image).resize((224, 224), Image.Resampling.BICUBIC)
        inputs.append((torch.from_numpy(np.asarray(resized, dtype=np.float32)).permute(2, 0, 1) / 255 - mean_) / std)
    with torch.no_grad():
        state = model(pixel_values=torch.stack(inputs)).last_hidden_state
    # Pillow filters rows, rounds, then filters columns: some pixels differ by one level.
    assert float((found - state[:, 0]).abs().max()) < 0.02 * float(state[:, 0].std())


def test_clip_sees_what_the_published_code_shows_it(tmp_path: Path) -> None:
    """A bicubic stretch in floating point, as Pillow makes of a 32-bit image and JAX of an array; unit length."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(write_clip(tmp_path / "clip")).eval()
    images = [random_image(40, 64), random_image(100, 90), random_image(32, 32), random_image(20, 24)]
    found = ClipImages(str(tmp_path / "clip"), CPU)(images)["clip"]
    inputs = []
    for image in images:
        channels = [
            np.asarray(Image.fromarray(channel.numpy(), mode="F").resize((32, 32), Image.Resampling.BICUBIC))
            for channel in image
        ]
        inputs.append(torch.from_numpy(np.stack(channels)))
    torch.testing.assert_close(resized_batch(images, 32, to_bytes=False), torch.stack(inputs), rtol=0, atol=1e-5)
    mean_, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=(torch.stack(inputs) - mean_) / std).pooler_output
        expected = torch.nn.functional.normalize(model.visual_projection(pooled), dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_wrong_and_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="is a model of type clip; allowed: dinov2"):
        DinoV2(str(folder), CPU)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks visual_projection\.weight"):
        ClipImages(str(folder), CPU)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipImages(str(folder), CPU)


# Intervals and matching


def test_interval_of_a_mean_is_that_of_the_means_of_the_prompts() -> None:
    values = torch.randn(40, 3).double()
    flat = values.flatten().numpy()
    found = over_prompts(lambda rows: float(flat[rows].mean()), 40, 3, 4000)
    known = mean(values.mean(dim=1).tolist())
    assert found.value == pytest.approx(known.value, rel=1e-12)
    assert known.low is not None and known.high is not None and found.low is not None and found.high is not None
    # A quantile of 4000 draws wanders by about 3 % of the interval.
    assert found.high - found.low == pytest.approx(known.high - known.low, rel=0.1)


def test_interval_of_a_biased_statistic_holds_the_estimate() -> None:
    """Repeated rows raise this one, as they raise a distance: the plain percentiles lie above the value."""

    def distinct(rows: np.ndarray) -> float:
        return -float(len(set(rows.tolist())))

    found = over_prompts(distinct, 20, 2, 500)
    assert found.value == -40
    assert found.low is not None and found.high is not None and found.low < -40 < found.high
    assert found == over_prompts(distinct, 20, 2, 500)


def test_no_interval_without_resamples_or_from_one_prompt() -> None:
    for prompts, resamples in ((5, 0), (1, 100)):
        found = over_prompts(lambda rows: float(len(rows)), prompts, 3, resamples)
        assert (found.value, found.low, found.high) == (3 * prompts, None, None)


def test_distances_at_the_highest_reward_that_all_reach() -> None:
    curves = {"a": [(0.0, 0.0), (1.0, 10.0)], "b": [(0.0, 0.0), (0.5, 2.0), (0.8, 8.0)]}
    found = match("r", "fid", curves)
    assert found is not None and found.level == 0.8
    assert found.at == {"a": pytest.approx(8.0), "b": 8.0}
    curves["c"] = [(0.0, 1.0), (0.25, 3.0)]
    found = match("r", "fid", curves)
    assert found is not None and found.at == {"a": 2.5, "b": 1.0, "c": 3.0}


def test_curves_that_cannot_be_matched() -> None:
    assert match("r", "fid", {"a": [(0.0, 1.0)]}) is None
    assert match("r", "fid", {"a": [(0.9, 5.0)], "b": [(0.0, 0.0), (0.5, 1.0)]}) is None  # a begins above all of b


def test_numbers_are_written_to_be_read() -> None:
    assert [number_text(x) for x in (0, 0.12341, 1.23456, 12.3456, 543.21, 1e7, 1e-5, 0.001234, -0.0001564)] == [
        *("0", "0.1234", "1.235", "12.35", "543.2", "1.00e+07", "1.00e-05", "0.0012", "-0.000156")
    ]
    assert number_text(0.5, signed=True) == "+0.5000" and number_text(-0.5, signed=True) == "-0.5000"


def test_rewards_are_chosen_by_name_or_label_with_the_options_of_the_configuration() -> None:
    from pcpo_fast.interface.configuration import reward_configs

    listed = (
        "[{name: remote, label: one, options: {url: 'http://a'}}, {name: remote, label: two}, {name: caption_match}]"
    )
    config = load_config(None, [f"rewards={listed}"])

    def chosen(*names: str) -> list[tuple[str, dict[str, Any]]]:
        return [(one.column, one.options) for one in reward_configs(names, config.rewards)]

    assert chosen() == []
    assert chosen("two", "jpeg_compressibility") == [("two", {}), ("jpeg_compressibility", {})]
    assert chosen("remote", "one") == [("one", {"url": "http://a"}), ("two", {})]
