"""What the network and the VAE of a configuration cost: one forward, one forward and backward, one decoding."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.planning.models import META, Architecture, ModelOnMeta, build_on_meta
from pcpo_fast.planning.tracing import Cost, checkpointing, trace_forward, trace_training
from pcpo_fast.policies.depth import Depth
from pcpo_fast.policies.pipeline_policy import DECODED_PIXELS

FEW = 2
"""Blocks of each kind in the shallowest network: the first may save less than the others, the last differ from them."""


class ModelCosts:
    """Counted costs of a model, each counted once.

    Args:
        architecture: from :func:`pcpo_fast.planning.models.find_architecture`.
        settings: the configuration's ``model`` section; its checkpointing plays no part here.
        on_gpu: count RMS norms as GPUs run them, or as CPUs do.
    """

    def __init__(self, architecture: Architecture, settings: ModelConfig, *, on_gpu: bool = True) -> None:
        self.architecture, self.settings, self.on_gpu = architecture, settings, on_gpu
        self.model = build_on_meta(architecture, settings)
        policy = self.model.policy
        self.depth = policy.depth(architecture.parts[policy.trained_part][1])
        self._shallow = cache(self._build)
        self.forward = cache(self._forward)
        self.training = cache(self._training)
        self.decoding = cache(self._decoding)

    def _forward(self, batch: int) -> Cost:
        """One prediction without gradients for ``batch`` images (both halves of guidance)."""

        def measure(counts: tuple[int, ...]) -> Cost:
            model = self._shallow(counts)
            return trace_forward(model.policy.module, _prediction(model, batch), fused_norms=self.on_gpu)

        return from_shallow(self.depth, measure)

    def _training(self, batch: int, checkpointed: bool, keep_gradients: bool = False) -> Cost:
        """One prediction and its backward; with checkpointing what it computes twice is in ``recomputed``."""

        def measure(counts: tuple[int, ...]) -> Cost:
            model = self._shallow(counts)
            with checkpointing(model.policy, checkpointed):
                return trace_training(
                    model.policy.module,
                    _prediction(model, batch),
                    self.depth.blocks(model.policy.module, counts),
                    keep_gradients=keep_gradients,
                    fused_norms=self.on_gpu,
                )

        cost = from_shallow(self.depth, measure)
        if not checkpointed:
            return cost
        once = self.training(batch, False)
        return cost._replace(flops=once.flops, recomputed=cost.recomputed + cost.flops - once.flops)

    def training_peak(self, batch: int, checkpointed: bool, keep_gradients: bool = False) -> float:
        """Peak bytes of :attr:`training`."""
        return _affine(lambda count: self.training(count, checkpointed, keep_gradients).peak, batch)

    def partial_peak(self, batch: int, share: float, keep_gradients: bool = False) -> float:
        """Peak bytes of a training pass that recomputes a share of the blocks, spread evenly.

        The backward begins with everything that was kept, and recomputes one block on top of that.
        """
        if share in (0, 1):
            return self.training_peak(batch, bool(share), keep_gradients)
        plain = self.training_peak(batch, False, keep_gradients)
        again = self.training_peak(batch, True, keep_gradients)
        one_block = (plain - again) / max(sum(self.depth.counts) - 1, 1)
        return share * again + (1 - share) * (plain + one_block)

    def forward_peak(self, batch: int) -> float:
        """Peak bytes of :attr:`forward`."""
        return _affine(lambda count: self.forward(count).peak, batch)

    def decoding_peak(self, batch: int) -> float:
        """Peak bytes of :attr:`decoding`: the images that are decoded at once, and all images as they are joined."""
        policy = self.model.policy
        image = 4 * 3 * policy.rows * policy.columns * (policy.cell * policy.vae_scale) ** 2
        at_once = min(batch, self.decoded_at_once)
        return max(
            _affine(lambda count: self.decoding(count).peak, at_once) + (batch - at_once) * image, 3 * batch * image
        )

    def _decoding(self, batch: int) -> Cost:
        """Images of ``batch`` latents, as many at once as the policy takes."""
        policy = self.model.policy
        latents = torch.empty(batch, *policy.latent_shape, device=META)
        return trace_forward(policy.vae, lambda: policy.decode(latents), fused_norms=self.on_gpu)

    @property
    def decoded_at_once(self) -> int:
        """Images that the VAE takes at a time."""
        policy = self.model.policy
        return max(1, DECODED_PIXELS // (policy.rows * policy.columns * (policy.cell * policy.vae_scale) ** 2))

    def _build(self, counts: tuple[int, ...]) -> ModelOnMeta:
        if counts == self.depth.counts:
            return self.model
        return build_on_meta(self.architecture, self.settings, self.depth.configure(counts))


def from_shallow(depth: Depth, measure: Callable[[tuple[int, ...]], Cost]) -> Cost:
    """The cost at ``depth.counts``, of costs measured with few blocks of each kind and with one more of each."""
    base = tuple(min(count, FEW) for count in depth.counts)
    start = total = measure(base)
    for kind, (count, few) in enumerate(zip(depth.counts, base, strict=True)):
        if count > few:
            deeper = measure(tuple(n + (place == kind) for place, n in enumerate(base)))
            slope = deeper.combine(start, 1, -1)
            total = total.combine(slope, 1, count - few)
    return total


def _affine(measure: Callable[[int], float], batch: int) -> float:
    """What grows by the same amount with every image, from its values at one and two images."""
    one = measure(1)
    return one if batch == 1 else one + (measure(2) - one) * (batch - 1)


def _prediction(model: ModelOnMeta, batch: int) -> Callable[[], Tensor]:
    policy, shapes = model.policy, model.policy.conditioning_shapes(model.architecture.clip_tokens)

    def rows(count: int) -> dict[str, Tensor]:
        return {name: torch.empty(count, *shape, device=META, dtype=policy.dtype) for name, shape in shapes.items()}

    latents, times = torch.empty(batch, *policy.latent_shape, device=META), torch.empty(batch, device=META)
    conditioning = rows(batch)
    if policy.cfg_scale != 1:
        policy._negative = rows(1)

    def predict() -> Tensor:
        halves = policy.predict_halves(latents, times, conditioning)
        if halves.unconditional is None:
            return halves.conditional
        return torch.cat((halves.unconditional, halves.conditional))

    return predict
