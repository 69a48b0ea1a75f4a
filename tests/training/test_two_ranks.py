"""Two CPU ranks through DeepSpeed's own launcher: the numbers of one rank, resuming, and one error line.

They are launched once, for all tests of the file.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launched_ranks import launch_ranks
from rich.console import Console
from tiny_pipeline import PROMPTS, tiny_config
from two_ranks import GROUP, MODES, SMALL

from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.training.trainer import train

ROOT = Path(__file__).parents[2]

REWARD = """
import os

calls = 0

def redness(images, prompts, metadata):
    global calls
    # A rank's share of a rollout; candidates and evaluations have other sizes, and predictions are marked.
    calls += len(prompts) == 4 and "predicted_at" not in metadata[0]
    if os.environ["RANK"] == "1" and calls == 3:
        raise RuntimeError("the second rank has lost its reward model")
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
"""


def config_of(pipeline: Path, folder: Path, run: str) -> Path:
    """A configuration file; three held-out images on two ranks: an uneven share."""
    config = tiny_config(
        pipeline,
        f"output_dir={folder / run}",
        f"prompts.train={folder / 'train.txt'}",
        f"prompts.heldout={folder / 'heldout.txt'}",
        f"deepspeed={folder / 'ds.json'}",
        "rewards=[{name: 'ranks_reward:redness'}]",
        "evaluation.prompts=3",
        "evaluation.every=1",
        "rollout.same_initial_noise=false",
        "advantage.steps=gain",
        "advantage.gain_lambda=0.5",
        "advantage.audit_every=1",
        "advantage.audit_images=4",
        "rollout.candidates=6",
        "rollout.candidate_weights=full",
        "train.micro_batch_size=3",
        "model.compile=auto",
    )
    file = folder / f"{run}.yaml"
    file.write_text(dump_config(config))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks_reward.py").write_text(REWARD)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    (folder / "heldout.txt").write_text("\n".join(PROMPTS[:3]))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for run in ("one", "two"):
        config_of(pipeline_folder, folder, run)
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path, pipeline_folder: Path, request: pytest.FixtureRequest) -> "subprocess.CompletedProcess[str]":
    """The launch of ``two_ranks.py``, which has come to its end, with the modes that are tested in this session."""
    modes = [mode for mode in MODES if any(item.name.endswith(f"[{mode}]") for item in request.session.items)]
    script = ROOT / "tests" / "training" / "two_ranks.py"
    return launch_ranks(2, script, folder, pipeline_folder, *modes, folder=folder, timeout=400)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")  # of what DeepSpeed calls
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_ranks_in_zero_3_are_one_rank_in_zero_1(
    launched: "subprocess.CompletedProcess[str]",
    folder: Path,
    pipeline_folder: Path,
    tmp_path: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups are larger than a rank's batch here, and no weight is whole on a rank."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rank_equality

    assert (folder / f"{mode}.npz").exists(), launched.stderr
    together = dict(np.load(folder / f"{mode}.npz"))
    alone = rank_equality.record(f"zero1-{mode}-float32", tmp_path, pipeline_folder, *SMALL)
    differences = rank_equality.compare(alone, together, GROUP)
    assert rank_equality.above(differences) == []
    assert len(together["rewards"]) == 8 and len(together["log_ratios"]) == 16 and together["log_ratios"].any()


@pytest.mark.usefixtures("process_group")  # before RANK is set here for a while: starting it adds LOCAL_RANK
def test_two_ranks_train_as_one_resume_and_fail_in_one_line(
    launched: "subprocess.CompletedProcess[str]", folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first part trains an epoch; a second resumes, trains another one, and loses its second rank in the third."""
    assert launched.returncode == 2, launched.stderr
    assert launched.stdout.count("Held-out reward:") == 1  # one rank speaks, at the end of the first part
    assert sum("Resuming after epoch 1" in line for line in launched.stdout.splitlines()) == 1
    why = "the blocks cannot run compiled here: the second rank has no registers left"
    assert launched.stdout.count(f"Chosen instead: model.compile=false ({why})") == 1
    assert load_config(folder / "two" / "config.yaml").model.compile is False
    everything = (launched.stdout + launched.stderr).splitlines()
    errors = [line for line in everything if line.startswith("error: ")]
    assert len(errors) == 1 and "the second rank has lost its reward model" in errors[0]
    assert not any("Traceback" in line for line in everything)

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(load_config(folder / "one.yaml"), console=Console(quiet=True))
    compare(metrics_of(folder / "one"), metrics_of(folder / "two"))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def is_number_of_the_run(name: str) -> bool:
    return name not in ("time", "kind") and not name.startswith(("time/", "throughput/", "memory/"))


def compare(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """Every metric of one rank's run is the two ranks', whose updates of an epoch see the same images."""
    compared = 0
    assert [line["kind"] for line in one].count("update") == 4
    spreads = {line["epoch"]: line["reward/group_std"] for line in one if line["kind"] == "epoch"}
    for line in one:
        key = {name: line[name] for name in ("kind", "epoch", "update") if name in line}
        # The evaluation of the resumed epoch is there from both launches.
        *_, other = (candidate for candidate in two if candidate.items() >= key.items())
        assert line.keys() == other.keys()
        for name in filter(is_number_of_the_run, line):
            rounding = 2**-21 / spreads.get(line["epoch"], 1.0)  # of float32 rewards, in units of their spread
            small = 1e-6 if "log_ratio" in name or "mismatch" in name else 1e-7
            if name.startswith("stepwise/"):
                small = rounding
            if name == "heldout/base_distance":
                # Of 8-bit images: a value that lies between two levels falls to either side; 4 of the 3 x 32 x 32 may.
                small = 4 / 255 / (3 * 32 * 32)
            assert other[name] == pytest.approx(line[name], rel=max(1e-5, rounding), abs=small), (key, name)
            compared += line[name] != 0
    assert compared > 60
    rewards = [line["reward/mean"] for line in one if line["kind"] == "epoch"]
    heldout = [line["heldout/reward/mean"] for line in one if line["kind"] == "evaluation"]
    assert len(set(rewards)) == 2 and len(set(heldout)) == 3, "the policy changes"
