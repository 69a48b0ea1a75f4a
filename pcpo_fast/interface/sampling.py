"""``sample``: images from a pipeline or from trained runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.arguments import check_least, check_seed
from pcpo_fast.errors import UserError
from pcpo_fast.interface.configuration import (
    File,
    Reward,
    Settings,
    Source,
    load_config,
    reward_configs,
    settings_texts,
)

if TYPE_CHECKING:
    from pcpo_fast.guidance.samples import Samples

Prompts = str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]
"""A prompt, the path of a prompt file, or a list of prompts: strings, or mappings as in a JSONL file."""


def sample(
    prompts: Prompts,
    *,
    runs: File | Sequence[File] = (),
    config: Source | None = None,
    settings: Settings = (),
    scales: float | Sequence[float] = (),
    sweep: str | Sequence[float] | None = None,
    count: int = 4,
    seed: int = 0,
    steps: int | None = None,
    stochastic: bool = False,
    batch_size: int = 16,
    rewards: Reward | Sequence[Reward] = (),
    output: File | None = None,
    folder: File | None = None,
) -> "Samples":
    """Sample images with a pipeline, or with the weights of runs.

    Args:
        prompts: a string is a prompt, a ``Path`` a prompt file; or a list of prompts.
        runs: run directories whose model and export are used; several runs of one base model are composed.
        config: without ``runs``, the untrained model and the sampler; None: the demo's.
        settings: settings that take precedence over the configuration's or the runs'.
        scales: reward guidance scales, one per run or one for all: 0 is the base model, 1 the trained one.
        sweep: sample the same prompts and noise at several scales: a list, or "0,0.25,...,1.5".
        count: images per prompt.
        seed: seed of the noise.
        steps: denoising steps; None: the configuration's.
        stochastic: sample with the rollout's noise; otherwise without noise.
        batch_size: images per batch.
        rewards: rewards that score the images.
        output: also write the image grid to this file (and the plot of a sweep with rewards next to it).
        folder: also write every image to this folder.

    Raises:
        UserError: the arguments, the configuration, a run or the prompts are invalid.
    """
    runs = [runs] if isinstance(runs, str | os.PathLike) else runs
    scales = [scales] if isinstance(scales, int | float) else scales
    if sweep is not None and not isinstance(sweep, str):
        sweep = ",".join(map(str, sweep))
    check_least(1, count=count, batch_size=batch_size)
    check_seed(seed)
    if output is not None and Path(output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output: {output} must end in .png, .jpg or .webp")
    if folder is not None and output is None:
        raise UserError("--folder: also needs --output, the image file")
    if runs and config is not None:
        raise UserError("--config: a run has its own configuration, so --config and --run exclude each other")
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, os.PathLike) and not (
        listed and all(not isinstance(t, str) or t.strip() for t in listed)
    ):
        raise UserError("--prompt: must not be empty")

    from pcpo_fast.guidance.guided_runs import read_runs
    from pcpo_fast.guidance.samples import SampleRequest, make_samples, scale_settings, write_samples
    from pcpo_fast.prompts import load_prompts, prompt_of

    columns = scale_settings(len(runs), scales, sweep)
    texts = [*settings_texts(settings), *([] if steps is None else [f"sampler.steps={steps}"])]
    if runs:
        tunes = read_runs([os.fspath(run) for run in runs], texts)
        own = tunes[0].config
    else:
        tunes = []
        own = load_config(config, texts)
    if isinstance(listed, os.PathLike):
        found, place = load_prompts(os.fspath(listed), own.prompts.column), f"--prompts {listed}"
    else:
        place = "--prompt"
        found = [prompt_of(dict(one) if isinstance(one, Mapping) else {"prompt": one}, place) for one in listed]
    request = SampleRequest(found, count, seed, stochastic, batch_size, reward_configs(rewards), place)
    samples = make_samples(own, tunes, columns, request, sweep is not None)
    if output is None:
        return samples
    return replace(samples, written=write_samples(samples, Path(output), None if folder is None else Path(folder)))
