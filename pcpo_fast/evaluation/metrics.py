"""The metrics of ``--metric``: which model each needs, and how it is computed from the images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.candidate_images import EvaluationRequest, EvaluationSettings
from pcpo_fast.evaluation.feature_cache import features_of
from pcpo_fast.evaluation.features import ClipImages, DinoV2, Extractor, Inception
from pcpo_fast.evaluation.frechet import Gaussian, distance, sample_notes
from pcpo_fast.evaluation.image_sets import ImageSet
from pcpo_fast.evaluation.inception_score import inception_score
from pcpo_fast.evaluation.intervals import over_prompts
from pcpo_fast.evaluation.kernel_distance import kernel_distance
from pcpo_fast.evaluation.lpips import Lpips
from pcpo_fast.method.diversity import feature_diversity, pairs, pixel_diversity
from pcpo_fast.reporting.statistics import Estimate, mean, mean_difference

T = TypeVar("T")
METRICS = ("fd-dinov2", "cmmd", "fid", "is", "lpips")
OF_REFERENCE = ("fd-dinov2", "cmmd", "fid")
_LPIPS_TRUNK = "timm/vgg16.tv_in1k"


@dataclass(frozen=True)
class MetricColumn:
    """One metric of every candidate.

    Attributes:
        key: its key in the JSON.
        label: its name in tables.
        better: whether higher or lower values are better.
        kind: distance, diversity or score.
        estimates: the value by candidate.
        by_prompt: by candidate, the values of which that is the mean, one for each prompt; of diversities alone.
    """

    key: str
    label: str
    better: Literal["higher", "lower"]
    kind: Literal["distance", "diversity", "score"]
    estimates: dict[str, Estimate]
    by_prompt: dict[str, list[float]] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """The label with an arrow towards better values."""
        return f"{self.label} {'↑' if self.better == 'higher' else '↓'}"

    @classmethod
    def diversity(cls, key: str, label: str, by_prompt: dict[str, list[float]]) -> "MetricColumn":
        """A diversity, from its values by candidate and prompt."""
        means = {name: mean(values) for name, values in by_prompt.items()}
        return cls(f"diversity_{key}", f"diversity, {label}", "higher", "diversity", means, by_prompt)

    def difference(self, candidate: str, baseline: str) -> Estimate:
        """Difference of the means of a diversity, paired by prompt."""
        return mean_difference(self.by_prompt[candidate], self.by_prompt[baseline], paired=True)


def parse_metrics(texts: Sequence[str]) -> dict[str, str | None]:
    """Parse ``NAME[=MODEL]`` arguments into {name: model}; None stands for the default model.

    Raises:
        UserError: a metric is unknown or given twice.
    """
    found: dict[str, str | None] = {}
    for text in texts:
        name, separator, model = text.partition("=")
        if name not in METRICS:
            raise UserError(f"--metric {text!r}: must be one of {', '.join(METRICS)}")
        if name in found:
            raise UserError(f"--metric: {name} is given twice")
        if separator and not model:
            raise UserError(f"--metric {text!r}: the model after '=' is missing (omit '=' for the default model)")
        found[name] = model or None
    networks = {found[name] for name in ("fid", "is") if found.get(name)}
    if len(networks) > 1:
        raise UserError("--metric: fid and is share one Inception network; give its weights only once")
    return found


@dataclass
class Measuring:
    """Computes the metrics of image sets; models are loaded once, and their features are cached on disk.

    Attributes:
        settings: which metrics, and how.
        request: the images of each set.
        reference: reference images of distances; None if no metric needs them.
        device: where models run.
        notes: caveats for the reader, collected while measuring.

    Raises:
        UserError: a model cannot be loaded.
    """

    settings: EvaluationSettings
    request: EvaluationRequest
    reference: ImageSet | None
    device: torch.device
    notes: list[str] = field(default_factory=list)

    def columns(self, sets: Sequence[ImageSet]) -> list[MetricColumn]:
        """Every metric of every set; at most one model is in memory at a time."""
        metrics = self.settings.metrics
        found: list[MetricColumn] = []
        if "fd-dinov2" in metrics:
            extractor: Extractor = DinoV2(metrics["fd-dinov2"] or DinoV2.PUBLISHED, self.device)
            features = self._features(sets, extractor)
            found.append(self._frechet(sets, features, "dinov2", "fd_dinov2", "FD-DINOv2"))
            found += self._feature_diversity(sets, features, "dinov2", "DINOv2")
        if "cmmd" in metrics:
            extractor = ClipImages(metrics["cmmd"] or ClipImages.PUBLISHED, self.device)
            features = self._features(sets, extractor)
            distances = self._distances(sets, features, "clip", lambda own: own, kernel_distance)
            found.append(MetricColumn("cmmd", "CMMD", "lower", "distance", distances))
            found += self._feature_diversity(sets, features, "clip", "CLIP")
        if "fid" in metrics or "is" in metrics:
            weights = metrics.get("fid") or metrics.get("is")
            features = self._features(sets, Inception(weights, self.device))
            if "fid" in metrics:
                found.append(self._frechet(sets, features, "inception", "fid", "FID"))
            if "is" in metrics:
                scores = {one.name: self._inception_score(features[one.name]["logits"]) for one in sets}
                found.append(MetricColumn("inception_score", "IS", "higher", "score", scores))
        if self.request.count > 1:
            pixels = {one.name: self._over_prompts(one, pixel_diversity) for one in sets}
            found.append(MetricColumn.diversity("pixel", "pixels", pixels))
            if "lpips" in metrics:
                found.append(self._lpips(sets))
        return found

    def _features(self, sets: Sequence[ImageSet], extractor: Extractor) -> dict[str, dict[str, Tensor]]:
        """{set: {feature: [n, d]}}; the reference has the name ""."""
        cache, size = self.settings.cache or self.settings.output / "features", self.settings.batch_size
        named = {one.name: one for one in sets} | ({} if self.reference is None else {"": self.reference})
        return {name: features_of(one, extractor, cache, size) for name, one in named.items()}

    def _inception_score(self, logits: Tensor) -> Estimate:
        def of_rows(rows: NDArray[np.int64]) -> float:
            return inception_score(logits[torch.from_numpy(rows)])

        return over_prompts(of_rows, len(self.request.prompts), self.request.count, self.settings.resamples)

    def _distances(
        self,
        sets: Sequence[ImageSet],
        features: dict[str, dict[str, Tensor]],
        feature: str,
        prepare: Callable[[Tensor], T],
        measure: Callable[[T, T], float],
    ) -> dict[str, Estimate]:
        """Distances to the reference, which is resampled together with the set if it is one of the candidates."""
        reference = features[""][feature]
        paired = any(one is self.reference for one in sets)
        whole = prepare(reference)
        estimates = {}
        for one in sets:
            own = features[one.name][feature]

            def of_rows(rows: NDArray[np.int64], own: Tensor = own) -> float:
                chosen = torch.from_numpy(rows)
                return measure(prepare(own[chosen]), prepare(reference[chosen]) if paired else whole)

            found = over_prompts(of_rows, len(self.request.prompts), self.request.count, self.settings.resamples)
            if found.low is not None:  # no distance is negative
                found = replace(found, low=max(0.0, found.low))
            estimates[one.name] = found
        return estimates

    def _frechet(
        self, sets: Sequence[ImageSet], features: dict[str, dict[str, Tensor]], feature: str, key: str, label: str
    ) -> MetricColumn:
        estimates = self._distances(sets, features, feature, Gaussian.of_features, distance)
        reference = features[""][feature]
        fewest = min(len(reference), len(self.request.prompts) * self.request.count)
        self.notes += [f"{label}: {note}." for note in sample_notes(fewest, reference.shape[1])]
        return MetricColumn(key, label, "lower", "distance", estimates)

    def _feature_diversity(
        self, sets: Sequence[ImageSet], features: dict[str, dict[str, Tensor]], feature: str, label: str
    ) -> list[MetricColumn]:
        if self.request.count < 2:
            return []
        values = {
            one.name: [feature_diversity(group) for group in features[one.name][feature].split(self.request.count)]
            for one in sets
        }
        return [MetricColumn.diversity(feature, label, values)]

    def _over_prompts(self, one: ImageSet, measure: Callable[[Tensor], float]) -> list[float]:
        values = []
        for prompt in range(len(self.request.prompts)):
            rows = range(prompt * self.request.count, (prompt + 1) * self.request.count)
            images = [one.read(row) for row in rows]
            if len({tuple(image.shape) for image in images}) > 1:
                raise UserError(f"--checkpoint {one.name}: all images of a prompt must have the same size")
            values.append(measure(torch.stack(images)))
        return values

    def _lpips(self, sets: Sequence[ImageSet]) -> MetricColumn:
        backbone, _, linear = (self.settings.metrics["lpips"] or _LPIPS_TRUNK).partition(",")
        model = Lpips(backbone, linear or None).to(self.device)

        @torch.no_grad()
        def measure(images: Tensor) -> float:
            features = [model.features(image[None].to(self.device)) for image in images]
            found = [model.distance(features[i], features[j]) for i, j in pairs(len(images))]
            return float(torch.cat(found).double().mean())

        values = {one.name: self._over_prompts(one, measure) for one in sets}
        return MetricColumn.diversity("lpips", f"LPIPS {model.trunk.name}", values)
