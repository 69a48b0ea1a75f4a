"""``sample``, ``export`` and ``report``: what a run is good for afterwards."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import (
    Run,
    call,
    euler_table,
    images_of,
)
from PIL import Image
from tiny_pipeline import PROMPTS

from pcpo_fast import __version__
from pcpo_fast.config.loading import load_config
from pcpo_fast.policies.families import load_policy
from pcpo_fast.rollout.generation import generate
from pcpo_fast.runs.manifest import write_manifest

pytest_plugins = ["cli_fixtures"]
Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


# sample


def test_sample_from_a_run(full: Run, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("sample", "--run", full.folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--count", "3")
    output, folder = tmp_path / "new" / "grid.png", tmp_path / "single"
    rewards = ("--reward", "jpeg_compressibility", "--reward", "tiny_pipeline:redness")
    answer = call(capsys, *arguments, *rewards, "--json", "--output", output, "--folder", folder)
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert (result["output"], result["prompts"], result["seed"]) == (str(output), list(PROMPTS[:2]), 0)
    assert len(result["images"]) == 6
    with Image.open(output) as image:
        image.verify()
    red = result["rewards"]["tiny_pipeline:redness"]
    assert len(red["scores"]) == 6 and red["mean"] == pytest.approx(np.mean(red["scores"]))
    pixels = np.asarray(Image.open(result["images"][4]), dtype=np.float64) / 255
    assert pixels.shape == (16, 24, 3)
    assert red["scores"][4] == pytest.approx(pixels[..., 0].mean() - pixels[..., 1:].mean(), abs=2e-3)
    assert json.loads((folder / "prompts.json").read_text()) == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3

    plain = call(capsys, *arguments, "--output", tmp_path / "again.png")
    assert plain.out == f"Images: {tmp_path / 'again.png'}\n"


def test_sample_shows_the_trained_weights(full: Run, pipeline_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    def pixels(name: str, *source: str | Path) -> np.ndarray:
        arguments = (
            "--prompt",
            PROMPTS[0],
            "--count",
            "1",
            "--output",
            tmp_path / "grid.png",
            "--folder",
            tmp_path / name,
        )
        assert call(capsys, "sample", *source, *arguments).code == 0
        return np.asarray(Image.open(tmp_path / name / "00000.png"), dtype=int)

    base, trained = pixels("base", "--config", full.config), pixels("trained", "--run", full.folder)
    again = pixels("again", "--run", full.folder, "--batch-size", "1")
    assert (trained == again).all()
    assert abs(base - trained).max() > 2
    assert abs(trained - pixels("noisy", "--run", full.folder, "--stochastic")).max() > 2
    assert abs(trained - pixels("steps", "--run", full.folder, "--steps", "8")).max() > 0
    moved = tmp_path / "moved"
    shutil.copytree(full.folder, moved, ignore=shutil.ignore_patterns("checkpoints"))
    assert (pixels("moved-images", "--run", moved) == trained).all()


def test_sample_from_a_lora_run_and_a_prompt_file(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    prompts = lora.config.parent / "heldout.jsonl"
    arguments = ("--prompts", prompts, "--count", "1", "--seed", "1000003", "--output", tmp_path / "grid.png")
    answer = call(capsys, "sample", "--run", lora.folder, *arguments, "--folder", tmp_path / "images")
    assert answer.code == 0, answer.err
    policy, table, device = lora.policy, euler_table(lora), torch.device("cpu")
    expected = generate(policy, list(PROMPTS[2:]), 1, table, 1000003, 2).to(device)
    for index, image in enumerate(expected):
        shown = np.asarray(Image.open(tmp_path / "images" / f"{index:05d}.png"), dtype=np.float64) / 255
        assert np.abs(shown - image.permute(1, 2, 0).numpy()).max() < 0.51 / 255 + 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", "0"), "--count: must be at least 1, got 0"),
        (("--batch-size", "0"), "--batch-size: must be at least 1, got 0"),
        (("--seed", "-1"), "--seed: must be between 0 and 2^63 - 1, got -1"),
        (("--steps", "1"), "sampler.steps: must be at least 2, got 1"),
        (("--output", "x.bmp"), "--output: x.bmp must end in .png, .jpg or .webp"),
        (("--reward", "beauty"), "unknown reward 'beauty'"),
        (("--run", "nowhere"), "--run: nowhere is not a run directory"),
        (("sampler.noise=x",), "sampler.noise: must be a number"),
    ],
)
def test_sample_refuses(arguments: tuple[str, ...], words: str, full: Run, capsys: Capture) -> None:
    source = () if "--run" in arguments else ("--run", str(full.folder))
    answer = call(capsys, "sample", *source, "--prompt", "a", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert words in answer.err


def test_sample_without_an_export_says_how_to_get_one(full: Run, tmp_path: Path, capsys: Capture) -> None:
    shutil.copy(full.folder / "config.yaml", tmp_path)
    answer = call(capsys, "sample", "--run", tmp_path, "--prompt", "a")
    assert answer.code == 2
    assert f"has no exported weights yet; write them with: pcpo-fast export {tmp_path}" in answer.err


# export


def test_exported_lora_makes_the_trained_policys_images_in_diffusers(lora: Run, pipeline_folder: Path) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    base = images_of(pipeline.transformer, pipeline, lora)
    assert (base - lora.images).abs().max() > 0.02  # the training changed what there is to see
    pipeline.load_lora_weights(lora.folder / "export")
    torch.testing.assert_close(images_of(pipeline.transformer, pipeline, lora), lora.images, rtol=0, atol=1e-5)


def test_exported_lora_merged_into_a_pipeline(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    from diffusers import FluxPipeline

    target = tmp_path / "merged"
    answer = call(capsys, "export", lora.folder, "--pipeline", "--output", target, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"output": str(target), "kind": "pipeline", "epoch": 2}
    pipeline = FluxPipeline.from_pretrained(target)
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())
    torch.testing.assert_close(images_of(pipeline.transformer, pipeline, lora), lora.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "dtype", "name"),
    [
        ((), torch.bfloat16, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        (("--dtype", "float32"), torch.float32, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        (("--format", "kohya"), torch.bfloat16, "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        (("--dtype", "float16", "--format", "comfyui"), torch.float16, "transformer.single_transformer_blocks.0"),
    ],
)
def test_an_exported_lora_starts_the_same_images(
    lora: Run, tmp_path: Path, capsys: Capture, options: tuple[str, ...], dtype: torch.dtype, name: str
) -> None:
    """Rank 2 and alpha 6, in any format: the settings of the run that starts from it are its own."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    answer = call(capsys, "export", lora.folder, "--output", tmp_path / "lora", *options)
    assert answer.code == 0, answer.err
    [file] = (tmp_path / "lora").glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o644
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["base_model"] == Path(load_config(lora.config).model.path).name
    assert about["pcpo_fast_version"] == __version__ and "tiny_pipeline:redness" in about["reward"]
    state = load_file(file)
    assert any(key.startswith(name) for key in state)
    assert {value.dtype for key, value in state.items() if not key.endswith(".alpha")} == {dtype}
    policy = load_policy(load_config(lora.config, [f"model.lora.init={file.parent}", "model.lora.alpha=7"]), CPU)
    with torch.no_grad():
        made = generate(policy, list(PROMPTS[2:]), 1, euler_table(lora), load_config(lora.config).evaluation.seed, 2)
    torch.testing.assert_close(made, lora.images, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_runs_own_export_keeps_the_precision_that_sampling_reads(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    run = tmp_path / "run"
    shutil.copytree(lora.folder, run)
    [before] = map(load_file, (run / "export").glob("*.safetensors"))
    assert call(capsys, "export", run).code == 0
    [after] = map(load_file, (run / "export").glob("*.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_lora_that_an_older_version_wrote_keeps_its_strength(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    """There the scale stood in diffusers' metadata alone."""
    from safetensors.torch import load_file, save_file

    assert call(capsys, "export", lora.folder, "--output", tmp_path / "new", "--dtype", "float32").code == 0
    run = tmp_path / "run"
    shutil.copytree(lora.folder, run)
    [weights] = run.glob("checkpoints/epoch_000002/weights/*.safetensors")
    old = {key: value / 3 if "lora_B" in key else value for key, value in load_file(weights).items()}
    packed = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6.0})
    save_file(old, weights, {"format": "pt", "lora_adapter_metadata": packed})
    write_manifest(run / "checkpoints" / "epoch_000002")
    for names in ("diffusers", "kohya"):
        target = tmp_path / names
        answer = call(capsys, "export", run, "--output", target, "--format", names, "--dtype", "float32")
        assert answer.code == 0, answer.err
    expected, found = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "new", tmp_path / "diffusers")
    )
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert "lora_unet_single_blocks_0_linear1.alpha" in load_file(
        tmp_path / "kohya" / "pytorch_lora_weights.safetensors"
    )


def test_exported_transformer_is_the_trained_one(
    full: Run, pipeline_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    answer = call(capsys, "export", full.folder, "--output", tmp_path / "new" / "weights")
    assert answer.code == 0, answer.err
    assert answer.out == f"transformer after 2 epochs: {tmp_path / 'new' / 'weights'}\n"
    base = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer").state_dict()
    for folder in (full.folder / "export", tmp_path / "new" / "weights"):
        loaded = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
        trained = full.policy.network.state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[name], trained[name]) for name in trained)
        assert any(not torch.equal(loaded[name], base[name]) for name in trained)
    answer = call(capsys, "export", full.folder, "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert answer.code == 0, answer.err
    [file] = (tmp_path / "half" / "transformer").glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o644
    half = FluxTransformer2DModel.from_pretrained(tmp_path / "half", subfolder="transformer", dtype=torch.bfloat16)
    assert all(torch.equal(value, trained[name].bfloat16()) for name, value in half.state_dict().items())
    answer = call(capsys, "export", full.folder, "--pipeline", "--output", tmp_path / "pipeline")
    assert answer.code == 0, answer.err
    pipeline = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(images_of(pipeline.transformer, pipeline, full), full.images, rtol=0, atol=1e-5)


def test_export_of_an_earlier_epoch_a_checkpoint_and_the_default_folders(
    copy_of_full: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of_full.folder
    shutil.rmtree(run / "export")
    assert json.loads(call(capsys, "export", run, "--epoch", "1", "--json").out)["epoch"] == 1
    weights = "transformer/diffusion_pytorch_model.safetensors"
    first = (run / "export" / weights).read_bytes()
    assert first == (run / "checkpoints" / "epoch_000001" / "weights" / weights).read_bytes()
    monkeypatch.chdir(run / "checkpoints")
    answer = call(capsys, "export", "epoch_000002")  # replaces the earlier export
    assert answer.code == 0, answer.err
    assert (run / "export" / weights).read_bytes() != first
    answer = call(capsys, "export", run, "--pipeline")
    assert answer.out == f"pipeline after 2 epochs: {run / 'pipeline'}\n"
    assert (run / "pipeline" / "model_index.json").is_file()
    assert {path.name for path in (run / "export").iterdir()} == {
        "transformer",
        "provenance.json",
        "README.md",
        "samples.png",
    }
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere is not a run directory: the folder does not exist"),
        (("{run}/images",), "has no complete checkpoint"),
        (("{run}", "--epoch", "7"), "has no checkpoint after 7 epochs; it has 1, 2"),
        (("{run}/checkpoints/epoch_000001", "--epoch", "1"), "is a single checkpoint; give its run directory"),
        (("{run}", "--output", "{run}/images"), "is not an empty folder; choose another one or remove it"),
        (("{run}", "--output", "{run}/config.yaml"), "is not an empty folder"),
        (("{run}", "--output", "{run}/config.yaml/x"), "cannot be written"),
        (
            ("{run}", "--format", "kohya"),
            "--format kohya: only applies to LoRA files, but this is a full",
        ),
        (("{run}", "--format", "kohya", "--pipeline"), "but this is a whole pipeline"),
    ],
)
def test_export_refuses(arguments: tuple[str, ...], words: str, full: Run, capsys: Capture) -> None:
    answer = call(capsys, "export", *(argument.format(run=full.folder) for argument in arguments))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert words in answer.err


# report


def test_report_is_written_again(copy_of_full: Run, capsys: Capture) -> None:
    report = copy_of_full.folder / "report.html"
    report.unlink()
    assert call(capsys, "report", copy_of_full.folder).out == f"Report: {report}\n"
    assert report.is_file()
    result = json.loads(call(capsys, "report", copy_of_full.folder, "--json").out)
    assert result["report"] == str(report)
    assert result["summary"]["epochs"] == 2


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir(), lambda folder: folder.write_text("")]
)
def test_report_refuses_what_is_no_run(make: Any, tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path / "run")
    answer = call(capsys, "report", tmp_path / "run")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ") and "is not a run directory" in answer.err


def test_an_empty_prompt_is_refused(capsys: Capture) -> None:
    answer = call(capsys, "sample", "--prompt", " ")
    assert (answer.code, answer.err) == (2, "error: --prompt: must not be empty\n")
