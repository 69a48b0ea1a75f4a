"""Implicit reward guidance: interpolate or extrapolate between the base model's output and a tuned model's."""

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
    """Fine-tunes of one model composed at inference; samplers use it like any other policy.

    The output is ``f_ref + sum_k scale_k (f_k - f_ref)``, every ``f`` after classifier-free guidance of the same scale
    (implicit reward guidance; Lee and Ye, PCPO, 2026). One fine-tune at scale 0 is the base model and at 1 the tuned
    one, bit for bit; between them it interpolates, above 1 it extrapolates, and below 0 it moves away from the reward.

    Networks that contribute nothing are not run: a fine-tune at scale 0, or the base model if the scales sum to 1.
    """

    family: ClassVar[str] = "reward_guided"

    def __init__(
        self, policy: Policy, terms: Sequence[tuple[Predict, float]], reference: Predict | None = None
    ) -> None:
        """Compose outputs.

        Args:
            policy: encodes prompts, decodes images and provides the schedule.
            terms: each fine-tune's prediction function, and its scale.
            reference: the base model's prediction function; ``policy.predict`` by default.

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
        """Guidance of a policy in training over its own reference (adapters off, or the frozen copy of its start)."""
        return cls(policy, [(policy.predict, scale)], predicting(policy, policy.as_reference))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """As in the wrapped policy."""
        return self.policy.latent_shape

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """As in the wrapped policy."""
        self.policy.prepare_prompts(prompts)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As in the wrapped policy."""
        return self.policy.encode(prompts)

    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """The composed output as the conditional half; it already includes classifier-free guidance.

        Returns:
            [B, *latent_shape] in float32 (float64 if an output is), or in the model's dtype if only one model is run.
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
        """As in the wrapped policy."""
        return self.policy.decode(latents)

    def schedule(self, steps: int) -> Schedule:
        """As in the wrapped policy."""
        return self.policy.schedule(steps)

    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Not supported: outputs are composed, not weights.

        Raises:
            ValueError: always.
        """
        raise ValueError("a composition of outputs has no weights of its own to save")

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Predict the base model's output within the block."""
        self._as_reference, before = True, self._as_reference
        try:
            yield
        finally:
            self._as_reference = before
