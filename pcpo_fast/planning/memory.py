"""The expected peak memory of each phase of a run on one GPU, and its parts."""

from dataclasses import dataclass
from math import prod

from pcpo_fast.config.schema import Checkpointing, Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.states import WEIGHT_BYTES, Zero, optimizer_bytes, states_of
from pcpo_fast.rewards.registry import model_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU, or in one machine's host memory.

    Attributes:
        parts: bytes by part; not all parts are alive at the same time.
        phases: peak bytes by phase: the sum of the parts alive in it.
    """

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        """Peak bytes of the whole run."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def rollout_buffers(config: Config, costs: ModelCosts, ranks: int) -> dict[str, float]:
    """Bytes of rollout data that a rank keeps until the end of the update.

    Latents are float32 [images, steps + 1, ...]; outputs have the model's dtype, or float32 with classifier-free
    guidance; images are float32; embeddings of all prompts of the epoch have the model's dtype.
    """
    policy, width = costs.model.policy, WEIGHT_BYTES[config.model.dtype]
    images, elements = config.images_per_epoch // ranks, prod(policy.latent_shape)
    shapes = policy.conditioning_shapes(costs.architecture.clip_tokens)
    output = 4 if policy.cfg_scale != 1 else width
    steps = config.sampler.steps
    return {
        "trajectories": images * elements * ((steps + 1) * 4 + steps * output),
        "images": images * 3 * config.model.height * config.model.width * 4,
        "embeddings": config.rollout.prompts_per_epoch * sum(map(prod, shapes.values())) * width,
    }


def _reward_bytes(config: Config) -> dict[str, float | None]:
    return {reward.column: model_bytes(reward.name, reward.options) for reward in config.rewards}


def uncounted_rewards(config: Config) -> list[str]:
    """Rewards whose models are not in :func:`plan_memory`, because their size is not known."""
    return [name for name, size in _reward_bytes(config).items() if size is None]


def plan_memory(
    config: Config,
    costs: ModelCosts,
    zero: Zero,
    ranks: int,
    *,
    checkpointed: float | None = None,
    recomputing: Checkpointing | None = None,
    micro_batch: int | None = None,
    rollout_batch: int | None = None,
) -> MemoryPlan:
    """The memory of a run on each of ``ranks`` GPUs. Arguments that are None are taken from the configuration.

    The text encoders run first and are freed. Then the network and the VAE are loaded: the network as a whole, or with
    ZeRO-3 one weight at a time from host memory. The other phases repeat every epoch. Of reward models the weights are
    counted, where their size is known (:func:`uncounted_rewards`). A layer in four bits is dequantised whenever it is
    used, one at a time.

    ``checkpointed`` is the share of the blocks that are recomputed in the backward, and ``recomputing`` says whether as
    a whole or selectively.
    """
    checkpointed = config.model.recomputed_share if checkpointed is None else checkpointed
    micro_batch = config.train.pairs_at_once if micro_batch is None else micro_batch
    rollout_batch = config.rollout.images_at_once if rollout_batch is None else rollout_batch
    width, model = WEIGHT_BYTES[config.model.dtype], costs.model
    states = states_of(
        zero,
        ranks,
        total=model.all_parameters,
        trained=model.trained_parameters,
        weight_bytes=width,
        optimizer=optimizer_bytes(config),
    )
    rewards = {n: b for n, b in _reward_bytes(config).items() if b is not None}
    buffers = rollout_buffers(config, costs, ranks)
    kept = sum(buffers.values())
    rollout_batch = min(rollout_batch, config.images_per_epoch // ranks)
    forward = costs.forward_peak(rollout_batch)
    decode = costs.decoding_peak(rollout_batch)
    recomputing = config.model.gradient_checkpointing if recomputing is None else recomputing
    activations = costs.partial_peak(micro_batch, checkpointed, states.flat_gradient, recomputing or True)
    reference = 0.0
    if config.keeps_start:
        reference = model.network_parameters * width
    elif config.credit.kl_reference == "start":
        reference = model.trained_parameters * width
    saved = sum(count * width - packed for count, packed in model.packed_layers)
    dequantised = float(max((count * width for count, _ in model.packed_layers), default=0))
    cheaper = config.rollout.candidates_in_fp8
    eight_bit = float(model.eight_bit_bytes) if cheaper else 0.0
    weights = states.weights - saved
    loaded = float(model.network_parameters * width) - saved
    if zero.stage == 3:
        loaded = states.weights + model.largest_weight * width
    parts = {
        "weights": weights,
        "reference": reference,
        "vae": float(model.vae_parameters * width),
        "gradients": states.gradients,
        "master weights": states.master,
        "moments": states.moments,
        "moving average": states.average,
        "optimizer step": states.step,
        "activations": activations,
        "rollout forward": forward,
        "vae decode": decode,
        "reward models": sum(rewards.values()),
        **buffers,
        "communication": states.communication,
        "gathered weights": states.gathered,
        "text encoders": float(sum(model.encoders.values()) * width) if config.model.encode_on == "gpu" else 0.0,
    }
    if model.packed_layers:
        parts["dequantised layer"] = dequantised
    if cheaper:
        parts["8-bit weights"] = eight_bit
    sampling = max(forward + states.gathered + dequantised, decode)
    # Rewards move to the GPU when they are first called, and stay.
    standing = weights + reference + parts["vae"] + states.master + states.moments + states.average
    standing += parts["reward models"]
    rolling = standing + (states.gradients if states.flat_gradient else 0)
    if config.rollout.offload_optimizer:
        rolling -= states.master + states.moments + states.average
    phases = {
        "encode prompts": parts["text encoders"],
        "load": loaded + reference + parts["vae"],
        # Candidates come first, without trajectories. At the end the batches' trajectories are concatenated, and exist
        # twice.
        "rollout": rolling + max(eight_bit + sampling, kept + sampling, 2 * kept),
        "update": standing
        + states.gradients
        + kept
        + activations
        + dequantised
        + states.communication
        + states.gathered,
        "optimizer step": standing + states.gradients + kept + states.step,
    }
    return MemoryPlan(parts, phases)
