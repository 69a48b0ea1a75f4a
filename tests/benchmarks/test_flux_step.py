"""The benchmark of a training step: its paths compute the same step, and none is timed that does not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flux_step
import plot_step
import pytest
import step_checking
import step_measuring
import step_model
import step_paths
import torch
from pcpo_kernels import policy_loss
from step_model import SIZES, Size
from torch import Tensor

from pcpo_fast.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def size() -> Size:
    """Two tiny blocks."""
    return SIZES["dry"]


LEVERS = ("rollout.batch_size=4", "train.micro_batch_size=2", "rollout.share_first_steps=true")


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_levers_pass_the_check_and_a_wrong_path_does_not(
    size: Size, finetune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = step_checking.Check(size, size.config(finetune), CPU)
    record = check(size.config(finetune, *LEVERS, "model.block_kernels=true", "model.gradient_checkpointing=true"))
    assert record["passed"] and record["log_ratio"] > 0
    assert record["log_ratio_change"] < 1e-3 * record["clip_range"]
    assert record["eager_error"] > 0 and record["output_error"] > 0, "the wider type says something"
    predict = step_paths.FluxPolicy.predict
    monkeypatch.setattr(step_paths.FluxPolicy, "predict", lambda *args: predict(*args) * (1 + 1e-5))
    assert not check(size.config(finetune, *LEVERS))["passed"]


def test_the_strong_paths_loss_is_ours() -> None:
    shape, rows = (5, 7, 3), 5
    new, old, x = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    a, b, std, linear, quadratic, scale = (torch.rand(rows, dtype=torch.float64) + 0.5 for _ in range(6))
    noise, advantage = torch.randn(shape, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    columns = [c.view(-1, 1, 1) for c in (a, b, std)]
    following = columns[0] * x + columns[1] * old + columns[2] * noise
    ours = policy_loss(new, old, noise, linear, quadratic, scale, advantage, clip_range=0.3)
    theirs = step_paths.hinge_loss(new, old, x, following, *columns, linear, quadratic, scale, advantage, 0.3)
    # The strong path's deltas are in float32, as its outputs are.
    assert float(theirs) == pytest.approx(float(ours.loss), rel=1e-5)


def test_the_public_paths_log_probability_is_that_of_a_normal(size: Size) -> None:
    public = step_paths.Public(size, size.config("lora"), CPU)
    x = torch.randn(1, *public.policy.latent_shape)
    following, log_prob = public.step_of(x, 1)
    table = public.at.sampler
    with torch.no_grad():
        velocity = public.policy.predict(x, table.times[1].expand(1), public.conditioning(1))
    mean = table.a[1] * x + table.b[1] * velocity
    expected = torch.distributions.Normal(mean, table.std[1]).log_prob(following).mean()
    assert float(log_prob) == pytest.approx(float(expected), rel=1e-5)
    assert not torch.equal(following, mean)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_every_path_trains(size: Size, finetune: str) -> None:
    for kind in (step_paths.Ours, step_paths.Strong, step_paths.Public):
        path: Any = kind(size, size.config(finetune, "optimizer.lr=1e-3", *LEVERS), CPU)
        before = {name: p.detach().clone() for name, p in path.policy.module.named_parameters()}
        for _ in range(2):
            path.rollout()
            path.update()
        moved = {name for name, p in path.policy.module.named_parameters() if not torch.equal(p, before[name])}
        trained = {name for name, p in path.policy.module.named_parameters() if p.requires_grad}
        assert moved and moved <= trained, kind.__name__


def test_operations_are_those_of_the_plan(size: Size) -> None:
    """Every image at every step forward; a part of the steps forward and backward, which is three forwards."""
    config = size.config("full")
    network = step_model.random_network(size, CPU, torch.float32)
    policy = step_model.random_policy(size, config, CPU, network)
    given = step_model.random_embeddings(size, CPU, torch.float32)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.predict(torch.randn(1, *policy.latent_shape), torch.rand(1), given)
    tokens, width, blocks = 16 + size.text, 128, 2
    forward = counter.get_total_flops() + blocks * 4 * tokens**2 * width  # it knows no attention on CPUs
    session = flux_step.Session.__new__(flux_step.Session)
    session.size = size
    work = session._work(config)
    assert work["pairs"] == 4 * 1, "0.6 of three steps, rounded down"
    assert work["rollout"] == pytest.approx(4 * 4 * forward)
    assert 2.5 < work["update"] / (work["pairs"] * forward) <= 3.0


@pytest.fixture
def two_rungs(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder without a compiler."""
    monkeypatch.setitem(SIZES, "cpu", size)
    rungs = [flux_step.Rung("our loop", ("model.gradient_checkpointing=true",)), flux_step.Rung("batches", LEVERS)]
    monkeypatch.setattr(flux_step, "ladder", lambda _: rungs)
    monkeypatch.setattr(flux_step, "stop_distributed", lambda: None)


@pytest.mark.slow
@pytest.mark.usefixtures("two_rungs")
def test_the_file_and_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "step.json"
    assert flux_step.main(["--size", "cpu", "--json", str(file), "--repeats", "2"]) == 0
    content = json.loads(file.read_text())
    assert content["complete"] and [rung["name"] for rung in content["ladder"]] == ["our loop", "batches"]
    for name in ("ours", "baseline", "strong"):
        record = content[name]
        assert record["rollout_s"] > 0 and record["update_s"] > 0 and record["operations"] > 100
        assert record["images_per_second"] == pytest.approx(4 / record["step_s"])
        flop = sum(content["model_tflop"].values())
        assert record["tflops"] == pytest.approx(flop / record["step_s"]) and record["mfu"] is None
        assert name == "baseline" or record["numerics"]["passed"]
    assert content["ratio"] == pytest.approx(content["baseline"]["step_s"] / content["ours"]["step_s"])
    assert content["ratio_strong"] == pytest.approx(content["strong"]["step_s"] / content["ours"]["step_s"])
    assert content["overhead"]["share_of_step"] < 1
    assert {record["name"] for record in content["extras"]} == {rung.name for rung in flux_step.EXTRAS if not rung.gpu}
    assert plot_step.main([str(file), "--out", str(tmp_path / "step.png")]) == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    content["strong"]["code"] = "another"
    file.write_text(json.dumps(content))
    assert plot_step.main([str(file), "--out", str(tmp_path / "no.png")]) == 2
    assert "its paths are of different code: measure all of them again" in capsys.readouterr().err
    content.pop("strong")
    file.write_text(json.dumps(content))
    assert plot_step.main([str(file), "--out", str(tmp_path / "no.png")]) == 2
    assert "has no time of strong" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("two_rungs")
def test_a_path_that_computes_something_else_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = step_checking.Check._outputs

    def wrong(self: Any, path: Any, batch: int) -> Tensor:
        outputs: Tensor = original(self, path, batch)
        return outputs * 1.001 if batch > 1 else outputs

    monkeypatch.setattr(step_checking.Check, "_outputs", wrong)
    file = tmp_path / "step.json"
    flux_step.main(["--size", "cpu", "--json", str(file), "--repeats", "1"])
    content = json.loads(file.read_text())
    assert content["ours"]["refused"] and "step_s" not in content["ours"] and "ratio" not in content
    assert content["baseline"]["step_s"] > 0


@pytest.mark.usefixtures("two_rungs")
@pytest.mark.slow
def test_a_path_that_raises_costs_no_other_and_a_second_call_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(step_paths.Strong, "update", broken)
    file = tmp_path / "step.json"
    common = ["--size", "cpu", "--json", str(file), "--repeats", "1", "--add"]
    assert flux_step.main([*common, "--only", "ours,strong"]) == 1
    assert "error: strong: RuntimeError: out of something" in capsys.readouterr().err
    content = json.loads(file.read_text())
    assert content["strong"]["failed"] == "RuntimeError: out of something" and content["ours"]["step_s"] > 0
    assert "baseline" not in content and not content["complete"]
    assert flux_step.main([*common, "--only", "baseline", "--public-images", "2"]) == 0
    added = json.loads(file.read_text())
    assert added["ours"] == content["ours"] and added["ladder"] == content["ladder"]
    assert added["baseline"]["measured_images"] == 2 and added["baseline"]["code"] == added["ours"]["code"]
    assert added["baseline"]["measured"] >= added["ours"]["measured"]
    assert added["ratio"] == pytest.approx(added["baseline"]["step_s"] / added["ours"]["step_s"])
    assert flux_step.main(["--size", "dry", *common[2:], "--only", "baseline"]) == 2
    assert "size is 'cpu' there and 'dry' here" in capsys.readouterr().err


@pytest.mark.usefixtures("two_rungs")
@pytest.mark.parametrize(("only", "apart"), [("", True), ("ours,unproved", True), ("unproved", False), ("ours", False)])
def test_unproved_levers_have_their_own_process_on_a_gpu(
    only: str, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block kernels in compiled blocks need what is set before the first kernel is called."""
    calls: list[list[str]] = []

    def run(command: list[str]) -> Any:
        calls.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(flux_step.subprocess, "run", run)
    gpu = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(flux_step.Session, "gpu", gpu, raising=False)
    memory = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    file = tmp_path / "step.json"
    arguments = ["--size", "cpu", "--json", str(file), "--only", only, "--budget-seconds", "0.001"]
    assert flux_step.main(arguments) == int(apart)
    assert [command[2:-1] for command in calls] == [
        [*arguments, "--only", "unproved", "--add", "--budget-seconds"] for _ in range(apart)
    ]


def test_a_ratio_is_of_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    session = flux_step.Session.__new__(flux_step.Session)
    monkeypatch.setattr(session, "write", lambda: None)
    session.content = {"ours": {"step_s": 1.0, "code": "new"}, "ratio": 5.0}
    session._keep("baseline", {"step_s": 3.0, "code": "old"})
    assert "ratio" not in session.content
    session._keep("baseline", {"step_s": 2.0, "code": "new"})
    assert session.content["ratio"] == 2.0


def test_a_micro_step_is_one_forward_and_backward(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    path = step_paths.Ours(size, size.config("lora", *LEVERS), CPU)
    path.rollout()
    predicted = []
    predict = step_paths.FluxPolicy.predict_halves
    monkeypatch.setattr(step_paths.FluxPolicy, "predict_halves", lambda *a: predicted.append(1) or predict(*a))
    step_measuring.one_micro_step(path)
    assert len(predicted) == 1 < path.plan.steps[0].numel() // size.together
    gradients = [p.grad for p in path.policy.module.parameters() if p.requires_grad]
    assert path.engine.updates == 0 and gradients


def test_micro_batches_fit_the_memory_there_is() -> None:
    assert [SIZES["full"].fitting(gib).together for gib in (139.8, 79.2, 79.6, 60.0, 44.5)] == [4, 3, 3, 2, 1]
    assert SIZES["small"].fitting(23.0) == SIZES["small"]
    with pytest.raises(UserError, match="this size needs 44 GiB, but this GPU has 40"):
        SIZES["full"].fitting(39.6)


@pytest.mark.slow
@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("name", ["full", "small"])
def test_counted_operations_are_those_of_the_planner(name: str, finetune: str) -> None:
    config = SIZES[name].config(finetune)
    costs = step_model.model_costs(SIZES[name], config)
    assert SIZES[name].operations(config) == (costs.forward(1).flops, costs.training(1, False).flops)


@pytest.mark.usefixtures("two_rungs")
def test_nothing_new_starts_when_the_time_is_up(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    assert flux_step.main(["--size", "cpu", "--json", str(file), "--budget-seconds", "0.001"]) == 0
    content = json.loads(file.read_text())
    assert not content["complete"] and "ours" not in content and "baseline" not in content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_size_for_gpus_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flux_step.main(["--size", "full", "--json", str(tmp_path / "step.json")]) == 2
    assert capsys.readouterr().err == "error: --size full needs a GPU; --size cpu does not\n"


def test_memory_of_a_call_is_counted() -> None:
    kept = []

    def call() -> None:
        one = torch.ones(1 << 20)
        del one
        kept.append(torch.ones(1 << 20) + 1)  # two at a time

    assert step_measuring.peak_memory(call) == pytest.approx(8 / 1024, rel=0.01)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_the_documented_ladder_is_the_committed_one(finetune: str) -> None:
    file = f"benchmarks/results/step/cpu_{finetune}.json"
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = page.partition(f"from {file} -->\n")[2].partition("<!-- end -->")[0]
    content = json.loads((ROOT / file).read_text())
    assert shown == plot_step.table(content)
    assert content["complete"] and all("step_s" in content[name] for name in ("ours", "baseline", "strong"))
