"""Within a phase the host runs ahead of the GPU: it reads no value and copies nothing there until the phase is over."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed, and the policies are made of its models")
pytest.importorskip("deepspeed", reason="deepspeed is not installed, and the update is its engine's")

from tiny_pipeline import PROMPTS, tiny_config
from tiny_pipelines import EMBEDDED_RUN, FLOW_RUN, SD3_RUN, SD_RUN
from tiny_runs import CPU, LORA, Bench
from torch import Tensor
from waits import Waits

from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.policies.families import keep_reference, load_policy
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.rollout.epoch_plan import plan_epoch
from pcpo_fast.rollout.rollout import collect_rollout
from pcpo_fast.training.update import Update

META, GPU = torch.device("meta"), torch.device("cuda", 0)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "flux_lora_kl": ("pipeline_folder", (*LORA, "credit.kl_coefficient=0.04", "train.inner_epochs=2")),
    "flux_guided": (
        "pipeline_folder",
        ("model.cfg_scale=2.0", "train.old_output=recompute", "rollout.share_first_steps=true"),
    ),
    "flux3_lora": ("flux3_folder", (*SD3_RUN, *LORA)),
    "klein_lora": ("klein_folder", (*SD3_RUN, *LORA)),
    "flux2_dev_lora": ("flux2_dev_folder", (*EMBEDDED_RUN, *LORA)),
    "krea2_lora": ("krea2_folder", (*SD3_RUN, *LORA)),
    "qwen_image_lora": ("qwen_image_folder", (*FLOW_RUN, *LORA)),
    "z_image_lora": ("z_image_folder", (*SD3_RUN, *LORA)),
    "sd3": ("sd3_folder", SD3_RUN),
    "sd": ("sd_folder", (*SD_RUN, "train.old_output=rollout")),
}

LAST = "transformer_blocks.1"
UNREACHED = {"qwen_image_lora": tuple(f"{LAST}.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))}
"""Parameters that the output does not depend on: those of the last block's text."""


class Batches:
    """Lets waits count within the ranges that are repeated: batches of a rollout, micro-steps of an update."""

    def __init__(self, waits: Waits, device: torch.device = CPU) -> None:
        self.waits, self.device, self.seen = waits, device, 0
        waits.within = False

    def begin(self, name: profiler_ranges.Name) -> None:
        if name in ("batch", "micro-step"):
            self.seen += 1
            self._count(True)

    def end(self, name: profiler_ranges.Name) -> None:
        if name in ("batch", "micro-step"):
            self._count(False)

    def _count(self, within: bool) -> None:
        self.waits.within = within
        if self.device == GPU:  # PyTorch's own watch, which raises
            torch.cuda.set_sync_debug_mode("error" if within else "default")


class Accelerator:
    """A policy on a device, and an engine that does nothing but compute the gradients there."""

    def __init__(self, device: torch.device, folder: Any, *overrides: str) -> None:
        self.device = device
        self.config = tiny_config(folder, *overrides, "rollout.batch_size=3", "train.micro_batch_size=4")
        load_policy(self.config, CPU, PROMPTS)  # fills the cache of encoded prompts
        self.policy: Any = load_policy(self.config, device)
        keep_reference(self.policy, self.config, device)
        self.tables = RunTables(self.config, self.policy.schedule(self.config.sampler.steps), device)
        self.at = self.tables.at(0)
        self.last_step = SimpleNamespace(applied=True, grad_norm=1.0, lr=1.0)

    def rollout(self) -> Any:
        plan = plan_epoch(self.config, len(PROMPTS), self.at.steps, 0, 0, 1)
        settings, seed = self.config.rollout, self.config.seed
        with self.policy.sampling(settings):
            return collect_rollout(
                self.policy, self._encode, plan, settings, self.at.sampler, seed, lambda rows, images: None
            )

    def update(self, rollout: Any) -> Update:
        advantages = torch.ones(len(rollout.seeds))
        engine: Any = self
        return Update(self.policy, engine, rollout, advantages, self.at.sampler, self.at.credit, self.config)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def _encode(self, indices: list[int]) -> dict[str, Tensor]:
        return dict(self.policy.encode([PROMPTS[index] for index in indices]))


@pytest.mark.parametrize("device", [META, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow if name != "flux_lora_kl" else ()) for name in CASES],
)
def test_a_rollout_and_an_update_run_ahead_of_the_device(
    case: str, device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = CASES[case]
    accelerator = Accelerator(device, request.getfixturevalue(folder), *settings)
    monkeypatch.setattr(
        "pcpo_fast.training.step_statistics.StepStatistics.metrics", lambda _: {"policy/log_ratio_abs": 0.0}
    )
    accelerator.rollout()  # what is kept from the first batch on, such as the unconditional half's encoding
    with Waits() as waits, profiler_ranges.listening(batches := Batches(waits, device)):
        rollout = accelerator.rollout()
        assert batches.seen == 3
        records = list(accelerator.update(rollout).run())
    assert rollout.images.device == device and len(records) >= 2
    assert batches.seen > 3 + len(records)
    trained = {name: p for name, p in accelerator.policy.module.named_parameters() if p.requires_grad}
    assert [
        name for name, p in trained.items() if p.grad is None and not name.startswith(UNREACHED.get(case, ()))
    ] == []
    assert waits.found == []


def test_reading_and_copying_are_found() -> None:
    """The test of the tests: every way that the host can wait."""
    there = torch.ones(3, device=META)
    with Waits() as waits:
        torch.ones(3).to(META)
        there.copy_(torch.ones(3))
        torch.tensor([1.0], device=META)
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        bool(torch.ones(1) > 0)
        there + 1.0
        torch.full_like(there, 2.0)
    names = [line.split(": ")[0].removeprefix("aten::") for line in waits.found]
    assert names == ["_to_copy", "copy_", "tensor", "_local_scalar_dense", "nonzero", "_local_scalar_dense"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [None, 1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_engine_reads_nothing_before_the_optimizer_step(
    pipeline_folder: Any, tmp_path: Any, stage: int | None
) -> None:
    """DeepSpeed's part; on a CPU, where a value that is read is a wait on a GPU. Stage None: without a JSON."""
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    file = () if stage is None else (f"deepspeed={tmp_path / 'ds.json'}",)
    settings = (*LORA, *file, "train.micro_batch_size=3", "train.updates_per_epoch=1")
    bench = Bench.build(tiny_config(pipeline_folder, *settings), record=False)
    bench.run()  # DeepSpeed learns the order of the blocks from the first passes
    bench.collect(1)
    found: list[list[str]] = []
    with Waits() as waits, profiler_ranges.listening(Batches(waits)):
        step = bench.engine.step

        def counting() -> None:
            step()
            found.append(list(waits.found))
            waits.found.clear()

        bench.engine.step = counting  # type: ignore[method-assign]
        bench.run()
    assert len(found) > 3
    assert found[:-1] == [[]] * (len(found) - 1)
    assert found[-1], "the norm of the gradients, at the end of the update"
