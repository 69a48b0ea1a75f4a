"""Where the forwards of rollout and update diverge, or those of an update with other settings or of another version."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.policies import Conditioning, Policy, select_rows
from pcpo_fast.policies.families import load_policy, load_trained_weights
from pcpo_fast.profiling.operations import ForwardComparison, Operation, compare, recorded
from pcpo_fast.prompts import load_prompts
from pcpo_fast.rollout.rollout import initial_latents, sampler_steps

_CONDITIONING = "conditioning."
"""Before the names of these tensors in a saved forward."""


@dataclass(frozen=True)
class Inputs:
    """Rows for the network: the watched one first, at the watched step; the others only share its batch.

    Attributes:
        latents: float32 [B, ...].
        steps: int64 [B].
        conditioning: B rows.
    """

    latents: Tensor
    steps: Tensor
    conditioning: Conditioning


def compare_forwards(
    config: Config, weights: Path | None, step: int | None, device: torch.device, other: Config | None = None
) -> ForwardComparison:
    """Compare the forwards of one image at one step, operation by operation.

    Without `other`, the forward of the rollout (a batch at one step, without gradients) with that of the update (a
    micro-batch of mixed steps, with gradients). With it, the forwards of the update with the two configurations.

    Args:
        config: the run.
        weights: what a checkpoint holds of the trained weights; None: the base model.
        step: step of the watched row; None: the middle one.
        device: where the policy works.
        other: the same run with other settings of the model.

    Raises:
        UserError: the model or the prompts cannot be loaded, or there is no such step.
    """
    policy, tables, texts = _loaded(config, weights, device)
    inputs = _inputs(config, policy, tables, texts, step)
    rollout_rows, update_rows = _rows(config)
    times = tables.at(0).sampler.times
    if other is None:
        with torch.no_grad(), policy.sampling(config.rollout):
            alike = inputs.steps[:1].expand(rollout_rows)
            one = _forward(policy, inputs, times[alike], rollout_rows)
        return compare(one, _forward(policy, inputs, times[inputs.steps], update_rows))
    one = _forward(policy, inputs, times[inputs.steps], update_rows)
    del policy
    changed, _, _ = _loaded(other, weights, device)
    return compare(one, _forward(changed, inputs, times[inputs.steps], update_rows))


def save_forward(config: Config, weights: Path | None, step: int | None, device: torch.device, file: Path) -> int:
    """Write the inputs of the update's forward and what every operation makes of the watched row.

    Args:
        config, weights, step, device: as for :func:`compare_forwards`.
        file: safetensors, to compare with what another version of a library, or another machine, makes of it.

    Returns:
        The number of operations.

    Raises:
        UserError: as for :func:`compare_forwards`, or the file cannot be written.
    """
    if not file.absolute().parent.is_dir():
        raise UserError(f"--save: {file.parent} is not a folder")
    policy, tables, texts = _loaded(config, weights, device)
    inputs, rows = _inputs(config, policy, tables, texts, step), _rows(config)[1]
    found = _forward(policy, inputs, tables.at(0).sampler.times[inputs.steps], rows)
    tensors = {"latents": inputs.latents, "steps": inputs.steps}
    tensors |= {_CONDITIONING + name: value for name, value in inputs.conditioning.items()}
    kept = {name: value[:rows].cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(kept, file, {"operations": json.dumps([asdict(operation) for operation in found])})
    except (SafetensorError, OSError) as error:
        raise UserError(f"--save: {file} cannot be written: {reason_of(error)}") from None
    return len(found)


def compare_with_saved(config: Config, weights: Path | None, file: Path, device: torch.device) -> ForwardComparison:
    """Compare a forward that :func:`save_forward` has written with this one of the same inputs.

    Raises:
        UserError: as for :func:`compare_forwards`; the file cannot be read, or is of another model or image size.
    """
    inputs, theirs = _saved(file, device)
    policy, tables, texts = _loaded(config, weights, device)
    table = tables.at(0).sampler
    if (
        inputs.latents.shape[1:] != torch.Size(policy.latent_shape)
        or int(inputs.steps.max()) >= table.steps
        or inputs.conditioning.keys() != policy.encode(texts[:1]).keys()
    ):
        raise UserError(f"--against: {file} is of another model, image size or number of steps")
    return compare(theirs, _forward(policy, inputs, table.times[inputs.steps], len(inputs.latents)))


def _saved(file: Path, device: torch.device) -> tuple[Inputs, Sequence[Operation]]:
    try:
        with safe_open(file, framework="pt") as opened:
            described = (opened.metadata() or {}).get("operations")
            tensors = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"--against: {file} cannot be read: {reason_of(error)}") from None
    if described is None or not {"latents", "steps"} <= tensors.keys():
        raise UserError(f"--against: {file} was not written with --save")
    operations = [Operation(**values | {"samples": tuple(values["samples"])}) for values in json.loads(described)]
    conditioning = {
        name.removeprefix(_CONDITIONING): value for name, value in tensors.items() if name.startswith(_CONDITIONING)
    }
    return Inputs(tensors["latents"], tensors["steps"], conditioning), operations


def _rows(config: Config) -> tuple[int, int]:
    """Rows of a batch of the rollout and of a micro-batch; where they are ``auto``, any two numbers that differ."""
    sizes = config.rollout.batch_size, config.train.micro_batch_size
    return tuple(few if size == AUTO else int(size) for size, few in zip(sizes, (4, 3), strict=True))  # type: ignore[return-value]


def _loaded(config: Config, weights: Path | None, device: torch.device) -> tuple[Policy, RunTables, list[str]]:
    """The policy, its tables, and the prompt of each row."""
    prompts = load_prompts(config.prompts.train, config.prompts.column)
    texts = [prompts[row % len(prompts)].text for row in range(max(_rows(config)))]
    policy = load_policy(config, device, sorted(set(texts)))
    if weights is not None:
        load_trained_weights(policy.module, config, weights)
    return policy, RunTables(config, policy.schedule(config.sampler.steps), device), texts


def _inputs(config: Config, policy: Policy, tables: RunTables, texts: list[str], step: int | None) -> Inputs:
    """Rows on their way through the sampler."""
    table, rows, device = tables.at(0).sampler, len(texts), tables.at(0).sampler.times.device
    watched = table.steps // 2 if step is None else step
    if not 0 <= watched < table.steps:
        raise UserError(f"--step: must be 0 to {table.steps - 1}, got {watched}")
    keys, seeds = (
        torch.tensor([random_key(purpose, config.seed, 0, row, 0) for row in range(rows)], device=device)
        for purpose in (Purpose.INITIAL_NOISE, Purpose.STEP_NOISE)
    )
    conditioning = {name: value.to(device) for name, value in policy.encode(texts).items()}
    latents = initial_latents(policy, keys)
    small = min(rows, _rows(config)[0])
    for first in range(0, rows, small):
        part = torch.arange(first, min(first + small, rows), device=device)
        walk = sampler_steps(policy, select_rows(conditioning, part), latents[part], seeds[part], table)
        for number, (_, after) in enumerate(walk, 1):
            if number == watched:
                latents[part] = after
                break
    steps = (watched + torch.arange(rows, device=device)) % table.steps
    return Inputs(latents, steps, conditioning)


def _forward(policy: Policy, inputs: Inputs, times: Tensor, rows: int) -> list[Operation]:
    chosen = torch.arange(rows, device=inputs.latents.device)
    halves = 1 if policy.cfg_scale == 1 else 2
    compiled = any(module._compiled_call_impl is not None for module in policy.module.modules())
    with recorded(policy.module, rows, halves, operations=not compiled) as operations:
        policy.predict_halves(inputs.latents[chosen], times[chosen], select_rows(inputs.conditioning, chosen))
    return operations
