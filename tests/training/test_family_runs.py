"""Runs of the families from the beginning to the end, through the command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Run, call, finished_run, records, write_config
from safetensors.torch import load_file
from tested_families import FIXTURES, Family
from tiny_pipeline import PROMPTS
from tiny_pipelines import NEGATIVE

Capture = pytest.CaptureFixture[str]
GUIDED: dict[str, Any] = {"model__cfg_scale": 3.0, "model__negative_prompt": NEGATIVE}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd": GUIDED
    | {"sampler__name": "ddim", "sampler__noise": 1.0, "credit__rule": "uniform"}
    | {"model__finetune": "lora", "model__lora": {"rank": 2, "alpha": 6.0}, "optimizer__lr": 3e-2},
    "sd3": GUIDED
    | {"algorithm": "flow_grpo", "sampler__name": "flow", "credit__kl_coefficient": 0.04, "credit__kl": "published"},
    "klein": GUIDED
    | {"algorithm": "flow_grpo", "sampler__name": "flow", "credit__kl_coefficient": 0.04, "credit__kl": "published"}
    | {"model__finetune": "lora", "model__lora": {"rank": 2, "alpha": 6.0}, "optimizer__lr": 3e-2},
}
SETTINGS["flux3"] = SETTINGS["krea2"] = SETTINGS["z_image"] = SETTINGS["klein"]
SETTINGS["qwen_image"] = {key: value for key, value in SETTINGS["klein"].items() if key not in GUIDED}  # not trained so
SETTINGS["flux2_dev"] = SETTINGS["qwen_image"] | {"model__guidance": 3.0}


SLOW = [
    pytest.param(one, marks=pytest.mark.slow)
    for one in ("sd3", "flux3", "klein", "flux2_dev", "krea2", "qwen_image", "z_image")
]


@pytest.fixture(scope="module", params=("sd", *SLOW))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(name: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(FIXTURES[name])
    return folder


@pytest.fixture(scope="module")
def finished(name: str, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA on Stable Diffusion 1.x with PCPO's uniform credit; Flow-GRPO with its KL on all of Stable Diffusion 3, and
    with LoRA on FLUX.2-klein.
    """
    return finished_run(tmp_path_factory.mktemp(name), pipeline, **SETTINGS[name])


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "time" and not key.startswith(("time/", "throughput"))}


def test_a_run_trains_and_says_what_it_did(name: str, finished: Run) -> None:
    lines = records(finished.folder)
    assert [line["kind"] for line in lines] == ["evaluation", *(["update"] * 2 + ["epoch", "evaluation"]) * 2]
    updates = [line for line in lines if line["kind"] == "update"]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str)), line
    assert [line["policy/log_ratio_abs"] > 0 for line in updates] == [False, True] * 2
    assert all(line["policy/grad_norm"] > 0 and line["policy/skipped_updates"] == 0 for line in updates)
    assert all(line["rollout/mismatch_output"] < 1e-4 for line in lines if line["kind"] == "epoch")
    assert ("policy/kl" in updates[1]) == (name != "sd")
    before, after = (lines[i]["heldout/reward/mean"] for i in (0, -1))
    assert before != after
    credit = json.loads((finished.folder / "credit.json").read_text())
    assert credit["trained_steps"] == [0, 1, 2]
    if name == "sd":
        assert (credit["sampler"], credit["rule"]) == ("ddim", "uniform")
        assert len(set(credit["used"][:3])) == 1 and credit["used"][3] == 0
        assert credit["times"] == [0.751, 0.501, 0.251, 0.001, 0.0]
    else:
        assert (credit["sampler"], credit["rule"]) == ("flow", "native")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, pipeline: Path, finished: Run, tmp_path: Path, capsys: Capture
) -> None:
    config = write_config(tmp_path, pipeline, **SETTINGS[name])
    for epochs in (1, 2):
        answer = call(capsys, "train", "--config", config, f"train.epochs={epochs}")
        assert (answer.code, answer.err) == (0, "")
    assert "Resuming after epoch 1" in answer.out
    resumed, whole = ([numbers(line) for line in records(run)] for run in (tmp_path / "run", finished.folder))
    assert resumed == whole
    files = sorted(path.relative_to(finished.folder) for path in finished.folder.glob("export/**/*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(tmp_path / "run" / file), load_file(finished.folder / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_an_exported_pipeline_is_the_policy(
    name: str, pipeline: Path, finished: Run, tmp_path: Path, capsys: Capture
) -> None:
    kinds = []
    for out, flags in (("out0", ("--dtype", "float32")), ("out1", ("--pipeline",))):
        answer = call(capsys, "export", finished.folder, "--output", tmp_path / out, *flags, "--json")
        assert (answer.code, answer.err) == (0, "")
        kinds.append(json.loads(answer.out)["kind"])
    assert kinds == ["transformer" if name == "sd3" else "LoRA", "pipeline"]
    latents = Family(name, pipeline).latents(2)
    inputs = latents, torch.tensor([0.751, 0.251]), finished.policy.encode(PROMPTS[:2])
    with torch.no_grad():
        expected = finished.policy.predict(*inputs)
        trained_with = ("model.cfg_scale=1.0",) if name == "qwen_image" else ()
        exported = Family(name, tmp_path / "out1").policy(*trained_with).predict(*inputs)
        start = Family(name, pipeline).policy(*trained_with).predict(*inputs)
    assert torch.allclose(exported, expected, atol=1e-4)
    assert not torch.allclose(start, expected, atol=1e-3)
    theirs = Family(name, pipeline).pipeline()
    if kinds[0] == "LoRA":
        theirs.load_lora_weights(tmp_path / "out0")
    else:
        network = type(theirs.transformer).from_pretrained(tmp_path / "out0", subfolder="transformer")
        type(finished.policy).replace_part(theirs, "transformer", network)
    images = [
        Family(name, pipeline).images(one, latents, list(PROMPTS[:2]), 3.0)
        for one in (theirs, Family(name, pipeline).pipeline(tmp_path / "out1"))
    ]
    assert torch.allclose(images[0], images[1], atol=5e-4)
