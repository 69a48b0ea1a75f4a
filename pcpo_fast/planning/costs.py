"""Operations and memory of a configuration's network and VAE: a forward, a forward and backward, a decoding."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pcpo_fast.config.schema import Checkpointing, ModelConfig
from pcpo_fast.planning.models import META, Architecture, ModelOnMeta, build_on_meta
from pcpo_fast.planning.tracing import Cost, checkpointing, trace_forward, trace_training
from pcpo_fast.policies.depth import Depth

FEW = 2
"""Blocks of each kind in the shallowest traced network: the first and the last block may differ from the others."""


class ModelCosts:
    """Costs of a model, traced on the meta device and cached.

    Args:
        architecture: from :func:`pcpo_fast.planning.models.find_architecture`.
        settings: the configuration's ``model`` section; ``gradient_checkpointing`` is ignored.
        on_gpu: count RMS norms and convolutions as run on GPUs; False: as run on CPUs.
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
        """One prediction without gradients for ``batch`` images (with classifier-free guidance, both halves)."""

        def measure(counts: tuple[int, ...]) -> Cost:
            model = self._shallow(counts)
            return trace_forward(model.policy.module, _prediction(model, batch), fused_norms=self.on_gpu)

        return from_shallow(self.depth, measure)

    def _training(self, batch: int, checkpointed: Checkpointing, keep_gradients: bool = False) -> Cost:
        """One prediction and its backward; operations repeated by checkpointing are in ``recomputed``."""

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

    def training_peak(self, batch: int, checkpointed: Checkpointing, keep_gradients: bool = False) -> float:
        """Peak bytes of :attr:`training`."""
        return _affine(lambda count: self.training(count, checkpointed, keep_gradients).peak, batch)

    def partial_peak(self, batch: int, share: float, keep_gradients: bool = False, kind: Checkpointing = True) -> float:
        """Peak bytes of a training pass that recomputes a share of the blocks, spread evenly over the network.

        ``kind`` says what of them: everything, or selectively.

        At the start of the backward all saved activations are alive, plus one block that is being recomputed.
        """
        if share in (0, 1):
            return self.training_peak(batch, kind if share else False, keep_gradients)
        plain = self.training_peak(batch, False, keep_gradients)
        again = self.training_peak(batch, kind, keep_gradients)
        one_block = (plain - again) / max(sum(self.depth.counts) - 1, 1)
        return share * again + (1 - share) * (plain + one_block)

    def forward_peak(self, batch: int) -> float:
        """Peak bytes of :attr:`forward`."""
        return _affine(lambda count: self.forward(count).peak, batch)

    def decoding_peak(self, batch: int) -> float:
        """Peak bytes of :attr:`decoding`: while one chunk is decoded, or while all images are concatenated."""
        policy = self.model.policy
        image = 4 * 3 * policy.rows * policy.columns * (policy.cell * policy.vae_scale) ** 2
        at_once = min(batch, policy.decoded_at_once)
        return max(
            _affine(lambda count: self.decoding(count).peak, at_once) + (batch - at_once) * image, 3 * batch * image
        )

    def _decoding(self, batch: int) -> Cost:
        """Decoding ``batch`` latents, in chunks as the policy does."""
        policy = self.model.policy
        latents = torch.empty(batch, *policy.latent_shape, device=META)
        return trace_forward(policy.vae, lambda: policy.decode(latents), fused_norms=self.on_gpu)

    def _build(self, counts: tuple[int, ...]) -> ModelOnMeta:
        if counts == self.depth.counts:
            return self.model
        return build_on_meta(self.architecture, self.settings, self.depth.configure(counts))


def from_shallow(depth: Depth, measure: Callable[[tuple[int, ...]], Cost]) -> Cost:
    """Extrapolate the cost to ``depth.counts`` from shallow networks and from those with one more block of a kind."""
    base = tuple(min(count, FEW) for count in depth.counts)
    start = total = measure(base)
    for kind, (count, few) in enumerate(zip(depth.counts, base, strict=True)):
        if count > few:
            deeper = measure(tuple(n + (place == kind) for place, n in enumerate(base)))
            slope = deeper.combine(start, 1, -1)
            total = total.combine(slope, 1, count - few)
    return total


def _affine(measure: Callable[[int], float], batch: int) -> float:
    """Extrapolate linearly in the batch size from the values at one and two images."""
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
