"""``evaluate``: compare checkpoints by their images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.arguments import check_least, check_seed
from pcpo_fast.errors import UserError
from pcpo_fast.interface.configuration import (
    File,
    Reward,
    Settings,
    load_config,
    reward_configs,
    settings_texts,
)

if TYPE_CHECKING:
    from pcpo_fast.evaluation.result import Evaluation


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and its files.

    Attributes:
        result: rewards, distances and diversity of every checkpoint, with intervals.
        folder: folder of all files.
        page: path of evaluation.html.
        preference: paths of the blind comparison page and its key, if requested.
    """

    result: "Evaluation"
    folder: Path
    page: Path
    preference: tuple[Path, Path] | None

    @property
    def record(self) -> dict[str, Any]:
        """The content of evaluation.json (docs/evaluating.md)."""
        return self.result.record()


def evaluate(
    checkpoints: File | Sequence[File] | Mapping[str, File],
    *,
    config: File | None = None,
    settings: Settings = (),
    prompts: File | None = None,
    limit: int | None = None,
    count: int = 4,
    seed: int = 0,
    stochastic: bool = False,
    rewards: Reward | Sequence[Reward] = (),
    metrics: Sequence[str] | Mapping[str, File | None] = (),
    reference: File | None = None,
    resamples: int = 200,
    preference: str | tuple[str, str] | None = None,
    output: File = "runs/evaluation",
    cache: File | None = None,
    batch_size: int = 16,
    shown: int = 48,
    remake: bool = False,
) -> Evaluated | None:
    """Sample the same prompts and noise from several checkpoints, and measure rewards, distances and diversity.

    Args:
        checkpoints: "base", runs, checkpoints or exports of runs, pipelines or folders of images, optionally followed
            by ``@SCALES``; or a mapping from names to these. Differences are relative to the first.
        config: file with model and sampler of all; None: the first run's.
        settings: settings that take precedence over all configurations.
        prompts: prompt file; None: the configuration's ``prompts.heldout``.
        limit: use only the first ``limit`` prompts.
        count: images per prompt.
        seed: seed of the noise.
        stochastic: sample with the rollout's noise; otherwise without noise.
        rewards: rewards that score the images; empty: the configuration's.
        metrics: fd-dinov2, cmmd, fid, is or lpips; or a mapping to the folder, file or hub id of the metric's model.
        reference: "base" or a folder of images, the reference of distances; None: base, if it is compared.
        resamples: bootstrap resamples of distances.
        preference: two names; also write a blind comparison of them.
        output: folder of all files; existing images are not generated again.
        cache: folder of cached features, which evaluations may share; None: in ``output``.
        batch_size: images per batch.
        shown: number of prompts on the page.
        remake: replace images that were made with other settings.

    Returns:
        The result on the first rank, None on the others.

    Raises:
        UserError: an argument is invalid, or a model, reward or folder of images is unusable.
    """
    if isinstance(checkpoints, Mapping):
        texts = [f"{name}={os.fspath(what)}" for name, what in checkpoints.items()]
    else:
        listed = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
        texts = [os.fspath(what) for what in listed]
    if not texts:
        raise UserError("--checkpoint: missing; for example --checkpoint base --checkpoint runs/demo")
    check_least(1, count=count, batch_size=batch_size, limit=limit)
    check_least(0, shown=shown, resamples=resamples)
    check_seed(seed)

    from pcpo_fast.evaluation.metrics import parse_metrics

    if isinstance(metrics, Mapping):
        metrics = [name if model is None else f"{name}={os.fspath(model)}" for name, model in metrics.items()]
    wanted = parse_metrics(list(metrics))
    if reference is not None:
        reference = os.fspath(reference)
        if reference != "base" and not Path(reference).is_dir():
            raise UserError(f"--reference: {reference} is neither base nor a folder of images")

    from pcpo_fast.distributed.collectives import lone_device
    from pcpo_fast.distributed.launching import launcher_world_size
    from pcpo_fast.evaluation.candidate_images import EvaluationRequest
    from pcpo_fast.evaluation.candidates import shared_config_file
    from pcpo_fast.evaluation.evaluator import PAGE_FILE, EvaluationSettings, with_reference
    from pcpo_fast.evaluation.evaluator import evaluate as measure
    from pcpo_fast.evaluation.preference import parse_pair, write_preference
    from pcpo_fast.prompts import load_prompts

    folder = Path(output)
    measured = EvaluationSettings(
        folder,
        wanted,
        reference,
        cache=None if cache is None else Path(cache),
        batch_size=batch_size,
        resamples=resamples,
        shown=shown,
    )
    file = None if config is None else os.fspath(config)
    candidates = with_reference(texts, file, settings_texts(settings), measured)
    pair = None
    if preference is not None:
        text = preference if isinstance(preference, str) else ",".join(preference)
        pair = parse_pair(text, [one.name for one in candidates])
    shared = load_config(shared_config_file(texts) if file is None else file, settings)
    source = shared.prompts.heldout if prompts is None else os.fspath(prompts)
    if source is None:
        raise UserError("--prompts: missing; give a prompt file, since the configuration has no prompts.heldout")
    scored = reward_configs(rewards, shared.rewards) or list(shared.rewards)
    measured = replace(measured, rewards=scored, timeout=shared.scoring.timeout)
    asked = load_prompts(source, shared.prompts.column)[:limit]
    request = EvaluationRequest(asked, count, seed, stochastic, batch_size, remake)
    if launcher_world_size() > 1:
        from pcpo_fast.engine.engine import start_distributed

        device = start_distributed(shared.distributed)
    else:
        device = lone_device()
    result = measure(candidates, request, measured, device)
    if result is None:
        return None
    written = None if pair is None else write_preference(result, pair, folder)
    return Evaluated(result, folder, folder / PAGE_FILE, written)
