"""Images of a prompt set with fixed noise, for each candidate; images that already exist are reused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pcpo_fast.config.schema import RewardConfig
from pcpo_fast.distributed.collectives import barrier, gather_objects, once_per_machine, rank, shared_errors, world_size
from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.candidates import Candidate
from pcpo_fast.evaluation.image_sets import ImageSet, folder_of_images
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import RECORD_FOLDER, Contents, different, digest, is_weights, weights_digest
from pcpo_fast.guidance.guided_runs import SHARED, guided_policies
from pcpo_fast.policies import Policy
from pcpo_fast.policies.families import find_family, load_policy, model_files
from pcpo_fast.reporting.grids import image_bytes, to_image
from pcpo_fast.reporting.progress import StepProgress
from pcpo_fast.rollout.generation import ImageRequest, sample_rows

RECIPE_FILE = "recipe.json"
BASE_KEYS = ("path", "revision", "variant", "transformer", "unet")
"""Settings that locate the base model's weights. They are not compared; the contents they point to are."""


@dataclass(frozen=True)
class EvaluationRequest(ImageRequest):
    """The images to evaluate.

    Attributes:
        remake: delete existing images that were made with other settings, instead of raising an error.
    """

    remake: bool = False

    @property
    def names(self) -> list[tuple[int, int]]:
        """(prompt index, image index) of all images, prompt-major."""
        return [(prompt, image) for prompt in range(len(self.prompts)) for image in range(self.count)]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on the images of a :class:`EvaluationRequest`, and where the results go.

    Attributes:
        output: folder for everything that is written.
        metrics: from :func:`pcpo_fast.evaluation.metrics.parse_metrics`.
        reference: ``base``, or a folder of images; None: the base model if it is among the candidates.
        rewards: the rewards that score the images.
        cache: folder of cached features; None: ``features/`` in the output.
        batch_size: images per batch in rewards and metrics.
        resamples: bootstrap resamples for the intervals of distances.
        shown: number of prompts shown on the page.
        timeout: time limit of one reward call in seconds; None: no limit.
    """

    output: Path
    metrics: dict[str, str | None]
    reference: str | None
    rewards: Sequence[RewardConfig] = field(default_factory=tuple)
    cache: Path | None = None
    batch_size: int = 32
    resamples: int = 200
    shown: int = 48
    timeout: float | None = None


def make_images(
    candidates: Sequence[Candidate], request: EvaluationRequest, folder: Path, device: torch.device
) -> list[ImageSet]:
    """Sample the missing images and return every candidate's images. All ranks must call it; they share the work.

    Args:
        candidates: the models to sample from; folders of finished images are only read.
        request: which images.
        folder: ``folder/NAME/`` receives the images, ``PROMPT_IMAGE.png`` numbered from 0, and ``recipe.json``.
        device: this rank's device.

    Raises:
        UserError: a model cannot be loaded, or a folder holds images made with other settings.
    """
    sets: dict[str, ImageSet] = {}
    for group in _groups(candidates):
        if group[0].kind == "images":
            for one in group:
                option = f"--checkpoint {one.path!r}"
                sets[one.name] = folder_of_images(
                    Path(one.path).expanduser(), one.name, option, len(request.names), request.captions
                )
            continue
        with shared_errors():
            recipes = [recipe(one, request) for one in group]
        contents = once_per_machine(partial(contents_of, group))
        recipes = [made | {"content": content} for made, content in zip(recipes, contents, strict=True)]
        with shared_errors():
            for one, made in zip(group, recipes, strict=True):
                if rank() == 0:
                    _open_folder(folder / one.name, made, request.remake)
        barrier()
        missing = [[name for name in request.names if not _file(folder / one.name, name).is_file()] for one in group]
        missing = gather_objects(missing)[0]  # the first rank's view, so that all ranks split the same list
        if any(missing):
            _make(group, missing, request, folder, device)
        barrier()
        for one, made in zip(group, recipes, strict=True):
            files = [_file(folder / one.name, name) for name in request.names]
            sets[one.name] = ImageSet(one.name, files, digest([made, request.count]))
    return [sets[one.name] for one in candidates]


def recipe(one: Candidate, request: EvaluationRequest) -> dict[str, Any]:
    """All settings that determine a candidate's images."""
    assert one.config is not None
    model = one.config.model
    base, _ = find_family(model)
    settings = {key: getattr(model, key) for key in SHARED if key not in BASE_KEYS}
    if model.base_weights == "full":
        del settings["base_weights"]  # recipes of a time when there was nothing else
    return {
        **({} if model.variant is None else {"variant": model.variant}),
        "base model": weights_digest(base),
        "model settings": settings,
        "weights": None if one.weights is None else weights_digest(one.weights),
        "scale": one.scale,
        "sampler": one.config.sampler.model_dump(mode="json"),
        "stochastic": request.stochastic,
        "prompts": [digest(prompt.text) for prompt in request.prompts],
        "seed": request.seed,
    }


def contents_of(candidates: Sequence[Candidate]) -> list[str]:
    """For each candidate, a hash of the contents of all files that its images depend on."""
    found = []
    for one in candidates:
        assert one.config is not None
        contents = Contents(one.config.embedding_folder / RECORD_FOLDER)
        files = [] if one.weights is None else sorted(file for file in one.weights.rglob("*") if is_weights(file))
        own = contents.of_files({str(file): file for file in files})
        found.append(digest([contents.of_files(model_files(one.config.model)), list(own.values())]))
    return found


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates grouped by the weights that they load."""
    groups: dict[tuple[str, str, str], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.kind, one.path, str(one.weights)), []).append(one)
    return list(groups.values())


def _open_folder(folder: Path, made: dict[str, Any], remake: bool) -> None:
    file = folder / RECIPE_FILE
    kept = dict(made)
    if any(folder.glob("*.png")):
        try:
            # Older recipes have no content hash.
            before = {"content": made["content"]} | json.loads(file.read_text(encoding="utf-8"))
            # A longer or shorter list with the same beginning leaves the common images unchanged.
            shared = min(len(before["prompts"]), len(made["prompts"]))
            changed = different(
                before | {"prompts": before["prompts"][:shared]}, made | {"prompts": made["prompts"][:shared]}
            )
            kept["prompts"] = max(before["prompts"], made["prompts"], key=len)
        except (OSError, ValueError, TypeError, KeyError):
            changed = [RECIPE_FILE]
        if changed and not remake:
            raise UserError(
                f"{folder} holds images made with other settings ({', '.join(changed)} changed); choose another "
                "--output, or replace them with --remake"
            )
        if changed:
            kept = made
            for image in folder.glob("*.png"):
                image.unlink()
    write_atomically(file, json.dumps(kept, indent=1))


def _file(folder: Path, name: tuple[int, int]) -> Path:
    return folder / f"{name[0]:05d}_{name[1]:03d}.png"


def _make(
    group: Sequence[Candidate],
    missing: Sequence[list[tuple[int, int]]],
    request: EvaluationRequest,
    folder: Path,
    device: torch.device,
) -> None:
    with shared_errors():
        config = group[0].config
        assert config is not None
        texts = list(dict.fromkeys(prompt.text for prompt in request.prompts))
        policies: Sequence[Policy]
        if group[0].fine_tune is not None:
            policies = guided_policies([group[0].fine_tune], [(one.scale,) for one in group], device, texts)
        else:
            model = config.model.model_copy(update={"finetune": "full"})
            policies = [load_policy(config.model_copy(update={"model": model}), device, texts)] * len(group)
        table = request.table(config.sampler, policies[0])
    mine = [names[rank() :: world_size()] for names in missing]
    size = request.batch_size
    batches = sum(-(-len(names) // size) for names in mine)
    with StepProgress(max(1, batches * table.steps), "sampling") as progress, torch.no_grad():
        for one, policy, names in zip(group, policies, mine, strict=True):
            progress.describe(f"sampling {one.name}")
            for start in range(0, len(names), size):
                chosen = names[start : start + size]
                conditioning = policy.encode([request.prompts[prompt].text for prompt, _ in chosen])
                images = sample_rows(policy, conditioning, chosen, table, request.seed, progress.advance)
                for name, image in zip(chosen, images, strict=True):
                    write_atomically(_file(folder / one.name, name), image_bytes(to_image(image)))
