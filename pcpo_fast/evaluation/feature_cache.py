"""Cached features of image sets, keyed by a hash of the images and of the feature extractor."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pcpo_fast.evaluation.features import Extractor
from pcpo_fast.evaluation.image_sets import ImageSet
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.files.content import digest
from pcpo_fast.reporting.progress import StepProgress


def features_of(images: ImageSet, extractor: Extractor, folder: Path, batch_size: int) -> dict[str, Tensor]:
    """Features of all images of a set, read from the cache or computed and cached.

    Args:
        images: the set.
        extractor: computes the features.
        folder: the cache; it holds ``HASH.safetensors`` files whose metadata describe the images and the extractor.
        batch_size: images per batch.

    Returns:
        Named features [n, d], float32 on the CPU.
    """
    file = folder / f"{digest([images.identity, extractor.identity])}.safetensors"
    kept = _read(file, len(images.files))
    if kept is not None:
        return kept
    parts: list[dict[str, Tensor]] = []
    batches = -(-len(images.files) // batch_size)
    with StepProgress(batches, f"{extractor.identity['features']} of {images.name}") as progress:
        for batch in images.batches(batch_size):
            parts.append({name: value.cpu().contiguous() for name, value in extractor(batch).items()})
            progress.advance()
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    described = {"images": images.name, "features": str(extractor.identity), "of": images.identity}
    write_atomically(file, save(found, metadata=described))
    return found


def _read(file: Path, count: int) -> dict[str, Tensor] | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError):
        return None  # damaged: recompute
    return found if found and all(len(value) == count for value in found.values()) else None
