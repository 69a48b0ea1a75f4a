"""Images of a pipeline or of trained runs, as one call."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.errors import UserError
from pcpo_fast.interface.configuration import (
    File,
    Reward,
    Settings,
    Source,
    check_least,
    check_seed,
    load_config,
    reward_configs,
    settings_texts,
)

if TYPE_CHECKING:
    from pcpo_fast.guidance.samples import Samples

Prompts = str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]
"""A prompt, the path of a prompt file, or a list of prompts: texts, or mappings as a JSONL file has them."""


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
    """Make images with a pipeline, or with the weights of runs.

    Args:
        prompts: a text is a prompt, a ``Path`` a prompt file; or a list of prompts.
        runs: run directories, whose model and export are used; several of one base model are composed.
        config: without ``runs``: model and sampler, untrained; None: the demo's.
        settings: they win over the configuration's, or the runs' own.
        scales: of reward guidance, for each run or for all: 0 is the base model, 1 the trained one.
        sweep: the same prompts and noise at several scales: a list, or "0,0.25,...,1.5".
        count: images of each prompt.
        seed: of the noise.
        steps: denoising steps, the configuration's if None.
        stochastic: sample with the rollout's noise instead of without.
        batch_size: images at once.
        rewards: what the images are scored with.
        output: also write the picture into this file (of a sweep with rewards a plot beside it).
        folder: also write every image by itself.

    Raises:
        UserError: a mistake in the arguments, the configuration, the runs or the prompts.
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
        found, place = load_prompts(os.fspath(listed)), f"--prompts {listed}"
    else:
        place = "--prompt"
        found = [prompt_of(dict(one) if isinstance(one, Mapping) else {"prompt": one}, place) for one in listed]
    request = SampleRequest(found, count, seed, stochastic, batch_size, reward_configs(rewards), place)
    samples = make_samples(own, tunes, columns, request, sweep is not None)
    if output is None:
        return samples
    return replace(samples, written=write_samples(samples, Path(output), None if folder is None else Path(folder)))
