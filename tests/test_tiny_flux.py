"""The shipped tiny FLUX pipeline: complete, small, loadable by plain diffusers, and really trained."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from pcpo_fast.rewards.caption_match import caption_match, measure_scenes
from pcpo_fast.scenes import heldout_captions, train_captions

ASSETS = Path(__file__).parent.parent / "assets"
FOLDER = ASSETS / "tiny-flux"


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sample(pipeline: FluxPipeline, captions: list[str], seed: int, **options: object) -> Tensor:
    settings = {"num_inference_steps": 12, "guidance_scale": 3.5, "max_sequence_length": 16} | options
    generator = torch.Generator().manual_seed(seed)
    return pipeline(captions, height=32, width=32, generator=generator, output_type="pt", **settings).images.float()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """assets/make_tiny_flux.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("make_tiny_flux", ASSETS / "make_tiny_flux.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def share(part: Tensor) -> float:
    return part.float().mean().item()


def test_folder_is_small_and_complete() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    weights = {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for part in weights | {"tokenizer", "tokenizer_2", "scheduler"}:
        assert index[part][0] in ("diffusers", "transformers") and (FOLDER / part).is_dir()
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == weights
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in json.loads(path.read_text())]


def test_parts_are_configured_like_flux_dev(pipeline: FluxPipeline) -> None:
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 3.0 and not pipeline.scheduler.config.use_dynamic_shifting
    assert pipeline.transformer.config.guidance_embeds and pipeline.transformer.config.in_channels == 32
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    # Without a dtype asked for, nothing may come out in mixed precision.
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for part in parts for p in part.parameters())


def test_every_caption_is_tokenized_word_by_word(pipeline: FluxPipeline) -> None:
    for caption in train_captions() + heldout_captions():
        clip, t5 = pipeline.tokenizer(caption).input_ids, pipeline.tokenizer_2(caption).input_ids
        assert len(clip) == 9 and len(t5) == 8  # seven words with a start and an end, with an end
        assert pipeline.tokenizer.decode(clip, skip_special_tokens=True) == caption
        assert pipeline.tokenizer_2.decode(t5, skip_special_tokens=True) == caption
        assert pipeline.tokenizer_2.unk_token_id not in t5


# The transformer reads all 512 text tokens of the pipeline's default, so that case takes fewer images and steps.
@pytest.mark.parametrize(("length", "seeds", "steps"), [(16, 4, 12), (512, 2, 4)])
def test_heldout_captions_come_out_right(pipeline: FluxPipeline, length: int, seeds: int, steps: int) -> None:
    captions = heldout_captions()
    options = {"num_inference_steps": steps, "max_sequence_length": length}
    images = torch.cat([sample(pipeline, captions, seed, **options) for seed in range(seeds)])
    found = measure_scenes(images, captions * seeds)
    assert share(found.background) >= 0.95
    assert share(found.color) >= 0.75
    assert share(found.shape) >= 0.5  # four shapes; a guess is right in a quarter


def test_default_sequence_length_is_512(pipeline: FluxPipeline) -> None:
    """The long case above is what a user gets who names no length."""
    captions = heldout_captions()[:2]
    plain = pipeline(
        captions,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert torch.equal(plain, sample(pipeline, captions, 0, num_inference_steps=2, max_sequence_length=512))


def test_captions_matter_and_guidance_is_ignored(pipeline: FluxPipeline) -> None:
    captions = heldout_captions()
    images = sample(pipeline, captions, 0, num_inference_steps=6)
    matched = caption_match(images, captions, [{}] * 32).mean()
    shuffled = caption_match(images, captions[5:] + captions[:5], [{}] * 32).mean()
    assert matched > shuffled + 0.3
    for guidance in (1.0, 6.0):
        other = sample(pipeline, captions, 0, num_inference_steps=6, guidance_scale=guidance)
        assert (other - images).abs().mean() < 0.05


def test_reinforcement_learning_has_room(pipeline: FluxPipeline) -> None:
    """With the demo's six steps the reward starts well above chance and can still rise by more than 0.10."""
    captions = train_captions()[::4]
    reward = caption_match(sample(pipeline, captions, 1, num_inference_steps=6), captions, [{}] * len(captions)).mean()
    assert 0.5 < reward < 0.86


def test_half_precision_works_when_asked_for() -> None:
    loaded = FluxPipeline.from_pretrained(FOLDER, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    captions = heldout_captions()
    found = measure_scenes(sample(loaded, captions, 0), captions)
    assert share(found.background) >= 0.9 and share(found.color) >= 0.7


@pytest.mark.parametrize("name, captions", [("train", train_captions()), ("heldout", heldout_captions())])
def test_prompt_files_are_the_split(name: str, captions: list[str]) -> None:
    assert (ASSETS / "prompts" / f"scenes_{name}.txt").read_text(encoding="utf-8").splitlines() == captions


def test_the_script_builds_what_is_shipped(script: ModuleType, pipeline: FluxPipeline) -> None:
    """Same architecture, vocabulary and scheduler, so the shipped weights can come from this script."""
    built = script.assemble(script.build_vae(), script.build_text_and_transformer(*script.build_tokenizers()))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        shapes = [
            {name: value.shape for name, value in getattr(one, part).state_dict().items()} for one in (built, pipeline)
        ]
        assert shapes[0] == shapes[1]
    assert built.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    assert built.tokenizer_2.get_vocab() == pipeline.tokenizer_2.get_vocab()
    configs = [
        {key: value for key, value in one.scheduler.config.items() if not key.startswith("_")}
        for one in (built, pipeline)
    ]
    assert configs[0] == configs[1]


def test_interrupted_training_goes_on_as_if_nothing_had_happened(script: ModuleType, tmp_path: Path) -> None:
    def train(folder: Path, fail_at: int | None) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        modules = torch.nn.ModuleDict({"line": torch.nn.Linear(3, 2)})

        def loss_of_step(step: int) -> Tensor:
            if step == fail_at:
                raise KeyboardInterrupt
            return modules["line"](torch.randn(8, 3)).square().mean()

        settings = {"steps": 12, "rate": 0.1, "weight_decay": 0.1, "warm_up": 3, "average": 0.9, "seed": 4}
        return script.train("toy", modules, loss_of_step, folder=folder, save_seconds=0.0, **settings)

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", 7)
    resumed = train(tmp_path / "broken", None)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_text_lengths_of_training_reach_the_default(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [script.draw_length(script.Plan(), generator) for _ in range(2000)]
    lengths = [length for length, _ in drawn]
    assert min(lengths) == 8 and lengths.count(512) > 60 and sum(16 < length < 512 for length in lengths) > 120
    assert all(16 <= count <= 128 and count * (length + 16) <= 128 * 80 for length, count in drawn)
