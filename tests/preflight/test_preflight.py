"""Each check before a run finds the fault that is put in its way."""

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import call, write_config
from pydantic import ValidationError
from tiny_pipeline import tiny_config

from pcpo_fast.cli import parse
from pcpo_fast.config.loading import load_config, merged
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.disk import encoded_prompts
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.preflight import checks
from pcpo_fast.preflight import dry_run as dry_runs
from pcpo_fast.preflight.available import available_memory
from pcpo_fast.preflight.checks import Check, attempt
from pcpo_fast.preflight.dry_run import dry_run, shrunk
from pcpo_fast.preflight.run import run_checks
from pcpo_fast.rollout.epoch_plan import check_sizes

HUB_MODEL = "somebody/some-model"


@pytest.fixture
def config(pipeline_folder: Path, tmp_path: Path) -> Config:
    file = write_config(tmp_path, pipeline_folder, output_dir=str(tmp_path / "run"))
    untrained = '{"prompt": "a red square"}\n{"prompt": "a blue square"}\n'
    (tmp_path / "heldout.jsonl").write_text(untrained)
    return load_config(file)


@pytest.fixture(scope="module")
def plan(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the configuration: it does not depend on the run's folder."""
    folder = tmp_path_factory.mktemp("planned")
    return make_plan(load_config(write_config(folder, pipeline_folder)), 1, 80)


def raising(error: Exception) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


def test_everything_is_in_order(config: Config) -> None:
    results = list(run_checks(config, 1, 1, 80, dry=False))
    assert [(check.name, check.status) for check in results if check.status != "ok"] == [
        ("GPUs", "warning"),
        ("dry run", "skipped"),
    ] or torch.cuda.is_available()


def test_an_old_library_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    true = checks.importlib.metadata.version
    monkeypatch.setattr(
        checks.importlib.metadata, "version", lambda name: "0.1.0" if name == "diffusers" else true(name)
    )
    status, says = checks.check_versions()
    assert status == "warning" and says.startswith("diffusers 0.1.0 is installed, but ") and "peft" not in says


def test_a_missing_library_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    true = checks.importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise checks.importlib.metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    assert checks.check_versions() == ("warning", "peft is not installed")


@pytest.mark.parametrize(("there", "status"), [(0, "warning"), (4, "failed"), (8, "ok")])
def test_gpus_are_counted(there: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    found, says = checks.check_gpus(8)
    assert found == status
    assert status != "failed" or says == "the run is for 8 GPUs, but PyTorch sees 4 (H100)"


def test_a_model_without_weights_fails(own_pipeline: Path) -> None:
    config = tiny_config(own_pipeline)
    assert checks.check_model(config)[0] == "ok"
    for file in (own_pipeline / "vae").glob("*.safetensors"):
        file.unlink()
    found = attempt("model", lambda: checks.check_model(config))
    assert found.status == "failed" and found.says.endswith("vae holds no diffusion_pytorch_model.safetensors")
    shutil.rmtree(own_pipeline / "transformer")
    assert attempt("model", lambda: checks.check_model(config)).status == "failed"


def test_an_attention_backend_that_diffusers_does_not_know_fails(pipeline_folder: Path) -> None:
    wrong = tiny_config(pipeline_folder, "model.attention=cudnn")
    found = attempt("model", lambda: checks.check_model(wrong))
    assert found.status == "failed" and found.says.startswith("model.attention: unknown backend 'cudnn'; diffusers")


def test_a_model_that_the_hub_refuses_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = config.model_copy(update={"model": config.model.model_copy(update={"path": HUB_MODEL})})
    monkeypatch.setattr("huggingface_hub.auth_check", raising(OSError("401 Client Error\nRequest ID: x")))
    status, says = checks.check_model(remote)
    assert status == "failed" and "401 Client Error" in says and "hf auth login" in says and "\n" not in says
    monkeypatch.setattr("huggingface_hub.auth_check", lambda path: None)
    assert checks.check_model(remote) == ("ok", f"{HUB_MODEL} can be downloaded")


def test_a_model_in_the_cache_needs_the_weights_of_its_network(
    own_pipeline: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = config.model_copy(update={"model": config.model.model_copy(update={"path": HUB_MODEL})})
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda path, name, revision=None: str(own_pipeline / name)
    )
    monkeypatch.setattr("huggingface_hub.auth_check", raising(OSError("no network")))
    assert checks.check_model(remote) == ("ok", f"{HUB_MODEL} is in the hub's cache on this machine")
    for file in (own_pipeline / "transformer").glob("*.safetensors"):
        file.unlink()
    assert checks.check_model(remote)[0] == "failed"


def test_prompts_and_rewards_are_read(config: Config) -> None:
    assert checks.check_inputs(config, 1)[0] == "ok"
    prompts = config.prompts.model_copy(update={"train": "nowhere.txt"})
    result = attempt("inputs", lambda: checks.check_inputs(config.model_copy(update={"prompts": prompts}), 1))
    assert result.status == "failed" and "nowhere.txt" in result.says


def test_a_directory_that_the_run_cannot_have_fails(config: Config, tmp_path: Path) -> None:
    assert checks.check_output(config) == ("ok", f"{tmp_path / 'run'}: a new run")
    (tmp_path / "run").touch()
    found = {check.name: check for check in run_checks(config, 1, 1, 80)}
    assert found["output_dir"][1:] == ("failed", f"output_dir: {tmp_path / 'run'} is a file, not a folder")


def test_held_out_prompts_that_are_trained_on_are_a_warning(config: Config, tmp_path: Path) -> None:
    """Whatever their metadata, which only rewards read."""
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a red circle", "n": 1}\n{"prompt": "a red square"}\n')
    status, says = checks.check_inputs(config, 1)
    assert status == "warning"
    assert says.startswith("prompts.heldout: shares 1 of its 2 prompts with prompts.train, so ")


def test_a_full_disk_fails(config: Config, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_disk(config, plan)[0] == "ok"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    status, says = checks.check_disk(config, plan)
    assert status == "failed" and "0.0 GB free" in says and "checkpoint.keep" in says


def test_a_folder_that_cannot_be_written_fails(
    config: Config, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    status, says = checks.check_disk(config, plan)
    assert status == "failed" and says.endswith("is not writable")


def test_encoded_prompts_need_their_own_disk_unless_they_are_there(
    config: Config, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (cache / "model").mkdir(parents=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"embedding_cache": str(cache)})})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == cache else 1e12))
    status, says = checks.check_disk(config, plan)
    assert status == "failed" and says.startswith(f"{cache} has 0.0 GB free") and "(encoded prompts " in says
    for prompt in encoded_prompts(config) or ():
        EmbeddingCache(cache, "model").path(prompt).touch()
    assert checks.check_disk(config, plan)[0] == "ok"


def test_host_memory_is_what_is_left_of_the_machine_and_of_its_groups(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    assert available_memory(tmp_path) == 8000 * 1024
    for group, limit, used, files in (("job", "6000000", "3000000", 1000000), ("job/step", "max", "2000000", 0)):
        for name, text in (("max", limit), ("current", used), ("stat", f"anon 5\nfile {files}")):
            write(f"sys/fs/cgroup/{group}/memory.{name}", text)
    assert available_memory(tmp_path) == 4_000_000
    assert available_memory() > 1e8  # here


@pytest.mark.parametrize("on_gpu", [True, False])
def test_too_little_host_memory_fails(on_gpu: bool, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: on_gpu)
    own = plan["configured"]
    needed = own["host"]["peak"] if on_gpu else own["peak"]  # without a GPU, what the plan has on one is on the host
    for free, expected in ((1.01 * needed, "ok"), (0.99 * needed, "failed")):
        monkeypatch.setattr(checks, "available_memory", lambda free=free: free * 1e9)
        status, says = checks.check_host(plan)
        assert status == expected and "\n" not in says
    assert says.startswith(f"{needed:.1f} GB are needed for 1 rank (") and "--host-memory" in says
    unknown = {"peak": 0.9 * needed, "worst_phase": "load"}  # of a model that is not here, if its files can be mapped
    status, says = checks.check_host(plan | {"configured": own | {"host_if_mapped": unknown}})
    assert status == ("warning" if on_gpu else "failed")


@pytest.mark.slow
def test_too_little_memory_fails_with_what_to_set(config: Config, plan: dict[str, Any]) -> None:
    status, says = checks.check_memory(make_plan(config, 1, 1.5002))
    assert status == "failed" and "does not fit into" in says
    assert checks.check_memory(plan)[0] == "ok"


def test_the_dry_run_keeps_what_can_fail(config: Config, tmp_path: Path) -> None:
    small, large = shrunk(config, tmp_path, 2), config.rollout.model_copy(update={"prompts_per_epoch": 100})
    # As many images as micro-batches have pairs, but on no rank more than the run has there.
    assert config.images_per_epoch == 8 and small.images_per_epoch == 8
    assert shrunk(config.model_copy(update={"rollout": large}), tmp_path, 2).images_per_epoch == 2 * 2 * 6
    assert small.train.updates_per_epoch == 2 and small.train.epochs == 1
    assert Path(small.output_dir).parent == tmp_path
    assert small.sampler == config.sampler and small.rewards == config.rewards and small.optimizer == config.optimizer
    assert small.model.model_dump(exclude={"embedding_cache"}) == config.model.model_dump(exclude={"embedding_cache"})


DRAWN: dict[str, tuple[Any, ...]] = {
    "rollout.prompts_per_epoch": (1, 2, 3, 8),
    "rollout.images_per_prompt": (1, 2, 3, 4, 24),
    "rollout.candidates": (None, 3, 8, 48),
    "train.updates_per_epoch": (1, 2, 3),
    "train.inner_epochs": (1, 2),
    "train.max_rollout_age": (1, 2, 32),
    "train.max_log_ratio": (None, 0.1),
    "train.micro_batch_size": ("auto", 1, 2, 3, 24, 45),
    "prompts.heldout": (None, "heldout.txt"),
    "evaluation.images_per_prompt": (1, 4),
    "evaluation.min_diversity": (None, 0.5),
    "evaluation.every": (0, 10),
    "checkpoint.every": (0, 10),
    "checkpoint.keep_best": (0, 2),
    "advantage.normalization": ("group", "flow_grpo", "global", "running"),
    "advantage.scale": ("own", "others", "earlier"),
    "advantage.steps": ("final", "baseline", "gain"),
    "advantage.calibrated": (True, False, "branches"),
    "advantage.gain_lambda": (0.0, 0.9, 1.0),
    "advantage.gain_lambda_rise": (0.0, 0.5),
    "advantage.audit_every": (0, 3),
    "advantage.scored_steps": (1, 4),
    "credit.fraction": (1.0, 0.6),
    "window.size": (0, 2, 5),
    "model.embedding_cache": (None, "cache"),
}


def test_whatever_can_be_trained_can_be_tried(tmp_path: Path) -> None:
    """Every valid run stays one when it is made small, and its micro-batches still divide."""
    draw, tried, sized = random.Random(0), 0, 0
    defaults = Config().model_dump(mode="json")
    while tried < 300:
        changes: dict[str, Any] = {}
        for key, values in DRAWN.items():
            section, name = key.split(".")
            if draw.random() < 0.3:
                changes.setdefault(section, {})[name] = draw.choice(values)
        try:
            config = Config.model_validate(merged(defaults, changes))
        except ValidationError:
            continue
        ranks = draw.choice((1, 2, 4))
        small = shrunk(config, tmp_path, ranks)
        assert (small.rollout.candidates is None) == (config.rollout.candidates is None)
        tried += 1
        try:
            check_sizes(config, ranks)
        except UserError:
            continue
        check_sizes(small, ranks)
        sized += 1
    assert sized > 50


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (2, "note\nerror: rewards: nothing fits\nlast words", "error: rewards: nothing fits"),
        (1, "Traceback\n  File\nKeyError: 'x'", "Traceback /   File / KeyError: 'x'"),
        (-9, "", "exit code -9"),
    ],
)
def test_a_dry_run_that_fails_says_why(
    code: int, error: str, says: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=code, stderr=error, stdout="")
    monkeypatch.setattr(dry_runs.subprocess, "run", lambda *command, **options: done)
    assert dry_run(config, 1, 60) == ("failed", says)


def test_a_dry_run_names_no_folder_that_is_gone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        return SimpleNamespace(returncode=2, stderr=f"error: {command[-1]}: No space left on device", stdout="")

    monkeypatch.setattr(dry_runs.subprocess, "run", run)
    assert dry_run(config, 1, 60) == ("failed", f"error: {tempfile.gettempdir()}/dry_run.yaml: No space left on device")


def test_a_dry_run_that_hangs_is_given_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_runs.subprocess, "run", raising(subprocess.TimeoutExpired("train", 60)))
    assert dry_run(config, 1, 60) == ("failed", "the dry run did not finish within 60 seconds (--timeout)")


def test_several_gpus_are_launched_by_deepspeed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(dry_runs.subprocess, "run", run)
    assert dry_run(config, 2, 60)[0] == "ok"
    assert commands[0][1:6] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]


def test_train_tries_itself(config: Config, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--dry-run`` is the preflight's two steps, with automatic sizes left to the process that takes them."""
    seen: list[Config] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append(load_config(command[command.index("--config") + 1]))
        code = len(seen) - 1
        return SimpleNamespace(returncode=code, stderr="error: rewards: nothing fits", stdout="")

    monkeypatch.setattr(dry_runs.subprocess, "run", run)
    arguments = ("train", "--config", tmp_path / "run.yaml", "train.micro_batch_size=auto", "--dry-run")
    answer = call(capsys, *arguments)
    assert (answer.code, answer.err) == (0, "") and answer.out.endswith("a checkpoint and an export: ready to train\n")
    assert seen[0].train.epochs == 1 and seen[0].train.micro_batch_size == "auto" and seen[0].images_per_epoch == 4
    answer = call(capsys, *arguments)
    assert (answer.code, answer.out, answer.err) == (2, "", "error: rewards: nothing fits\n")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a red circle"}\n')
    assert call(capsys, *arguments).err.startswith("warning: prompts.heldout: shares 1 of its 1 prompt with ")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsed = parse([str(argument) for argument in arguments])
    with pytest.raises(
        UserError, match=r"^--dry-run: runs in a single process; pcpo-fast preflight --gpus N tries several"
    ):
        parsed.run(parsed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("train.micro_batch_size=7",), "train.micro_batch_size: 7 does not divide the "),
        (("prompts.train=nowhere.txt",), "prompt file nowhere.txt does not exist"),
        (("output_dir=file",), "output_dir: file is a file, not a folder"),
    ],
)
def test_train_tries_nothing_that_it_would_refuse(
    settings: tuple[str, ...], says: str, config: Config, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(dry_runs.subprocess, "run", raising(AssertionError("trained")))
    answer = call(capsys, "train", "--config", "run.yaml", *settings, "--dry-run")
    assert (answer.code, answer.out) == (2, "") and answer.err.startswith("error: ") and says in answer.err


def test_nothing_is_trained_after_a_failure(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcpo_fast.preflight.run.check_inputs", raising(UserError("no prompts")))
    monkeypatch.setattr("pcpo_fast.preflight.run.dry_run", raising(AssertionError("trained")))
    results = {check.name: check for check in run_checks(config, 1, 1, 80)}
    assert results["prompts and rewards"] == Check("prompts and rewards", "failed", "no prompts")
    assert results["dry run"].status == "skipped"


@pytest.mark.slow
def test_the_command(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything, with a real dry run in a process of its own."""
    output = call(
        capsys, "preflight", "--config", tmp_path / "run.yaml", "--json", "rewards.0.name=jpeg_compressibility"
    )
    answer = json.loads(output.out)
    assert answer["checks"][-1] == {
        "name": "dry run",
        "status": "ok",
        "says": "two optimizer steps, an evaluation, a checkpoint and an export",
    }
    assert answer["passed"] and output.code == 0 and not (tmp_path / "run").exists()
    failing = call(capsys, "preflight", "--config", tmp_path / "run.yaml", "prompts.train=nowhere.txt")
    assert failing.code == 1 and failing.out.splitlines()[-1] == "failed: prompts and rewards"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpus", "0"), "--gpus: must be at least 1, got 0"),
        (("--gpus", "9", "--nodes", "2"), "--gpus: 9 GPUs cannot be divided evenly over 2 machines"),
        (("--timeout", "0"), "--timeout: must be above 0 seconds"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = call(capsys, "preflight", *arguments)
    assert output.code == 2 and output.err.startswith(f"error: {says}")
