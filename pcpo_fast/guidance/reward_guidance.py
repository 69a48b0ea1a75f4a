"""Implicit reward guidance: a tuned model's output pushed towards, or beyond, what its reward taught it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pcpo_kernels import guidance
from torch import Tensor

from pcpo_fast.method.schedules import Schedule
from pcpo_fast.policies import Conditioning, Policy, PolicyOutput
from pcpo_fast.policies.fine_tunes import Predict, predicting


class RewardGuided(Policy):
    """Fine-tunes of a model composed at inference, as a policy that samplers take like any other.

    The output is ``f_ref + sum_k scale_k (f_k - f_ref)``, every ``f`` after classifier-free guidance of the same scale
    (implicit reward guidance; Lee and Ye, PCPO, 2026). One fine-tune at scale 0 is the base model and at 1 the tuned
    one, bit for bit; between them it interpolates, above 1 it extrapolates, and below 0 it moves away from the reward.

    Only what counts is run: no fine-tune of scale 0, and no reference where the scales add up to 1.
    """

    family: ClassVar[str] = "reward_guided"

    def __init__(
        self, policy: Policy, terms: Sequence[tuple[Predict, float]], reference: Predict | None = None
    ) -> None:
        """Compose outputs.

        Args:
            policy: encodes prompts, decodes images and knows the times.
            terms: what each fine-tune predicts, and its scale.
            reference: what the base model predicts; ``policy.predict`` by default.

        Raises:
            ValueError: a scale is not finite.
        """
        super().__init__(policy.module)
        self.policy = policy
        self.scales = tuple(float(scale) for _, scale in terms)
        if not all(map(math.isfinite, self.scales)):
            raise ValueError(f"scales must be finite, got {self.scales}")
        self._reference = policy.predict if reference is None else reference
        self._terms = [(predict, scale) for (predict, _), scale in zip(terms, self.scales, strict=True) if scale != 0]
        self._as_reference = False

    @classmethod
    def of(cls, policy: Policy, scale: float) -> "RewardGuided":
        """A policy under training against its own reference: adapters off, or the kept copy of its start."""
        return cls(policy, [(policy.predict, scale)], predicting(policy, policy.as_reference))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The policy's."""
        return self.policy.latent_shape

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """The policy's."""
        self.policy.prepare_prompts(prompts)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The policy's."""
        return self.policy.encode(prompts)

    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """The composed output as the only half: classifier-free guidance is inside it.

        Returns:
            [B, *latent_shape]: in float32 (float64 where an output is), or, where one model alone is run, as it says.
        """
        terms = [] if self._as_reference else self._terms
        origin = self._reference
        if terms and math.fsum(scale for _, scale in terms) == 1:
            # The reference cancels: sum_k s_k f_k = f_1 + sum_k s_k (f_k - f_1).
            (origin, _), *terms = terms
        start = origin(latents, times, conditioning)
        output = start
        for number, (predict, scale) in enumerate(terms):
            tuned = predict(latents, times, conditioning)
            wide = torch.promote_types(torch.promote_types(start.dtype, tuned.dtype), torch.float32)
            if number == 0:
                output = guidance(start, tuned, scale, dtype=wide)
            else:
                output = output.to(wide).add(tuned.to(wide) - start.to(wide), alpha=scale)
        return PolicyOutput(output, None)

    def decode(self, latents: Tensor) -> Tensor:
        """The policy's."""
        return self.policy.decode(latents)

    def schedule(self, steps: int) -> Schedule:
        """The policy's."""
        return self.policy.schedule(steps)

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Refused: outputs are composed, not weights.

        Raises:
            ValueError: always.
        """
        raise ValueError("a composition of outputs has no weights of its own to save")

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the block, the output is the base model's."""
        self._as_reference, before = True, self._as_reference
        try:
            yield
        finally:
            self._as_reference = before
