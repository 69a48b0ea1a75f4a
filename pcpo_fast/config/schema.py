"""The typed configuration of a training run.

A value comes from, in rising order of authority: the defaults here, the algorithm preset
(:mod:`pcpo_fast.config.presets`), the YAML file, and the ``key.subkey=value`` overrides of the command line
(:mod:`pcpo_fast.config.loading`). Every field's description is what ``docs/configuration.md`` prints. Every field
has a role (:mod:`pcpo_fast.config.roles`), its section's or its own: may it change on resume, is it part of the base
model?
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from pcpo_fast.config.credit_rules import CREDIT_RULES, rules_taking
from pcpo_fast.config.roles import BASE_FILES, BASE_MODEL, CHANGEABLE, EXECUTION, RESULT, Role
from pcpo_fast.config.sampler_registry import SAMPLERS, Variance, listed, samplers_of, samplers_taking
from pcpo_fast.config.wording import counted

LARGEST = 2**31 - 1
"""Beyond any count that means something, and small enough that no product of two overflows 64 bits."""
Positive = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
ImageSide = Annotated[int, Field(ge=1, le=2**16, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Decay = Annotated[float, Field(ge=0, lt=1, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
HomePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which ``~`` is the home folder: shells expand it neither within ``key=value`` nor in a file."""

AUTO: Literal["auto"] = "auto"
"""A size that is resolved before the run starts (:mod:`pcpo_fast.planning.sizes`)."""
Checkpointing = bool | Literal["selective"]
"""What of a block is recomputed in the backward: nothing, everything, or what is cheap."""

TOTALS = ("mean", "std", "group_std")
"""Metrics ``reward/...`` of the weighted sum, which no reward can be called."""


@dataclass(frozen=True, eq=False)
class NameIn:
    """Annotates a name in a registry: one that the registry holds when the value is read."""

    registry: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.registry:
            return value
        raise PydanticKnownError("literal_error", {"expected": listed(map(repr, self.registry))})


@dataclass(frozen=True, eq=False)
class SizeOrAuto:
    """Annotates a count that may be :data:`AUTO`."""

    ge: int = 1

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> int | str:
        if value == AUTO or (type(value) is int and self.ge <= value <= LARGEST):
            return value  # type: ignore[no-any-return]
        raise PydanticCustomError("size_or_auto", f"must be an integer of at least {self.ge}, or {AUTO}")  # type: ignore[arg-type]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, a value has its own type, and it never changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)
    role: ClassVar[Role | None] = None


class LoraConfig(Section):
    """Low-rank adapters, used where ``model.finetune`` is ``lora``."""

    role = RESULT
    rank: Positive = Field(32, description="rank of the adapters")
    alpha: PositiveFloat = Field(64.0, description="scale numerator; the update is multiplied by alpha / rank")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description="linear layers that get an adapter, by the end of their name; null: the model family's usual ones",
    )
    init: HomePath | None = Field(
        None, description="folder or file of LoRA weights to start from, of any trainer (docs/lora.md)"
    )


class ModelConfig(Section):
    """Which model is trained and how its weights are held."""

    role = BASE_MODEL
    path: Annotated[HomePath, BASE_FILES] = Field(
        "assets/tiny-flux", min_length=1, description="folder or hub id of a diffusers pipeline"
    )
    revision: Annotated[str | None, Role(on_resume="by_content", base_model=True)] = Field(
        None, description="hub revision (branch, tag or commit)"
    )
    variant: str | None = Field(
        None,
        min_length=1,
        description="variant of the weight files where a part has it, such as fp16 for model.fp16.safetensors; null: "
        "the plain files, or the only variant where there are none",
    )
    transformer: Annotated[str | None, BASE_FILES] = Field(
        None,
        min_length=1,
        description="single .safetensors file of the transformer that replaces the one in `path`",
    )
    unet: Annotated[str | None, BASE_FILES] = Field(
        None,
        min_length=1,
        description="single .safetensors file of the UNet (SD 1.x), or of a whole checkpoint that contains one; it "
        "replaces the one in `path`",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the model's weights and activations")
    finetune: Annotated[Literal["full", "lora"], RESULT] = Field(
        "full", description="train every weight of the transformer or UNet, or LoRA adapters"
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)  # type: ignore[arg-type]
    base_weights: Literal["full", "nf4"] = Field(
        "full",
        description="frozen weights under LoRA: full: in `dtype`; nf4: those of the blocks' linear layers in 4 bits "
        "(bitsandbytes), for rollout and update alike (docs/lora.md); not with ZeRO-3",
    )
    height: ImageSide = Field(32, description="image height in pixels")
    width: ImageSide = Field(32, description="image width in pixels")
    guidance: NotNegativeFloat = Field(
        3.5, description="embedded guidance scale (FLUX.1-dev, FLUX.2-dev); unused by every other model"
    )
    cfg_scale: NotNegativeFloat = Field(
        1.0,
        description="classifier-free guidance scale, trained through both halves; 1: off (one forward pass instead of "
        "two)",
    )
    negative_prompt: str = Field("", description="prompt of the unconditional half")
    max_sequence_length: int = Field(
        512,
        ge=1,
        le=512,
        description="tokens per prompt that a text encoder other than CLIP reads; longer prompts are cut",
    )
    gradient_checkpointing: Annotated[Checkpointing, EXECUTION] = Field(
        False,
        description="recompute activations in the backward to save memory: true: those of whole blocks; selective: all "
        "but the results of matrix products, convolutions and attention (docs/performance.md); not with ZeRO-3",
    )
    checkpointed_share: Annotated[float | None, EXECUTION] = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the blocks that gradient_checkpointing recomputes; null: as few as the memory plan "
        "allows on this GPU, and where selective is not enough, whole blocks",
    )
    compile: Annotated[bool | Literal["auto"], EXECUTION] = Field(
        False,
        description="compile the repeated blocks (torch.compile), once for each batch size; not with ZeRO-3. auto: on "
        "a GPU, if a trial in the sizes of its batches shows that its blocks run compiled",
    )
    block_kernels: Annotated[bool, EXECUTION] = Field(
        False,
        description="use this package's fused norms, gates, rotary embeddings and SwiGLU in the blocks (FLUX.1, "
        "FLUX.2, SD3)",
    )
    attention: Annotated[str, EXECUTION] = Field(
        "native",
        description="attention backend by diffusers' name (docs/attention.md): native, flash, xformers, ...; auto: on "
        "a GPU the faster of PyTorch's own and cuDNN's, by measurement",
    )
    embedding_cache: Annotated[HomePath | None, Role(on_resume="free", in_comparison="own", per_host=True)] = Field(
        None, description="folder of encoded prompts; null: embeddings/ next to the run directories"
    )
    encode_on: Annotated[Literal["gpu", "cpu"], EXECUTION] = Field(
        "gpu",
        description="where prompts are encoded: gpu: where the network then goes; cpu: in host memory, for text "
        "encoders that do not fit the GPU (slow, but once for each prompt)",
    )

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks that are recomputed in the backward; all of them until the run has chosen how many."""
        return (self.checkpointed_share or 1.0) if self.gradient_checkpointing else 0.0


class PromptConfig(Section):
    """Where prompts come from: files, here or in a dataset on the hub (hf://datasets/OWNER/NAME/FILE)."""

    role = RESULT
    train: HomePath = Field("assets/prompts/scenes_train.txt", min_length=1, description="prompts to train on")
    heldout: HomePath | None = Field(
        "assets/prompts/scenes_heldout.txt", description="prompts to evaluate on, never trained on; null: no evaluation"
    )
    column: str | None = Field(
        None,
        min_length=1,
        description="column or key of the prompt in tables and JSON files; null: prompt, prompts, text or caption",
    )


def _choice(kind: Literal["flow", "diffusion"]) -> str:
    names = {name: SAMPLERS[name].published_as for name in samplers_of(kind)}
    return listed(f"{name} ({published})" if published else name for name, published in names.items())


def _unused(setting: str) -> str:
    names = samplers_taking(setting, taken=False)
    return f"; unused by {listed(names)}" if names else ""


class SamplerConfig(Section):
    """The stochastic sampler of the rollouts (docs/method.md)."""

    role = RESULT
    name: Annotated[str, NameIn(SAMPLERS)] = Field(
        "dance", description=f"flow models: {_choice('flow')}; diffusion models: {_choice('diffusion')}"
    )
    steps: int = Field(16, ge=2, le=1000, description="denoising steps")
    noise: PositiveFloat = Field(0.3, description="noise level eta")
    shift: PositiveFloat = Field(3.0, description=f"time shift of the grid{_unused('shift')}")
    grid: Literal["shifted", "scheduler"] = Field(
        "shifted",
        description="shifted: t = s u / (1 + (s - 1) u) on a linear u; scheduler: the pipeline's own" + _unused("grid"),
    )
    variance: Variance = Field(
        "native",
        description=f"{listed(samplers_taking('variance'))}: the noise of eta, or PCPO's that give every step the "
        "same credit",
    )
    weight: PositiveFloat | None = Field(
        None,
        description=f"{listed(samplers_taking('weight'))}: credit asked of every step by a reshaped or exact variance; "
        "null: 4.5, as published",
    )
    final_step: Literal["default", "clean", "noisy"] = Field(
        "default", description="decode the clean prediction or the noisy sample of the last step; default: as published"
    )


class WindowConfig(Section):
    """A window of steps that moves over the sampler: only its steps have noise and are trained (MixGRPO)."""

    role = RESULT
    size: NotNegative = Field(0, description="steps in the window; 0: no window, every step has noise")
    schedule: Literal["progressive", "random", "fixed"] = Field(
        "progressive",
        description="progressive: from the first step to the last; random: drawn anew each time; fixed: never moves",
    )
    start: NotNegative = Field(0, description="first step of the window at the beginning")
    stride: Positive = Field(1, description="steps by which a progressive window moves")
    interval: Positive = Field(25, description="epochs before the window moves")
    decay: NotNegativeFloat = Field(
        0.0, description="shortens the interval at position p by exp(-decay max(p - decay_after, 0))"
    )
    decay_after: NotNegative = Field(0, description="position from which the interval shortens")
    wrap: bool = Field(
        True, description="a progressive window starts over after the last position instead of staying there"
    )


def _resolved(size: int | Literal["auto"]) -> int:
    assert size != AUTO, "sizes are resolved before they are used (pcpo_fast.planning.sizes)"
    return size


class RolloutConfig(Section):
    """How many images an epoch samples, over all ranks together."""

    role = RESULT
    prompts_per_epoch: Positive = Field(4, description="prompts sampled in an epoch")
    images_per_prompt: Positive = Field(24, description="group size: images of each prompt")
    candidates: Positive | None = Field(
        None,
        description="images of each prompt that a cheaper policy samples first; the best and worst images_per_prompt "
        "of them are sampled again exactly, and trained (docs/candidates.md); null: none",
    )
    candidate_weights: Literal["fp8", "full"] = Field(
        "fp8", description="in what that policy's blocks compute: 8-bit floating point, or as the policy itself"
    )
    same_initial_noise: bool = Field(True, description="all images of a group start from the same noise")
    batch_size: Annotated[int | Literal["auto"], SizeOrAuto(), EXECUTION] = Field(
        AUTO,
        description="images sampled at once on each rank; limits memory only. auto: as many as the memory plan allows, "
        "on a CPU up to 96",
    )
    share_first_steps: Annotated[bool, EXECUTION] = Field(
        False,
        description="predict once for a prompt while all its images are still equal: up to the first step with noise",
    )
    attention: Annotated[str | None, CHANGEABLE] = Field(
        None, description="attention backend of rollouts, which need no backward; null: that of model.attention"
    )
    merge_lora: bool = Field(
        False, description="add the adapters to the weights during rollouts: faster, but in bf16 not the same policy"
    )
    offload_optimizer: Annotated[bool, EXECUTION] = Field(
        False, description="keep the optimizer's state in host memory during rollouts and rewards"
    )

    @property
    def images_at_once(self) -> int:
        """``batch_size`` of a run whose sizes are resolved."""
        return _resolved(self.batch_size)

    @property
    def candidates_in_fp8(self) -> bool:
        """Whether there are candidates, sampled with the blocks' layers in 8 bits."""
        return self.candidates is not None and self.candidate_weights == "fp8"


class CreditConfig(Section):
    """What each step counts for in the loss (docs/method.md)."""

    role = RESULT
    rule: Annotated[str, NameIn(CREDIT_RULES)] = Field("proportionate", description="credit rule")
    objective: Literal["hinge", "clip", "divergence_mask"] = Field(
        "hinge", description="log-hinge (PCPO), PPO clip, or the mask of Flow-DPPO"
    )
    clip_range: NotNegativeFloat = Field(1e-4, description="clip range of the log-ratio (hinge) or ratio (clip)")
    divergence_threshold: PositiveFloat = Field(
        1e-5,
        description="divergence_mask: KL from the old policy beyond which no step is trained further away from it",
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="reduction of inner products over latent elements")
    steps: tuple[NotNegative, ...] | None = Field(
        None,
        strict=False,
        description="steps that may be trained, counted from 0; null: every step with noise but the last",
    )
    train_last_step: bool = Field(False, description="also train the last step where its noisy sample is decoded")
    fraction: float = Field(1.0, gt=0, le=1, description="share of these steps trained per image, drawn at random")
    kl_coefficient: NotNegativeFloat = Field(0.0, description="beta of the KL to a frozen reference; 0: none")
    kl: Literal["exact", "published"] = Field(
        "exact", description="exact KL of the Gaussians, or Flow-GRPO's, which has an extra factor of the step length"
    )
    kl_reference: Literal["base", "start"] = Field(
        "base", description="what the KL is to: the base model, or the base model with the LoRA of model.lora.init"
    )
    normalize_scale: bool = Field(
        False,
        description="divide the rule's outer scale by its mean over the steps "
        f"({', '.join(rules_taking('normalize_scale'))})",
    )
    normalize_over: Literal["all", "trained"] = Field(
        "all",
        description="steps that zeta and means are taken over: all with noise, or only the trained ones (credit.steps)",
    )


class AdvantageConfig(Section):
    """How rewards become advantages."""

    role = RESULT
    normalization: Literal["group", "flow_grpo", "global", "running"] = Field(
        "group",
        description="mean and std per group; per-group mean with the epoch's std; both over the whole epoch; or from "
        "a running buffer per prompt",
    )
    clip: PositiveFloat = Field(5.0, description="advantages are clipped to plus or minus this")
    epsilon: PositiveFloat = Field(1e-8, description="added to the standard deviation")
    unbiased: bool = Field(False, description="use the sample standard deviation (n - 1); not for running")
    buffer_size: Positive = Field(16, description="running: rewards remembered of each prompt")
    min_count: Positive = Field(
        16, description="running: rewards that a prompt needs before its own statistics are used"
    )
    steps: Literal["final", "baseline", "gain"] = Field(
        "final",
        description="what a step is credited with: the image's advantage; the advantage minus what the step's own "
        "prediction led to expect; or what the step changed (docs/stepwise.md)",
    )
    gain_lambda: float = Field(
        0.0,
        ge=0,
        le=1,
        description="gain: discount at which a step is also credited with the gains of later ones, per segment "
        "of scored_steps",
    )
    gain_lambda_rise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="gain: added to gain_lambda, up to 1, whenever the rewards of predictions have risen over three "
        "evaluations but the held-out reward has not; 0: only a warning",
    )
    calibrated: bool | Literal["branches"] = Field(
        True,
        description="weight a prediction's reward by the regression of final rewards on it in earlier epochs (true), "
        "not at all (false), or weight gains by the regression measured on branches (advantage.audit_every)",
    )
    scored_steps: Positive = Field(
        1, description="score the prediction of every n-th step with noise; steps in between get the same credit"
    )
    scale: Literal["own", "others", "earlier"] = Field(
        "own",
        description="standard deviation to divide by: of the images compared, of all of them but the image itself, or "
        "the mean over earlier epochs",
    )
    control: Literal["none", "rescaled", "permuted"] = Field(
        "none",
        description="experiment control of baseline and gain: rescaled credits each step with the final advantage in "
        "the size that the credit has there; permuted makes the credit from predictions that are permuted within the "
        "group (docs/stepwise.md)",
    )
    min_spread: float = Field(
        0.1,
        ge=0,
        le=1,
        description="smallest standard deviation to divide by, as a share of its running mean; not for steps=final "
        "with scale=own",
    )
    audit_every: NotNegative = Field(
        0, description="epochs between audits by branches, which measure what a step's gain is worth; 0: none"
    )
    audit_images: Positive = Field(
        8, description="images of each audit, over all ranks; at most those of the epoch's first update"
    )

    @property
    def within_prompts(self) -> bool:
        """Whether an image is compared with the others of its prompt in the same epoch."""
        return self.normalization in ("group", "flow_grpo")


class RewardConfig(Section):
    """One reward; several are summed with their weights."""

    role = RESULT
    name: str = Field(min_length=1, description="a built-in reward, or module:function")
    label: str | None = Field(
        None, min_length=1, description="name in metrics, required if a reward is listed twice; null: `name`"
    )
    weight: float = Field(1.0, ge=-1e50, le=1e50, allow_inf_nan=False, description="factor in the sum")
    clip: tuple[Finite, Finite] | None = Field(
        None, strict=False, description="lowest and highest score that counts in the sum; null: no limits"
    )
    evaluation_only: bool = Field(False, description="measure and log it, but do not train on it")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="keyword arguments of the reward")

    @property
    def column(self) -> str:
        """What metrics and messages call this reward."""
        return self.label or self.name

    @property
    def trained_on(self) -> bool:
        """Whether the reward counts in the sum."""
        return not self.evaluation_only and self.weight != 0


class ScoringConfig(Section):
    """How several rewards are combined, when they run, and what happens if one fails (docs/rewards.md)."""

    role = RESULT
    normalize: Literal["sum", "each"] = Field(
        "sum", description="advantages of the weighted sum, or weighted sum of each reward's own advantages (GDPO)"
    )
    overlap: Annotated[bool, EXECUTION] = Field(
        False, description="score a finished batch of the rollout while the next is sampled (rollout.batch_size)"
    )
    on_failure: Literal["stop", "drop_group"] = Field(
        "stop", description="if a reward fails, stop the run, or leave that prompt's images out of the epoch"
    )
    timeout: Annotated[PositiveFloat | None, EXECUTION] = Field(
        None, description="seconds that one call of a reward may take; null: no limit"
    )


class OptimizerConfig(Section):
    """AdamW, warm-up, gradient clipping and precision."""

    role = RESULT
    lr: PositiveFloat = Field(1e-5, description="learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), strict=False, description="decay of the first and second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NotNegativeFloat = Field(1e-4, description="decoupled weight decay")
    warmup_updates: NotNegative = Field(0, description="updates over which the learning rate rises from 0")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    weights: Literal["fp32_master", "stochastic_rounding"] = Field(
        "fp32_master", description="bf16 models: keep an fp32 copy of the weights, or round bf16 updates stochastically"
    )
    moments: Literal["full", "8bit"] = Field(
        "full",
        description="full: both moments in the dtype of the weights that are stepped; 8bit: one byte each "
        "(bitsandbytes)",
    )


class TrainConfig(Section):
    """The loop."""

    role = RESULT
    epochs: Annotated[NotNegative, CHANGEABLE] = Field(
        300, description="epochs, each a rollout followed by its updates"
    )
    updates_per_epoch: Positive = Field(2, description="optimizer steps per pass, on disjoint parts of one rollout")
    inner_epochs: Positive = Field(1, description="passes over the same rollout")
    max_rollout_age: Annotated[Positive, EXECUTION] = Field(
        32,
        description="most optimizer steps on one rollout; a configuration with more (inner_epochs x updates_per_epoch) "
        "is refused",
    )
    max_log_ratio: PositiveFloat | None = Field(
        None,
        description="once the mean absolute log-ratio of a pass exceeds this, the rollout is stale and gets no further "
        "pass; null: never",
    )
    micro_batch_size: Annotated[int | Literal["auto"], SizeOrAuto(), EXECUTION] = Field(
        AUTO,
        description="(image, step) pairs in one forward and backward on each rank; divides those that a rank trains in "
        "an update. auto: as many as the memory plan allows, on a CPU up to 120",
    )
    old_output: Literal["detach", "rollout", "recompute"] = Field(
        "detach", description="what the new output is compared with (docs/method.md, Which old output)"
    )
    ema_decay: Decay | None = Field(
        None,
        description="decay of a moving average of the weights, used by evaluations and exports; null: none",
    )
    max_skipped_updates: Annotated[Positive, CHANGEABLE] = Field(
        5, description="end the run after this many updates in a row without a finite gradient"
    )

    @property
    def pairs_at_once(self) -> int:
        """``micro_batch_size`` of a run whose sizes are resolved."""
        return _resolved(self.micro_batch_size)


class EvaluationConfig(Section):
    """Held-out prompts with fixed seeds."""

    role = RESULT
    every: Annotated[NotNegative, EXECUTION] = Field(
        10, description="epochs between evaluations; 0: only before and after training"
    )
    prompts: Positive = Field(8, description="held-out prompts used")
    images_per_prompt: Positive = Field(1, description="images of each")
    seed: int = Field(1_000_003, ge=0, lt=2**63, description="seed of the images, independent of the training seed")
    deterministic: bool = Field(True, description="sample without noise (Euler), or with the rollout's sampler")
    batch_size: Annotated[Positive, EXECUTION] = Field(64, description="images sampled at once on each rank")
    kl: Annotated[bool, EXECUTION] = Field(
        False,
        description="also measure heldout/kl, the KL from the base model: one more sampling, by the rollout's sampler, "
        "with two predictions per step (docs/metrics.md); full fine-tuning keeps a copy of the base model for it",
    )
    min_diversity: Annotated[float | None, CHANGEABLE] = Field(
        None,
        gt=0,
        lt=1,
        description="stops the run when the diversity of held-out images falls below this share of its value before "
        "training; null: never",
    )


class CheckpointConfig(Section):
    """What survives a crash."""

    role = EXECUTION
    every: NotNegative = Field(10, description="epochs between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: NotNegative = Field(
        0,
        description="checkpoints with the highest held-out reward to keep besides the newest, among those written "
        "after an evaluated epoch (evaluation.every)",
    )
    grace: NotNegativeFloat = Field(
        30.0,
        description="seconds that a run has after SIGTERM or SIGINT to finish the epoch and write a checkpoint; then "
        "it exits immediately",
    )


class DistributedConfig(Section):
    """Several processes: how long they wait for each other (docs/scaling.md)."""

    role = EXECUTION
    start_timeout: PositiveFloat = Field(
        600.0, description="seconds to wait at the start for all ranks; then the run ends, naming the missing ones"
    )
    timeout: PositiveFloat = Field(
        7200.0,
        description="seconds without progress after which a run ends, naming the rank that the others wait for; "
        "a download or a slow reward on one rank counts as no progress",
    )


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl, and when the report is written."""

    role = EXECUTION
    tensorboard: bool = Field(True, description="write TensorBoard events")
    live_report: bool = Field(
        True,
        description="also write report.html during the run: at most once a minute, for at most 1 % of the time",
    )
    wandb: dict[str, JsonValue] | None = Field(
        None,
        description="Weights & Biases: a mapping of project, entity, name, group, job_type, tags, notes, mode and id, "
        "any of them, {} for the defaults; null: off",
    )
    trackio: dict[str, JsonValue] | None = Field(
        None,
        description="Trackio, a tracker on this machine: a mapping of project, name, group and space_id, any of them, "
        "{} for the defaults; null: off",
    )


class Config(Section):
    """A whole training run."""

    output_dir: Annotated[HomePath, Role(on_resume="free", in_comparison="own")] = Field(
        "runs/demo", min_length=1, description="the run directory"
    )
    seed: Annotated[int, Role(in_comparison="own")] = Field(
        0, ge=0, lt=2**63, description="determines every random number of the run"
    )
    algorithm: Annotated[str, Role(in_comparison="incidental")] = Field(
        "pcpo", description="preset for everything that is not set (docs/algorithms.md)"
    )
    deepspeed: Annotated[HomePath | None, EXECUTION] = Field(
        None,
        description="DeepSpeed JSON file (ZeRO stage, offload, ...); batch sizes, optimizer and precision are set "
        "here, not there",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)  # type: ignore[arg-type]
    prompts: PromptConfig = Field(default_factory=PromptConfig)  # type: ignore[arg-type]
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)  # type: ignore[arg-type]
    window: WindowConfig = Field(default_factory=WindowConfig)  # type: ignore[arg-type]
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)  # type: ignore[arg-type]
    rewards: Annotated[tuple[RewardConfig, ...], RESULT] = Field(
        (RewardConfig(name="caption_match"),), strict=False, description="what the policy is trained to increase"
    )
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)  # type: ignore[arg-type]
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)  # type: ignore[arg-type]
    credit: CreditConfig = Field(default_factory=CreditConfig)  # type: ignore[arg-type]
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)  # type: ignore[arg-type]
    train: TrainConfig = Field(default_factory=TrainConfig)  # type: ignore[arg-type]
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)  # type: ignore[arg-type]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # type: ignore[arg-type]
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)  # type: ignore[arg-type]
    logging: LoggingConfig = Field(default_factory=LoggingConfig)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def check_conflicts(self) -> "Config":
        """Settings that are allowed one by one must be allowed together; the first conflict is reported."""
        for conflict in self._conflicts():
            raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Each conflict as "KEY: what is wrong, and what is allowed"."""
        # A group needs two images for its mean and spread to mean anything.
        if self.advantage.within_prompts and self.rollout.images_per_prompt < 2:
            yield (
                f"rollout.images_per_prompt: {self.advantage.normalization} advantages compare the images of a prompt, "
                f"so must be at least 2, got {self.rollout.images_per_prompt} (advantage.normalization=global or "
                "running allows 1)"
            )
        # Something must be trained on, and every reward have its own column in the metrics.
        names = [reward.column for reward in self.rewards]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            yield (
                f"rewards: {repeated} is listed twice; list it once with the sum of the weights, or give each its "
                "own label"
            )
        reserved = next((name for name in names if name in TOTALS), None)
        if reserved is not None:
            yield f"rewards: {reserved} is reserved for a metric of the weighted sum ({', '.join(TOTALS)})"
        if not any(reward.trained_on for reward in self.rewards):
            yield "rewards: at least one must have a weight other than 0 and not be evaluation_only"
        wrong = next((reward for reward in self.rewards if reward.clip and reward.clip[0] >= reward.clip[1]), None)
        if wrong is not None:
            yield f"rewards: clip of {wrong.column} must be [lowest, highest], got {list(wrong.clip or ())}"
        # Diversity is the distance between held-out images of one prompt, looked at between epochs.
        evaluation = self.evaluation
        if evaluation.min_diversity is not None and (
            self.prompts.heldout is None or evaluation.images_per_prompt < 2 or evaluation.every == 0
        ):
            yield (
                "evaluation.min_diversity: needs held-out images to compare: set prompts.heldout, "
                "evaluation.images_per_prompt of 2 or more, and evaluation.every of 1 or more"
            )
        # The buffers of running advantages remember one number of an image.
        if self.scoring.normalize == "each" and self.advantage.normalization == "running":
            yield (
                "scoring.normalize: each normalises every reward separately, which advantage.normalization=running "
                "does not support; allowed with it: sum"
            )
        # Per-step credit has its conditions.
        advantage, per_prompt = self.advantage, self.rollout.images_per_prompt
        stepwise = advantage.steps != "final"
        if advantage.normalization == "running" and (stepwise or advantage.scale != "own"):
            key = f"steps: {advantage.steps}" if stepwise else f"scale: {advantage.scale}"
            yield (
                f"advantage.{key} compares images of one epoch, which advantage.normalization=running does not; "
                "allowed with it: every other normalization"
            )
        compared = per_prompt if advantage.normalization == "group" else self.images_per_epoch
        if advantage.scale == "others" and compared < 3:
            yield (
                "advantage.scale: others needs at least 3 images to compare with each other "
                f"(rollout.images_per_prompt), got {compared}"
            )
        if stepwise and advantage.calibrated == "branches":
            if advantage.gain_lambda_rise:
                yield (
                    "advantage.gain_lambda_rise leads to gain_lambda=1, where advantage.calibrated: branches has no "
                    "gains to weight; allowed: true, false"
                )
            if advantage.steps == "baseline" or advantage.gain_lambda == 1:
                yield (
                    "advantage.calibrated: branches only weights gains, and advantage.steps=baseline or "
                    "advantage.gain_lambda=1 uses none; allowed: true, false"
                )
            if advantage.audit_every == 0:
                yield "advantage.calibrated: branches needs audits; set advantage.audit_every above 0"
        if stepwise and advantage.control == "permuted" and per_prompt < 2:
            yield (
                "advantage.control: permuted permutes predictions among the images of a prompt, so "
                f"rollout.images_per_prompt must be at least 2, got {per_prompt}"
            )
        # Candidates are compared within an epoch, and chosen by a reward that a step's noise has decided.
        if self.rollout.candidates is not None:
            if self.rollout.candidates <= per_prompt:
                yield (
                    f"rollout.candidates: {self.rollout.candidates} leave nothing to choose for "
                    f"rollout.images_per_prompt={per_prompt}; allowed: more than that, or null"
                )
            if advantage.normalization == "running":
                yield (
                    "rollout.candidates are compared within an epoch, which advantage.normalization=running does not "
                    "do; allowed with them: group, flow_grpo, global"
                )
            if stepwise and (advantage.steps == "baseline" or advantage.gain_lambda == 1 or advantage.gain_lambda_rise):
                yield (
                    "rollout.candidates are chosen by their final reward, so a baseline (advantage.steps=baseline, "
                    "advantage.gain_lambda=1 or advantage.gain_lambda_rise) is not unbiased with them; allowed with "
                    "them: advantage.steps final, or gain with a gain_lambda below 1"
                )
            if self.model.base_weights == "nf4" and self.rollout.candidates_in_fp8:
                yield (
                    "rollout.candidate_weights: fp8 has no layers to change with model.base_weights=nf4; "
                    "allowed with it: full"
                )
        # Stochastic rounding is a property of bf16 weights.
        if self.optimizer.weights == "stochastic_rounding" and self.model.dtype != "bfloat16":
            yield "optimizer.weights: stochastic_rounding needs model.dtype=bfloat16"
        # What makes rollouts faster has its conditions.
        if self.rollout.share_first_steps and not self.rollout.same_initial_noise:
            yield (
                "rollout.share_first_steps: images of a prompt share their first steps only with "
                "rollout.same_initial_noise=true"
            )
        if self.rollout.merge_lora and self.model.finetune != "lora":
            yield "rollout.merge_lora: needs model.finetune=lora, without which there are no adapters to merge"
        # Four bits are for weights that nothing adds to.
        if self.model.base_weights == "nf4":
            if self.model.finetune != "lora":
                yield "model.base_weights: nf4 is for frozen weights, and needs model.finetune=lora; otherwise: full"
            if self.rollout.merge_lora:
                yield (
                    "rollout.merge_lora: true would round the adapters to the 4 bits of model.base_weights=nf4; "
                    "allowed with it: false"
                )
        # PCPO's variances are solutions for DDIM, and replace its eta.
        sampler = self.sampler
        if "variance" not in SAMPLERS[sampler.name].takes and (
            sampler.variance != "native" or sampler.weight is not None
        ):
            yield (
                f"sampler.variance: only the sampler {listed(samplers_taking('variance'))} lets you choose the "
                f"variance, not {sampler.name}"
            )
        # After many updates a rollout no longer represents the policy.
        age, limit = self.train.inner_epochs * self.train.updates_per_epoch, self.train.max_rollout_age
        if age > limit:
            yield (
                f"train.inner_epochs: {counted(self.train.inner_epochs, 'pass')} of "
                f"{counted(self.train.updates_per_epoch, 'update')} would make {counted(age, 'optimizer step')} on one "
                f"rollout, more than train.max_rollout_age allows ({limit})"
            )
        # A buffer must be able to hold as many rewards as are asked of it.
        if self.advantage.min_count > self.advantage.buffer_size:
            yield (
                f"advantage.min_count: needs {counted(self.advantage.min_count, 'reward')}, more than the buffers hold "
                f"(advantage.buffer_size={self.advantage.buffer_size})"
            )
        # The best checkpoints are found by a reward that is measured.
        if self.checkpoint.keep_best and self.prompts.heldout is None:
            yield (
                "checkpoint.keep_best: needs the reward on held-out prompts, but prompts.heldout is null; set it to a "
                "prompt file, or keep_best to 0"
            )
        # Every update of an epoch sees the same number of images.
        images = self.rollout.prompts_per_epoch * self.rollout.images_per_prompt
        if images % self.train.updates_per_epoch:
            yield (
                f"train.updates_per_epoch: {counted(images, 'image')} per epoch (rollout.prompts_per_epoch x "
                f"images_per_prompt) cannot be divided into {counted(self.train.updates_per_epoch, 'equal update')}"
            )

    @property
    def images_per_epoch(self) -> int:
        """Images sampled in an epoch over all ranks."""
        return self.rollout.prompts_per_epoch * self.rollout.images_per_prompt

    @property
    def keeps_start(self) -> bool:
        """Whether a frozen copy of the start is kept for a KL; adapters need none, they can be switched off."""
        return self.model.finetune == "full" and (self.credit.kl_coefficient > 0 or self.evaluation.kl)

    @property
    def embedding_folder(self) -> Path:
        """Where encoded prompts are kept, and what is known of the content of the model's files."""
        cache = self.model.embedding_cache
        return Path(self.output_dir).parent / "embeddings" if cache is None else Path(cache)
