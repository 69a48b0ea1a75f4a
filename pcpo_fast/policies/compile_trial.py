"""Whether a loaded policy's blocks run compiled: ``model.compile: auto`` asks them before a run is written down."""

import gc
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
import torch._dynamo
from torch import Tensor

from pcpo_fast.config.schema import RolloutConfig
from pcpo_fast.distributed.collectives import gather_objects
from pcpo_fast.errors import reason_of
from pcpo_fast.policies.base import Conditioning, Policy, select_rows


def cause_of(error: Exception) -> Exception:
    """What went wrong within ``torch.compile``, or the error itself."""
    return getattr(error, "inner_exception", error)


def batch_sizes(rows: int, size: int) -> set[int]:
    """The sizes of batches of at most ``size`` rows: the whole ones, and that of the rest."""
    return {min(rows, size), rows % size} - {0}


@dataclass(frozen=True)
class Forwards:
    """Rows of a run's forwards: each number is compiled on its own.

    Attributes:
        sampled: in rollouts, without gradients.
        candidates: in the sampling of candidates.
        evaluated: in evaluations, with the conditioning of held-out prompts.
        compared: in updates, without gradients.
        trained: in updates, with gradients.
    """

    sampled: Collection[int]
    candidates: Collection[int]
    evaluated: Collection[int]
    compared: Collection[int]
    trained: int


def keep_compiled(
    policy: Policy, settings: RolloutConfig, conditioning: Conditioning, heldout: Conditioning, forwards: Forwards
) -> str | None:
    """Run the compiled blocks as a run will; if a rank cannot, compile none on any, and say why. Collective.

    The compiled code is what the run then uses. Nothing else is left behind: no gradients, random states or counted
    work, and the engine around the network is passed by.

    Args:
        policy: on its device, with compiled blocks and whole weights.
        settings: the configuration's section ``rollout``.
        conditioning: rows as of an epoch's prompts.
        heldout: rows as of the held-out prompts.
        forwards: what the run will run.

    Returns:
        Why nothing is compiled any more; None where all stays compiled.

    Raises:
        torch.OutOfMemoryError: on a rank that lacks memory, as it would without compilation.
    """
    mine = _problem(policy, settings, conditioning, heldout, forwards)
    reason = next((text for text in gather_objects(mine) if text is not None), None)
    if reason is not None:
        for network in (policy.module, policy.reference_module):
            for block in [] if network is None else policy.compiled_blocks(network):
                block._compiled_call_impl = None
        torch._dynamo.reset()
        gc.collect()  # an error's frames hold activations
    return reason


def _problem(
    policy: Policy, settings: RolloutConfig, conditioning: Conditioning, heldout: Conditioning, forwards: Forwards
) -> str | None:
    work = replace(policy.work)
    try:
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            _run(policy, settings, conditioning, heldout, forwards)
    except Exception as error:  # whatever the compiler, Triton or a kernel says
        cause = cause_of(error)
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        return f"the blocks cannot run compiled here: {reason_of(cause)}"
    finally:
        policy.work = work
    return None


def _run(
    policy: Policy, settings: RolloutConfig, conditioning: Conditioning, heldout: Conditioning, forwards: Forwards
) -> None:
    network, device = policy.module, policy.device

    def output(rows: int, of: Conditioning = conditioning) -> Tensor:
        latents, times = torch.zeros(rows, *policy.latent_shape, device=device), torch.ones(rows, device=device)
        chosen = torch.arange(rows) % len(next(iter(of.values())))
        given = {name: value.to(device) for name, value in select_rows(of, chosen).items()}
        return policy.predict_halves(latents, times, given).conditional

    with policy.running(network):
        with torch.no_grad():
            with policy.sampling(settings):
                if forwards.candidates:
                    with policy.cheaper(settings):
                        for rows in forwards.candidates:
                            output(rows)
                for rows in forwards.sampled:
                    output(rows)
            for rows in forwards.evaluated:
                output(rows, heldout)
            for rows in forwards.compared:
                output(rows)
        # A block's code computes all of its gradients; asked for one of each, autograd drops the others at once.
        weights = [
            [p for p in part.parameters() if p.requires_grad] for part in (*policy.compiled_blocks(network), network)
        ]
        wanted = [own[0] for own in weights if own]
        result = output(forwards.trained)
        torch.autograd.grad(result, wanted, torch.ones_like(result), allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
