"""Two CPU ranks with unequally many pairs that teach: as many forwards on each, and the weights of running them all."""

import json
from pathlib import Path

import pytest
import torch
from launched_ranks import launch_ranks
from safetensors.torch import load_file
from tiny_pipeline import PROMPTS
from uneven_ranks import STAGES

SCRIPT = Path(__file__).with_name("uneven_ranks.py")
REWARD = """
def some(images, prompts, metadata):
    redness = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    return [0.0 if "circle" in prompt else float(value) for prompt, value in zip(prompts, redness)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "uneven_reward.py").write_text(REWARD)
    (folder / "train.txt").write_text("\n".join(PROMPTS[:2]))
    done = launch_ranks(2, SCRIPT, folder, pipeline_folder, folder=folder, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_ranks_run_equally_many_and_train_as_if_they_ran_all(
    folder: Path, pipeline_folder: Path, stage: int
) -> None:
    first, second = (json.loads((folder / f"{stage}-skipped-{rank}.json").read_text()) for rank in (0, 1))
    run, needed = ([[count[i] for count in counts] for counts in (first, second)] for i in (0, 1))
    assert run[0] == run[1] == [max(1, *counts) for counts in zip(*needed, strict=True)]
    assert any(one != other for one, other in zip(*needed, strict=True)), "the ranks should need unequally many"
    assert json.loads((folder / f"{stage}-whole-0.json").read_text()) == [[3, 3]] * 4
    lines = [json.loads(line) for line in (folder / f"{stage}-skipped" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["policy/skipped_pairs"] for line in lines if line["kind"] == "update"]
    assert skipped == [2 * 2 * (3 - count) for count in run[0]] and any(skipped)
    assert sum(line["policy/skipped_pairs"] for line in lines if line["kind"] == "epoch") == sum(skipped)
    weights, expected, start = (
        load_file(next(path.glob("transformer/*.safetensors")))
        for path in (folder / f"{stage}-skipped" / "export", folder / f"{stage}-whole" / "export", pipeline_folder)
    )
    moved = torch.stack([(value - start[name]).abs().max() for name, value in expected.items()]).max()
    assert moved > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
