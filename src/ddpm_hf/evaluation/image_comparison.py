"""Metrics of drawn images against real ones, computed or reused from an earlier evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.figures import FeatureNetwork, MeasurementSetup, MetricResult
from ddpm_hf.evaluation.metrics import closest_pairs, measure
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.per_class import RowsByClass, rows_by_class, with_classes
from ddpm_hf.evaluation.result_files import known_results
from ddpm_hf.evaluation.result_pictures import failures_as_warnings, save_samples
from ddpm_hf.sampling import DrawnImages

_NUM_CLOSEST_PAIRS = 16


@dataclass(frozen=True)
class RealImages:
    """Real images in the format of a subject, with features on the main rank.

    Attributes:
        reference_split, held_out_split: names of the splits.
        reference, held_out: the images; `held_out` is None if there are none.
        reference_features, held_out_features: (N, d).
    """

    reference_split: str
    held_out_split: str | None
    reference: DrawnImages
    held_out: DrawnImages | None
    reference_features: Tensor | None
    held_out_features: Tensor | None


@dataclass(frozen=True)
class DrawnFeatures:
    """Drawn images, and the features of those that are compared, on the main rank."""

    images: DrawnImages
    num_compared: int
    features: Tensor | None


def compare_images(
    metrics: Sequence[str],
    real: RealImages,
    drawn: DrawnFeatures,
    network: Features,
    options: EvaluationOptions,
    folder: Path,
    device: Any,
) -> list[MetricResult]:
    """Metrics of images, in the order of `metrics`; [] on other ranks than the main one.

    Args:
        metrics: names.
        real, drawn: the sets.
        network: the feature network.
        options: of the evaluation.
        folder: of the evaluation; its results for the same inputs are reused, and it gets pictures.
        device: where features are compared.
    """
    images, x, y, z = drawn.images, real.reference_features, drawn.features, real.held_out_features
    if x is None or y is None:
        return []
    rows = None
    if options.per_class:
        rows = rows_by_class(real.reference, images, real.held_out, drawn.num_compared)
    inputs = _digest(x, y, z, options.seed, rows)
    known = [r for r in known_results(folder) if isinstance(r, MetricResult)]
    results = [r for r in known if r.measured_with.inputs == inputs]
    if missing := [m for m in metrics if m not in {r.metric for r in results}]:
        setup = MeasurementSetup(
            seed=options.seed,
            num_inference_steps=images.options.get("num_inference_steps"),
            scheduler=options.scheduler or images.options.get("scheduler"),
            seconds_per_image=images.seconds_per_image,
            reference_split=real.reference_split,
            held_out_split=real.held_out_split,
            features=FeatureNetwork.from_dict(network.facts() | {"dims": y.shape[1]}),
            inputs=inputs,
        )
        measured = _measure(missing, x, y, z, options.seed, rows, device)
        results += [replace(result, setup=setup) for result in measured]
    with failures_as_warnings():
        has_pairs = "memorisation" in metrics
        pairs = closest_pairs(x, y, _NUM_CLOSEST_PAIRS) if has_pairs else []
        save_samples(folder, images, real.reference, pairs)
    return [r for metric in metrics for r in results if r.metric == metric]


def _measure(
    metrics: Sequence[str],
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    seed: int,
    rows: RowsByClass | None,
    device: Any,
) -> list[MetricResult]:
    results = measure(metrics, x, y, z, seed=seed, device=device)
    if rows is None:
        return results
    by_metric = [[r for r in results if r.metric == metric] for metric in metrics]
    return [
        result
        for of_metric in by_metric
        for result in with_classes(of_metric, rows, x, y, z, seed=seed, device=device)
    ]


def _digest(x: Tensor, y: Tensor, z: Tensor | None, seed: int, rows: RowsByClass | None) -> str:
    """Digest of everything that determines the metrics of images."""
    sums = hashlib.sha256(repr((seed, version("ddpm-hf"))).encode())
    for name, of_class in (rows or {}).items():
        sums.update(repr((name, [subset.tolist() for subset in of_class])).encode())
    for features in (x, y) if z is None else (x, y, z):
        sums.update(repr(features.shape).encode())
        sums.update(features.numpy().tobytes())
    return sums.hexdigest()
