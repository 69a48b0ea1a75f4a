"""The parts of one epoch on the tiny pipeline, for the tests of update, engine and checkpoints."""

from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from tiny_pipeline import PROMPTS
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.engine import Engine
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.method.transitions import Transitions
from pcpo_fast.policies import Policy
from pcpo_fast.policies.families import keep_reference, load_policy
from pcpo_fast.rollout.epoch_plan import accumulation_steps, plan_epoch
from pcpo_fast.rollout.rollout import Rollout, collect_rollout
from pcpo_fast.training.update import Update

CPU = torch.device("cpu")
LORA = ("model.finetune=lora", "model.lora.rank=4", "model.lora.alpha=8")


def randomize_adapters(policy: Policy) -> None:
    """Set the adapters to random values, because LoRA starts as the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.module.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained_parameters(policy: Policy) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.module.named_parameters() if p.requires_grad}


@dataclass
class Bench:
    """Policy, engine and one epoch's rollout at a time, without the trainer around them.

    Attributes:
        at: sampler, credit and trained steps of the latest epoch.
        rollout: its images.
        advantages: random numbers, [n].
        weights: all weights before each optimizer step.
        gradients: what the engine accumulated for each optimizer step, before clipping.
    """

    config: Config
    policy: Policy
    engine: Engine
    tables: RunTables
    at: EpochTables = field(init=False)
    rollout: Rollout = field(init=False)
    advantages: Tensor = field(init=False)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def build(cls, config: Config, *, record: bool = True) -> "Bench":
        policy = load_policy(config, CPU)
        randomize_adapters(policy)
        tables = RunTables(config, policy.schedule(config.sampler.steps), CPU)
        policy.prepare_prompts(PROMPTS)
        keep_reference(policy, config, CPU)
        engine = Engine(policy.module, config, accumulation_steps(config, tables.trained_count, 1))
        policy.forward_module = engine.module
        bench = cls(config, policy, engine, tables)
        if record:
            bench._record()
        bench.collect(0)
        return bench

    @property
    def transitions(self) -> Transitions:
        """The stochastic sampler."""
        return self.tables.transitions

    def collect(self, epoch: int) -> None:
        """Sample an epoch's images."""
        self.at = self.tables.at(epoch)
        plan = plan_epoch(self.config, len(PROMPTS), self.at.steps, epoch, 0, 1)
        settings, seed = self.config.rollout, self.config.seed
        self.rollout = collect_rollout(self.policy, self._encode, plan, settings, self.at.sampler, seed)
        generator = torch.Generator().manual_seed(2 + epoch)
        self.advantages = torch.randn(len(self.rollout.seeds), generator=generator).double()

    def update(self) -> Update:
        """The epoch's update, ready to run."""
        at = self.at
        return Update(self.policy, self.engine, self.rollout, self.advantages, at.sampler, at.credit, self.config)

    def run(self) -> list[dict[str, float]]:
        """All optimizer steps of the epoch, and their metrics."""
        return list(self.update().run())

    def epochs(self, first: int, end: int) -> list[dict[str, float]]:
        """Metrics of all optimizer steps of some epochs."""
        records = []
        for epoch in range(first, end):
            self.collect(epoch)
            records += self.run()
        return records

    def _encode(self, indices: list[int]) -> dict[str, Tensor]:
        return self.policy.encode([PROMPTS[index] for index in indices])

    def _record(self) -> None:
        step = self.engine.step

        def recording() -> None:
            if self.engine.deepspeed.is_gradient_accumulation_boundary():
                self.weights.append({name: p.detach().clone() for name, p in self.policy.module.named_parameters()})
                trained: Any = trained_parameters(self.policy)
                self.gradients.append({name: safe_get_full_grad(p).clone() for name, p in trained.items()})
            step()

        self.engine.step = recording  # type: ignore[method-assign]
