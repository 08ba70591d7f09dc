"""Metrics of drawn images against real ones, computed or reused from an earlier evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddpm_hf.evaluation.features import Features
from ddpm_hf.evaluation.figures import FeatureNetwork, MeasurementSetup, MetricResult
from ddpm_hf.evaluation.metrics import closest_pairs, measure
from ddpm_hf.evaluation.per_class import RowsByClass, rows_by_class, with_classes
from ddpm_hf.evaluation.result_files import known_results
from ddpm_hf.evaluation.result_pictures import failures_as_warnings, save_samples
from ddpm_hf.evaluation_options import EvaluationOptions
from ddpm_hf.sampling import DrawnImages

_NUM_CLOSEST_PAIRS = 16


@dataclass(frozen=True)
class ComparedImages:
    """A set of images, with their features.

    Attributes:
        images: the set.
        features: (N, d), on the main rank; None on others.
        split: of the dataset; None for drawn images.
    """

    images: DrawnImages
    features: Tensor | None
    split: str | None = None


class RealImages(NamedTuple):
    """Real images in the format of a subject; `held_out` is None if there are none."""

    reference: ComparedImages
    held_out: ComparedImages | None


def measure_images(
    metrics: Sequence[str],
    real: RealImages,
    drawn: ComparedImages,
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
    reference, held_out = real
    x, y, z = reference.features, drawn.features, held_out.features if held_out else None
    if x is None or y is None:
        return []
    images, rows = drawn.images, None
    if options.per_class:
        others = held_out.images if held_out else None
        rows = rows_by_class(reference.images, images, others)
    inputs = _digest(x, y, z, options.seed, rows)
    known = [r for r in known_results(folder) if isinstance(r, MetricResult)]
    results = [r for r in known if r.measured_with.inputs == inputs]
    if missing := [m for m in metrics if m not in {r.metric for r in results}]:
        setup = MeasurementSetup(
            seed=options.seed,
            num_inference_steps=images.options.get("num_inference_steps"),
            scheduler=options.scheduler or images.options.get("scheduler"),
            seconds_per_image=images.seconds_per_image,
            reference_split=reference.split or "",
            held_out_split=held_out.split if held_out else None,
            features=FeatureNetwork.of(network, dims=y.shape[1]),
            inputs=inputs,
        )
        measured = measure(missing, x, y, z, seed=options.seed, device=device)
        if rows is not None:
            measured = with_classes(measured, rows, x, y, z, seed=options.seed, device=device)
        results += [replace(result, setup=setup) for result in measured]
    with failures_as_warnings():
        has_pairs = "memorisation" in metrics
        pairs = closest_pairs(x, y, _NUM_CLOSEST_PAIRS) if has_pairs else []
        save_samples(folder, images, reference.images, pairs)
    return [r for metric in metrics for r in results if r.metric == metric]


def _digest(x: Tensor, y: Tensor, z: Tensor | None, seed: int, rows: RowsByClass | None) -> str:
    """Digest of everything that determines the metrics of images."""
    sums = hashlib.sha256(repr((seed, version("ddpm-hf"))).encode())
    for name, of_class in (rows or {}).items():
        sums.update(repr((name, [subset.tolist() for subset in of_class])).encode())
    for features in (x, y) if z is None else (x, y, z):
        sums.update(repr(features.shape).encode())
        sums.update(features.numpy().tobytes())
    return sums.hexdigest()
