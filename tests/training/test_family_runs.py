"""Every family from a folder on disk through ``train.py``: killed, resumed, exported, and loaded by diffusers.

With LoRA, with all weights, and with these in ZeRO-2 on two ranks, in processes of their own; some in ZeRO-3 and with
frozen weights in four bits as well. A new family gets the first three by its entry in ``tested_families.KINDS``.
"""

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from cli_runs import WAITING_REWARD, Output, call, outputs, records, start, start_ranks, wait_for, write_config
from pcpo_kernels.dispatch import triton_installed
from safetensors.torch import load_file
from tested_families import CPU, FIXTURES, Family
from tiny_pipeline import PROMPTS, redness

from pcpo_fast.cli import main
from pcpo_fast.config.loading import load_config
from pcpo_fast.method.samplers import deterministic_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies.families import family_of, load_policy, load_trained_weights
from pcpo_fast.policies.lora_files import LORA_FILE
from pcpo_fast.rollout.generation import generate

pytest_plugins = ["cli_fixtures"]
Capture = pytest.CaptureFixture[str]
LORA: dict[str, Any] = {"model__finetune": "lora", "model__lora": {"rank": 2, "alpha": 6.0}, "optimizer__lr": 3e-2}
FAST = ("sd-lora",)
"""Cases for ``make test``: in this process, which is quicker, and ended after an epoch instead of killed."""


class Form(NamedTuple):
    """How a family is trained: settings, number of ranks, DeepSpeed's ZeRO, and for which families; none: all."""

    settings: dict[str, Any]
    ranks: int = 1
    zero: dict[str, Any] | None = None
    families: tuple[str, ...] = ()


FORMS = {
    "lora": Form(LORA),
    "full": Form({}),
    "zero2": Form({}, 2, {"stage": 2}),
    "zero3": Form({}, 2, {"stage": 3, "stage3_param_persistence_threshold": 0}, ("flux3", "klein")),
    "nf4": Form(LORA | {"model__base_weights": "nf4"}, 2, {"stage": 2}, ("klein", "z_image")),
}


class Runs(NamedTuple):
    """A run that was killed and resumed, and one of the same settings that nobody disturbed.

    Attributes:
        resumed: in ``run``, and what it printed from the checkpoint on.
        whole: folder of the other one.
    """

    family: Family
    form: str
    run: Path
    resumed: Output
    whole: Path


CASES = [
    pytest.param((name, form), id=f"{name}-{form}", marks=() if f"{name}-{form}" in FAST else pytest.mark.slow)
    for name in FIXTURES
    if name != "sd_v"
    for form, setup in FORMS.items()
    if name in setup.families or not setup.families
]


def in_process(*arguments: str) -> Output:
    """A command's answer."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*arguments])
    return Output(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Killed in the second epoch of two."""
    name, form = request.param
    family = Family(name, request.getfixturevalue(FIXTURES[name]))
    folder, (chosen, ranks, zero, _) = tmp_path_factory.mktemp(f"{name}-{form}"), FORMS[form]
    settings = chosen | {key.replace(".", "__"): yaml.safe_load(value) for key, value in family.trained}
    if zero:
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        settings |= {"deepspeed": str(folder / "zero.json")}
    elif family.is_flow:
        settings |= {"credit__kl_coefficient": 0.04, "credit__kl": "published"}
    if f"{name}-{form}" in FAST:
        file = str(write_config(folder, family.folder, **settings))
        others = ("train.epochs=1",), (), (f"output_dir={folder / 'whole'}",)
        _, resumed, whole = (in_process("train", "--config", file, *arguments) for arguments in others)
        return Runs(family, form, folder / "run", resumed, folder / "whole")
    launcher = request.getfixturevalue("launcher")
    (folder / "waiting_rewards.py").write_text(WAITING_REWARD)
    write_config(folder, family.folder, rewards=[{"name": "waiting_rewards:redness"}], **settings)

    def begin(*arguments: str) -> Any:
        loaded = f"deepspeed matplotlib.figure {family_of(family.kind.pipeline).__module__}"
        return start_ranks(ranks, folder, "--config", "run.yaml", *arguments, launcher=launcher, WARM_MODULES=loaded)

    (folder / "wait_at").write_text("2")
    killed = begin()
    wait_for((folder / "waiting").exists, killed[0])
    for process in killed:
        process.kill()
    outputs(killed)
    assert not (folder / "run" / "summary.json").exists()
    (folder / "wait_at").write_text("0")
    (resumed, *_), (whole, *_) = map(outputs, (begin(), begin(f"output_dir={folder / 'whole'}")))
    assert (whole.code, whole.err) == (0, "")
    return Runs(family, form, folder / "run", resumed, folder / "whole")


def numbers(run: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What a run measured, but for what clocks did; of a line that is there twice the later one."""
    return {
        (line["kind"], line["epoch"], line.get("update")): {
            key: value for key, value in line.items() if not key.startswith(("time", "throughput"))
        }
        for line in records(run)
    }


def test_a_run_trains_and_says_what_it_did(runs: Runs) -> None:
    lines = records(runs.whole)
    assert [line["kind"] for line in lines] == ["evaluation", *(["update"] * 2 + ["epoch", "evaluation"]) * 2]
    updates = [line for line in lines if line["kind"] == "update"]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str)), line
    assert [line["policy/log_ratio_abs"] > 0 for line in updates] == [False, True] * 2
    assert all(line["policy/grad_norm"] > 0 and line["policy/skipped_updates"] == 0 for line in updates)
    assert all(line["rollout/mismatch_output"] < 1e-4 for line in lines if line["kind"] == "epoch")
    assert ("policy/kl" in updates[1]) == (runs.family.is_flow and runs.form in ("lora", "full"))
    before, after = (lines[i]["heldout/reward/mean"] for i in (0, -1))
    assert before != after
    credit = json.loads((runs.whole / "credit.json").read_text())
    assert credit["trained_steps"] == [0, 1, 2]
    if runs.family.is_flow:
        assert (credit["sampler"], credit["rule"]) == ("flow", "native")
    else:
        assert (credit["sampler"], credit["rule"]) == ("ddim", "uniform")
        assert len(set(credit["used"][:3])) == 1 and credit["used"][3] == 0
        assert credit["times"] == [0.751, 0.501, 0.251, 0.001, 0.0]


def test_a_killed_run_ends_as_if_it_had_not_been(runs: Runs) -> None:
    assert (runs.resumed.code, runs.resumed.err) == (0, "")
    assert "Resuming after epoch 1 from" in runs.resumed.out
    assert numbers(runs.run) == numbers(runs.whole)
    files = sorted(path.relative_to(runs.whole) for path in runs.whole.glob("export/**/*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(runs.run / file), load_file(runs.whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@torch.no_grad()
def test_an_exported_pipeline_is_the_policy(runs: Runs, tmp_path: Path, capsys: Capture) -> None:
    family, config = runs.family, load_config(runs.run.parent / "run.yaml")
    policy = load_policy(config, CPU)
    load_trained_weights(policy.module, config, runs.run / "export")
    table = StepTable.of(deterministic_transitions(config.sampler, policy.schedule(config.sampler.steps)), CPU)
    heldout = redness(generate(policy, PROMPTS[2:], 1, table, config.evaluation.seed, 2), [], []).mean()
    assert float(heldout) == pytest.approx(records(runs.run)[-1]["heldout/reward/mean"], abs=1e-5)

    kinds = []
    for out, flags in (("out0", ("--dtype", "float32")), ("out1", ("--pipeline",))):
        answer = call(capsys, "export", runs.run, "--output", tmp_path / out, *flags, "--json")
        assert (answer.code, answer.err) == (0, "")
        kinds.append(json.loads(answer.out)["kind"])
    lora = config.model.finetune == "lora"
    assert kinds == ["LoRA" if lora else family.part, "pipeline"]
    latents = family.latents(2)
    inputs = latents, torch.tensor([0.751, 0.251]), policy.encode(PROMPTS[:2])
    scale = f"model.cfg_scale={config.model.cfg_scale}"
    start, exported = (Family(family.name, folder).policy(scale) for folder in (family.folder, tmp_path / "out1"))
    if runs.form != "nf4":  # whose adapters are exported for the original weights
        assert torch.allclose(exported.predict(*inputs), policy.predict(*inputs), atol=1e-4)
    assert not torch.allclose(exported.predict(*inputs), start.predict(*inputs), atol=1e-3)
    theirs = family.pipeline()
    if lora:
        theirs.load_lora_weights(tmp_path / "out0")
    else:
        network = type(getattr(theirs, family.part)).from_pretrained(tmp_path / "out0", subfolder=family.part)
        type(policy).replace_part(theirs, family.part, network)
    images = [
        family.images(one, latents, list(PROMPTS[:2]), 3.0) for one in (theirs, family.pipeline(tmp_path / "out1"))
    ]
    assert torch.allclose(images[0], images[1], atol=5e-4)


@pytest.mark.slow
@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_a_run_on_our_kernels_is_one_on_the_references(klein_folder: Path, tmp_path: Path) -> None:
    """Blocks, sampler and loss in Triton's interpreter, which is chosen when a process loads the kernels."""
    family = Family("klein", klein_folder)
    settings = LORA | {key.replace(".", "__"): yaml.safe_load(value) for key, value in family.trained}
    # The interpreter takes seconds for a forward.
    settings |= {"sampler__steps": 2, "rollout__prompts_per_epoch": 1, "rollout__images_per_prompt": 2}
    settings |= {"train__epochs": 1, "train__updates_per_epoch": 1, "train__micro_batch_size": 2}
    settings |= {"prompts__heldout": None}
    write_config(tmp_path, family.folder, **settings)
    plain = start(tmp_path, "--config", "run.yaml")
    interpreter = {"TRITON_INTERPRET": "1", "PCPO_KERNELS": "triton", "PYTHONWARNINGS": "ignore"}
    own = start(
        tmp_path, "--config", "run.yaml", "model.block_kernels=true", f"output_dir={tmp_path / 'own'}", **interpreter
    )
    for answer in outputs([plain, own], timeout=1500):
        assert answer.code == 0, answer.err
    expected, found = numbers(tmp_path / "run"), numbers(tmp_path / "own")
    assert found.keys() == expected.keys()
    for key, line in expected.items():
        for metric in line.keys() - {"kind"}:
            assert found[key][metric] == pytest.approx(line[metric], rel=1e-3, abs=1e-5), (key, metric)
    ours, theirs = (load_file(tmp_path / run / "export" / LORA_FILE) for run in ("own", "run"))
    assert all(torch.allclose(ours[weight], value, atol=1e-4) for weight, value in theirs.items())
