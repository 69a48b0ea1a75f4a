"""The interface between the training loop and model families; one subclass per family."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pcpo_kernels import guidance
from torch import Tensor, nn

from pcpo_fast.config.schema import RolloutConfig
from pcpo_fast.method.schedules import Schedule
from pcpo_fast.policies.lora import only_adapter

Conditioning = dict[str, Tensor]
"""Named tensors with one row per image; rows are chosen with :func:`select_rows`."""


def select_rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The given rows of every tensor."""
    return {name: value.index_select(0, rows.to(value.device)) for name, value in conditioning.items()}


class PolicyOutput(NamedTuple):
    """The network's prediction: one output, or the two halves of classifier-free guidance before they are combined.

    Attributes:
        conditional: [B, *latent_shape] in the model's dtype.
        unconditional: the same for the negative prompt; None without classifier-free guidance.
    """

    conditional: Tensor
    unconditional: Tensor | None


@dataclass
class PolicyWork:
    """Work done by a policy on this rank, in rows; each half of classifier-free guidance counts as one.

    Attributes:
        forwards: network passes without gradients.
        trained: network passes with gradients, each followed by a backward pass.
        decodes: images decoded.
    """

    forwards: int = 0
    trained: int = 0
    decodes: int = 0

    def count_network(self, rows: int) -> None:
        """Count a pass of `rows` rows, by whether gradients are being recorded."""
        if torch.is_grad_enabled():
            self.trained += rows
        else:
            self.forwards += rows


class Policy(ABC):
    """A generative model as a policy: maps conditioning and noisy latents to model output.

    Attributes:
        module: the network that is trained.
        forward_module: called by :meth:`predict`; the engine sets its wrapper of ``module`` here.
        reference_module: frozen copy of the initial network, if one is needed.
        work: counts of network passes and decodes.
        cfg_scale: scale of classifier-free guidance; 1: off.
        repeated_blocks: classes of the network's repeated blocks; None: those that diffusers declares.
        also_recomputed: classes of further blocks whose activations diffusers can recompute in the backward.
        accelerated: classes of the blocks that this package's kernels support.
        idle_layers: what is in the names of layers that an image of a prompt alone never runs; they are not trained.
    """

    family: ClassVar[str]
    repeated_blocks: ClassVar[tuple[str, ...] | None] = None
    also_recomputed: ClassVar[tuple[str, ...]] = ()
    accelerated: ClassVar[tuple[str, ...]] = ()
    idle_layers: ClassVar[tuple[str, ...]] = ()
    cfg_scale: float = 1.0

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward_module: nn.Module = module
        self.reference_module: nn.Module | None = None
        self.work = PolicyWork()

    @classmethod
    def compiled_blocks(cls, network: nn.Module) -> list[nn.Module]:
        """The blocks of a network of this family that ``model.compile`` compiles, each by itself."""
        return cls._modules(network, cls._repeated(network))

    @classmethod
    def recomputed_blocks(cls, network: nn.Module) -> list[nn.Module]:
        """The blocks of a network of this family that ``model.gradient_checkpointing`` can recompute."""
        return cls._modules(network, (*cls._repeated(network), *cls.also_recomputed))

    @classmethod
    def accelerated_blocks(cls, network: nn.Module) -> list[nn.Module]:
        """The blocks of a network of this family that ``model.block_kernels`` can accelerate."""
        return cls._modules(network, cls.accelerated)

    @classmethod
    def _repeated(cls, network: nn.Module) -> tuple[str, ...]:
        named: Any = getattr(network, "_repeated_blocks", ())  # of diffusers' ModelMixin
        return tuple(named) if cls.repeated_blocks is None else cls.repeated_blocks

    @classmethod
    def _modules(cls, network: nn.Module, classes: tuple[str, ...]) -> list[nn.Module]:
        named = network.named_modules()
        return [module for name, module in named if type(module).__name__ in classes and not cls.is_idle(name)]

    @classmethod
    def is_idle(cls, name: str) -> bool:
        """Whether a layer or weight of this name is one of :attr:`idle_layers`."""
        return any(part in name for part in cls.idle_layers)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the network's weights."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents as the sampler sees them."""

    @abstractmethod
    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts in advance, so that :meth:`encode` needs no text encoder for them. Collective."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, on the CPU. Collective; all ranks must pass the same prompts."""

    @abstractmethod
    def predict_halves(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """The network's prediction, before guidance.

        Args:
            latents: [B, *latent_shape], any float dtype.
            times: [B], 1 noise to 0 image; rows may differ.
            conditioning: B rows.
        """

    def combine(self, halves: PolicyOutput) -> Tensor:
        """The output after guidance: a single half unchanged, or both combined in float32 (float64 for a float64
        model) with the policy loss's arithmetic.
        """
        if halves.unconditional is None:
            return halves.conditional
        dtype = torch.promote_types(halves.conditional.dtype, torch.float32)
        return guidance(halves.unconditional, halves.conditional, self.cfg_scale, dtype=dtype)

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Model output after guidance; arguments as for :meth:`predict_halves`.

        Returns:
            [B, *latent_shape], in the model's dtype, or in float32 with classifier-free guidance.
        """
        return self.combine(self.predict_halves(latents, times, conditioning))

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in 0..1, from clean latents [B, *latent_shape]."""

    @abstractmethod
    def schedule(self, steps: int) -> Schedule:
        """The times of the pipeline's own scheduler, as a schedule of the model's kind."""

    @abstractmethod
    def save_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write trained weights, by parameter name, in diffusers' format: a LoRA file, or a model folder."""

    @contextmanager
    def sampling(self, settings: RolloutConfig) -> Iterator[None]:
        """Context of an epoch's rollouts: a family may run its network differently when no gradients are needed."""
        yield

    @contextmanager
    def cheaper(self, settings: RolloutConfig) -> Iterator[None]:
        """Context of the sampling of candidates, within :meth:`sampling`: a family may make its network cheaper."""
        yield

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Within the block, :meth:`predict` runs another network of the same class."""
        own, self.forward_module = self.forward_module, network
        try:
            yield
        finally:
            self.forward_module = own

    def as_reference(self) -> AbstractContextManager[None]:
        """Within the block, :meth:`predict` is the reference: the copy of the initial network, or adapters disabled.

        Raises:
            ValueError: there is neither a copy nor an adapter, so the reference would be the policy itself.
        """
        return only_adapter(self.module, None) if self.reference_module is None else self.running(self.reference_module)
