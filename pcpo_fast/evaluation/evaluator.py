"""A whole evaluation: sampling, scores, metrics, and the files written."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from pcpo_fast.config.schema import ScoringConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import barrier, naming_lost_ranks, rank, shared_errors, world_size
from pcpo_fast.engine.engine import stop_distributed
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.evaluation.candidate_images import EvaluationRequest, EvaluationSettings, make_images
from pcpo_fast.evaluation.candidates import BASE, Candidate, read_candidates, shared_config_file
from pcpo_fast.evaluation.evaluation_page import evaluation_page
from pcpo_fast.evaluation.image_sets import ImageSet, folder_of_images
from pcpo_fast.evaluation.matching import Matched, match
from pcpo_fast.evaluation.metrics import OF_REFERENCE, Measuring, MetricColumn
from pcpo_fast.evaluation.result import Evaluation, RewardColumn
from pcpo_fast.evaluation.result_tables import evaluation_markdown
from pcpo_fast.evaluation.trade_off_figures import curves, points, trade_off_figure
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.rewards import RewardSet

JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "evaluation.json", "evaluation.md", "evaluation.html"
FIGURE_FILE = "reward_distance.png"


def with_reference(
    texts: Sequence[str], config: str | None, overrides: Sequence[str], settings: EvaluationSettings
) -> list[Candidate]:
    """The candidates, with the base model added if it is the reference.

    Raises:
        UserError: as :func:`pcpo_fast.evaluation.candidates.read_candidates`, or a distance has no reference.
    """
    found = read_candidates(texts, config, overrides)
    base = any(one.kind == "base" for one in found)
    if settings.reference == BASE and not base:
        shared = shared_config_file(texts) if config is None else config
        found = [*read_candidates([BASE], shared, overrides), *found]
    elif settings.reference is None and not base:
        asked = [name for name in settings.metrics if name in OF_REFERENCE]
        if asked:
            raise UserError(
                f"--metric {asked[0]}: a distance needs a reference: --reference FOLDER of images, --reference base, "
                "or --checkpoint base among the checkpoints"
            )
    return found


def evaluate(
    candidates: Sequence[Candidate], request: EvaluationRequest, settings: EvaluationSettings, device: torch.device
) -> Evaluation | None:
    """Sample the images, measure them and write all files; all ranks must call it.

    Returns:
        The result on the first rank; None on the others, which only help to sample.

    Raises:
        UserError: a model, reward or folder of images is unusable, the GPU runs out of memory, or another rank has
            died.
    """
    try:
        with naming_lost_ranks():
            return _evaluate(candidates, request, settings, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory: lower --batch-size, which is {settings.batch_size} ({reason_of(error)})"
        ) from error


def _evaluate(
    candidates: Sequence[Candidate], request: EvaluationRequest, settings: EvaluationSettings, device: torch.device
) -> Evaluation | None:
    first = rank() == 0
    reference = None
    with shared_errors():
        scoring = ScoringConfig(timeout=settings.timeout)  # type: ignore[call-arg]
        rewards = RewardSet(settings.rewards if first else (), scoring)
        rewards.check_prompts(request.prompts, "--prompts")
        if settings.reference not in (None, BASE):
            reference = folder_of_images(Path(str(settings.reference)), str(settings.reference), "--reference")
    sets = make_images(candidates, request, settings.output / "images", device)
    barrier()
    if world_size() > 1:
        stop_distributed()  # scoring may take longer than the collectives' timeout, and needs no other rank
    if not first:
        return None
    base = next((images for one, images in zip(candidates, sets, strict=True) if one.kind == "base"), None)
    if reference is None and base is not None and any(name in OF_REFERENCE for name in settings.metrics):
        reference = base
    columns = _rewards(rewards, settings, sets, request, device)
    measuring = Measuring(settings, request, reference, device)
    metrics = measuring.columns(sets)
    result = Evaluation(
        request.prompts,
        request.count,
        request.seed,
        candidates,
        sets,
        None if reference is None else reference.name,
        columns,
        metrics,
        matched(candidates, columns, metrics),
        _notes(measuring.notes, request, reference, base),
    )
    write_evaluation(result, settings.output, settings.shown)
    return result


def matched(
    candidates: Sequence[Candidate], rewards: Sequence[RewardColumn], columns: Sequence[MetricColumn]
) -> list[Matched]:
    """The runs' distances at equal reward, for every pair of a reward and a distance."""
    members = curves(candidates)
    found = [
        match(reward.name, column.key, {name: points(ordered, reward, column) for name, ordered in members.items()})
        for reward in rewards
        for column in columns
        if column.kind == "distance"
    ]
    return [one for one in found if one is not None]


def write_evaluation(result: Evaluation, folder: Path, shown: int) -> None:
    """Write evaluation.json, evaluation.md, evaluation.html and the figure, each file atomically."""
    write_atomically(folder / JSON_FILE, json.dumps(result.record(), indent=1, allow_nan=False, ensure_ascii=False))
    figure = trade_off_figure(result)
    if figure is not None:
        save_figure(figure, folder / FIGURE_FILE)
    else:
        (folder / FIGURE_FILE).unlink(missing_ok=True)
    write_atomically(folder / MARKDOWN_FILE, evaluation_markdown(result, [FIGURE_FILE] if figure is not None else []))
    write_atomically(folder / PAGE_FILE, evaluation_page(result, shown))


def _rewards(
    rewards: RewardSet,
    settings: EvaluationSettings,
    sets: Sequence[ImageSet],
    request: EvaluationRequest,
    device: torch.device,
) -> list[RewardColumn]:
    found = {name: {one.name: list[float]() for one in sets} for name in rewards.names}
    for one in sets:
        rows = iter(request.repeated)
        for batch in one.batches(settings.batch_size):
            alike = len({image.shape for image in batch}) == 1
            for images in [batch] if alike else [[image] for image in batch]:
                prompts = list(itertools.islice(rows, len(images)))
                texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
                components = rewards.score(torch.stack(images).to(device), texts, metadata).components
                for name in rewards.names:
                    found[name][one.name] += components[name].tolist()
    return [RewardColumn(name, scores, request.count) for name, scores in found.items()]


def _notes(
    measured: Sequence[str], request: EvaluationRequest, reference: ImageSet | None, base: ImageSet | None
) -> list[str]:
    notes = list(dict.fromkeys(measured))
    if reference is not None and reference is base:
        notes.append(
            "Distances are to the base model's images for the same prompts and noise: the base model itself has 0, and "
            "a smaller distance does not mean better images than the base model's."
        )
    if len(request.prompts) < 5:
        notes.append(f"{counted(len(request.prompts), 'prompt')}: with so few, the 95 % intervals are too narrow.")
    return notes
