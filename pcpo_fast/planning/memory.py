"""The expected peak of each phase of a run on one GPU, part by part."""

from dataclasses import dataclass
from math import prod

from pcpo_fast.config.schema import Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.states import WEIGHT_BYTES, Zero, optimizer_bytes, states_of


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        parts: what is in the memory at some time, by name.
        phases: the sum of the parts that are there together, for each phase of a run.
    """

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        """The highest phase."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """Name of the highest phase."""
        return max(self.phases, key=lambda name: self.phases[name])


def rollout_buffers(config: Config, costs: ModelCosts, ranks: int) -> dict[str, float]:
    """Bytes that a rank keeps of its images until the update is done.

    Latents are float32, [images, steps + 1, ...]; outputs have the model's dtype, float32 under classifier-free
    guidance; images are float32; embeddings are those of all prompts of the epoch, in the model's dtype.
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


def plan_memory(
    config: Config,
    costs: ModelCosts,
    zero: Zero,
    ranks: int,
    *,
    checkpointed: float | None = None,
    micro_batch: int | None = None,
    rollout_batch: int | None = None,
) -> MemoryPlan:
    """The memory of a run on each of ``ranks`` GPUs; what is not given is the configuration's.

    Text encoders come first and leave; then network and VAE are loaded, the network whole but under ZeRO-3, which
    takes its weights from host memory one at a time; the rest repeats every epoch. Models of rewards are not counted.

    ``checkpointed`` is the share of the blocks that are recomputed in the backward.
    """
    checkpointed = config.model.recomputed_share if checkpointed is None else checkpointed
    micro_batch = config.train.micro_batch_size if micro_batch is None else micro_batch
    rollout_batch = config.rollout.batch_size if rollout_batch is None else rollout_batch
    width, model = WEIGHT_BYTES[config.model.dtype], costs.model
    states = states_of(
        zero,
        ranks,
        total=model.all_parameters,
        trained=model.trained_parameters,
        weight_bytes=width,
        optimizer=optimizer_bytes(config),
    )
    buffers = rollout_buffers(config, costs, ranks)
    kept = sum(buffers.values())
    rollout_batch = min(rollout_batch, config.images_per_epoch // ranks)
    forward = costs.forward_peak(rollout_batch)
    decode = costs.decoding_peak(rollout_batch)
    activations = costs.partial_peak(micro_batch, checkpointed, states.flat_gradient)
    reference = 0.0
    if config.credit.kl_coefficient > 0 and config.model.finetune == "full":
        reference = model.network_parameters * width
    loaded = float(model.network_parameters * width)
    if zero.stage == 3:
        loaded = states.weights + model.largest_weight * width
    parts = {
        "weights": states.weights,
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
        **buffers,
        "communication": states.communication,
        "gathered weights": states.gathered,
        "text encoders": float(sum(model.encoders.values()) * width),
    }
    standing = states.weights + reference + parts["vae"] + states.master + states.moments + states.average
    rolling = standing + (states.gradients if states.flat_gradient else 0)
    if config.rollout.offload_optimizer:
        rolling -= states.master + states.moments + states.average
    phases = {
        "encode prompts": parts["text encoders"],
        "load": loaded + reference + parts["vae"],
        # At the end the batches' trajectories are joined, and are there twice.
        "rollout": rolling + max(kept + max(forward + states.gathered, decode), 2 * kept),
        "update": standing + states.gradients + kept + activations + states.communication + states.gathered,
        "optimizer step": standing + states.gradients + kept + states.step,
    }
    return MemoryPlan(parts, phases)
