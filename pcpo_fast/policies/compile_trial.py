"""Whether a loaded policy's blocks run compiled: ``model.compile: auto`` asks them before a run is written down."""

import gc
from dataclasses import replace

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


def keep_compiled(
    policy: Policy, settings: RolloutConfig, conditioning: Conditioning, sampled: int, trained: int
) -> str | None:
    """Run the compiled blocks as a run will; if a rank cannot, compile none on any, and say why. Collective.

    The compiled code is what the run then uses. Nothing else is left behind: no gradients, random states or counted
    work, and the engine around the network is passed by.

    Args:
        policy: on its device, with compiled blocks and whole weights.
        settings: the configuration's section ``rollout``.
        conditioning: rows as of an epoch's prompts.
        sampled: rows of a forward without gradients.
        trained: rows of a forward and backward.

    Returns:
        Why nothing is compiled any more; None where all stays compiled.

    Raises:
        torch.OutOfMemoryError: on a rank that lacks memory, as it would without compilation.
    """
    mine = _problem(policy, settings, conditioning, sampled, trained)
    reason = next((text for text in gather_objects(mine) if text is not None), None)
    if reason is not None:
        for network in (policy.module, policy.reference_module):
            for block in [] if network is None else policy.compiled_blocks(network):
                block._compiled_call_impl = None
        torch._dynamo.reset()
        gc.collect()  # an error's frames hold activations
    return reason


def _problem(
    policy: Policy, settings: RolloutConfig, conditioning: Conditioning, sampled: int, trained: int
) -> str | None:
    work = replace(policy.work)
    try:
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
            _run(policy, settings, conditioning, sampled, trained)
    except Exception as error:  # whatever the compiler, Triton or a kernel says
        cause = cause_of(error)
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        return f"the blocks cannot run compiled here: {reason_of(cause)}"
    finally:
        policy.work = work
    return None


def _run(policy: Policy, settings: RolloutConfig, conditioning: Conditioning, sampled: int, trained: int) -> None:
    network, device = policy.module, policy.device
    given = {name: value.to(device) for name, value in conditioning.items()}
    count = len(next(iter(given.values())))

    def output(rows: int) -> Tensor:
        latents, times = torch.zeros(rows, *policy.latent_shape, device=device), torch.ones(rows, device=device)
        return policy.predict_halves(latents, times, select_rows(given, torch.arange(rows) % count)).conditional

    with policy.running(network):
        with torch.no_grad(), policy.sampling(settings):
            if settings.candidates_in_fp8:
                with policy.cheaper(settings):
                    output(sampled)
            output(sampled)
        # A block's code computes all of its gradients; asked for one of each, autograd drops the others at once.
        weights = [
            [p for p in part.parameters() if p.requires_grad] for part in (*policy.compiled_blocks(network), network)
        ]
        wanted = [own[0] for own in weights if own]
        result = output(trained)
        torch.autograd.grad(result, wanted, torch.ones_like(result), allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
