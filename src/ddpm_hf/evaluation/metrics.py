"""Metrics between sets of images, each with a confidence interval and a floor.

The floor is the same figure for real images: the value of a perfect model at this number of images.
Interval and floor come from `NUM_RESAMPLES` random halves of both sets, drawn without replacement.
A bootstrap would repeat images, which count as copies and raise the Frechet distance. The standard
deviation over halves is the standard error of the full set (half-sample jackknife: McCarthy 1969;
Shao and Wu 1989); for distances it is too wide rather than too narrow.

The Frechet distance of the first pair of halves is computed in all dimensions. If these are many,
the other pairs use the leading directions, which hold nearly all of the variance between pairs, and
the remaining directions count as in the first pair.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.evaluation.distances import (
    density_coverage_of,
    frechet_distance,
    kernel_distance_of,
    precision_recall_of,
)
from ddpm_hf.evaluation.figures import Floor, MetricResult, Verdict
from ddpm_hf.evaluation.neighbour_statistics import (
    Balls,
    FeatureSet,
    PairStatistics,
    feature_sets,
    leading_components,
    pair_statistics,
)
from ddpm_hf.evaluation_options import BITS
from ddpm_hf.randomness import seed_of

NUM_RESAMPLES = 20
T_19 = 2.093  # 97.5 % quantile of Student's t with 19 degrees of freedom
_NUM_DIRECTIONS = 256
_NEAR_QUANTILE, _DUPLICATE = 0.01, 1e-3
_BLOCK = 2**22  # pairs of images per block

Pair = tuple[FeatureSet, FeatureSet]


@dataclass(frozen=True)
class Quantity:
    """Name of a figure, which direction is better, and its bounds."""

    name: str
    label: str
    lower_is_better: bool
    limits: tuple[float, float] = (0.0, 1.0)


def share_of_copies(pair: PairStatistics) -> float:
    """Share of drawn images that are closer to a real one than 99 % of the real ones are.

    Chance gives 1 %. The threshold is at least a thousandth of the median distance between nearest
    real images, in case some of these are duplicates.

    Args:
        pair: statistics in which the real images are the training images.
    """
    among = pair.among_real.nearest
    near = torch.maximum(among.quantile(_NEAR_QUANTILE), _DUPLICATE * among.median())
    return (pair.drawn_to_real.nearest <= near).double().mean().item()


def closest_pairs(real: Tensor, drawn: Tensor, number: int) -> list[tuple[int, int]]:
    """Indices (drawn, real) of the drawn images that are closest to a real one."""
    real, blocks = real.double(), torch.split(drawn, max(1, _BLOCK // len(real)))
    nearest = [torch.cdist(rows.double(), real).min(1) for rows in blocks]
    distances, partners = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    closest = distances.topk(min(number, len(drawn)), largest=False).indices
    return list(zip(closest.tolist(), partners[closest].tolist(), strict=True))


INFINITE = float("inf")
# By name of the metric: the function, and the quantities that it returns.
METRICS: dict[str, tuple[Callable[..., Any], tuple[Quantity, ...]]] = {
    "fd": (frechet_distance, (Quantity("fd", "Frechet distance", True, (0, INFINITE)),)),
    "kid": (kernel_distance_of, (Quantity("kid", "kernel distance", True, (-INFINITE, INFINITE)),)),
    "precision-recall": (
        precision_recall_of,
        (Quantity("precision", "precision", False), Quantity("recall", "recall", False)),
    ),
    "coverage": (
        density_coverage_of,
        (
            Quantity("density", "density", False, (0, INFINITE)),
            Quantity("coverage", "coverage", False),
        ),
    ),
    "memorisation": (share_of_copies, (Quantity("copies", "share of copies", True),)),
}

LOWER_IS_BETTER = {BITS: True} | {
    quantity.name: quantity.lower_is_better
    for _, quantities in METRICS.values()
    for quantity in quantities
}

# Images that each set needs, so that a half holds one more than the neighbours of the metric.
MIN_IMAGES = {"fd": 4, "kid": 6, "precision-recall": 8, "coverage": 12, "memorisation": 4}


def measure(
    metrics: str | Sequence[str],
    real: Tensor,
    drawn: Tensor,
    held_out: Tensor | None = None,
    *,
    seed: int = 0,
    device: Any = "cpu",
) -> list[MetricResult]:
    """Figures of one or more metrics; further metrics add little cost.

    Args:
        metrics: keys of `METRICS`.
        real: features of the training images, (N, d).
        drawn: features of drawn images, (M, d).
        held_out: features of real images that were not trained on; without them the floor compares
            two halves of `real`.
        seed: of the halves.
        device: where the features are compared.
    Returns:
        results without `setup`.
    Raises:
        ValueError: for too few images, or features that are not finite.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    x, y, *z = feature_sets(real, drawn, *([] if held_out is None else [held_out]), device=device)
    _check_sizes(metrics, {"real": x, "drawn": y, **({"held-out": z[0]} if z else {})})
    if not x.all_features.isfinite().all():
        raise ValueError("features must be finite, but some are NaN or infinite")
    resamples = _resamples(x, y, z[0] if z else None, seed)
    result_of = partial(
        MetricResult,
        num_real=len(real),
        num_drawn=len(drawn),
        num_resamples=NUM_RESAMPLES,
        floor_between="halves" if held_out is None else "training and held-out images",
        floor_num_images=(len(real) // 2, len(resamples[0][2][1])),
    )
    results = []
    for metric, values in _values(metrics, (x, y), resamples).items():
        columns = [
            torch.stack([values[p] for p in pairs]) for pairs in zip(*resamples, strict=True)
        ]
        errors = columns[0].std(0)
        for i, quantity in enumerate(METRICS[metric][1]):
            halves, same_size, floors = (column[:, i] for column in columns)
            value, error = values[x, y][i].item(), errors[i].item()
            floor = Floor(real=floors.mean().item(), drawn=same_size.mean().item())
            verdict = _verdict(quantity, same_size - floors)
            result = result_of(
                name=quantity.name,
                label=quantity.label,
                value=value,
                interval=_interval(quantity, value, error),
                standard_error=error,
                floor=floor,
                verdict=verdict,
                note=_note(quantity, verdict, value, floor),
                metric=metric,
                halves=tuple(halves.tolist()),
            )
            results.append(result)
    return results


def _check_sizes(metrics: Sequence[str], sets: dict[str, FeatureSet]) -> None:
    for metric in metrics:
        for name, images in sets.items():
            if len(images) < MIN_IMAGES[metric]:
                raise ValueError(
                    f"{metric} needs at least {MIN_IMAGES[metric]} {name} images, got {len(images)}"
                )


def _resamples(
    real: FeatureSet, drawn: FeatureSet, held_out: FeatureSet | None, seed: int
) -> list[tuple[Pair, Pair, Pair]]:
    """Random halves of the real images, each paired with three other sets.

    The first is a half of the drawn images. The other two, of equal size, are for the floor: drawn
    images and other real images.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "halves"))

    def shuffled(x: FeatureSet) -> Tensor:
        return x.rows[torch.randperm(len(x), generator=generator).to(x.rows.device)]

    resamples = []
    for _ in range(NUM_RESAMPLES):
        order = shuffled(real)
        first, second = order[: -(-len(order) // 2)], order[-(-len(order) // 2) :]
        if held_out is not None:
            second = shuffled(held_out)[: max(len(held_out) // 2, 1)]
        half = shuffled(drawn)[: len(drawn) // 2]
        size = min(len(second), len(half))
        features = real.all_features
        x, y, floor = (FeatureSet(features, rows) for rows in (first, half, second[:size]))
        same_size = y if size == len(half) else FeatureSet(features, half[:size])
        resamples.append(((x, y), (x, same_size), (x, floor)))
    return resamples


def _values(
    metrics: Sequence[str], full: Pair, resamples: list[tuple[Pair, Pair, Pair]]
) -> dict[str, dict[Pair, Tensor]]:
    """By metric, the values of the full sets and of each resample, (quantities,)."""
    values = {}
    statistics: dict[Pair, PairStatistics] = {}
    for metric in metrics:
        if metric == "fd":
            values[metric] = _frechet_distances(full, resamples)
            continue
        if not statistics:
            pairs = list(dict.fromkeys([full, *chain(*resamples)]))
            balls = Balls(
                closed=[3] if "precision-recall" in metrics else [],
                open=[5] if "coverage" in metrics else [],
            )
            statistics = dict(zip(pairs, pair_statistics(pairs, balls), strict=True))
        function = METRICS[metric][0]
        values[metric] = {pair: _vector(function(of)) for pair, of in statistics.items()}
    return values


def _frechet_distances(full: Pair, resamples: list[tuple[Pair, Pair, Pair]]) -> dict[Pair, Tensor]:
    """Exact for the full sets and the first resample; see the module docstring for the others."""

    def distances(pairs: Iterable[Pair], features: Tensor) -> dict[Pair, Tensor]:
        moved = cache(lambda x: FeatureSet(features, x.rows))
        return {
            (x, y): _vector(frechet_distance(moved(x), moved(y))) for x, y in dict.fromkeys(pairs)
        }

    features, first = full[0].all_features, resamples[0]
    if min(features.shape[1], len(first[-1][1])) <= _NUM_DIRECTIONS:
        return distances([full, *chain(*resamples)], features)
    exact = distances([full, *first], features)
    leading = distances(chain(*resamples), leading_components(features, _NUM_DIRECTIONS))
    shifted = {
        pair: leading[pair] + exact[alike] - leading[alike]
        for resample in resamples
        for pair, alike in zip(resample, first, strict=True)
    }
    return shifted | {full: exact[full]}


def _vector(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)


def _interval(quantity: Quantity, value: float, error: float) -> tuple[float, float]:
    low, high = quantity.limits
    return max(low, value - T_19 * error), min(high, value + T_19 * error)


def _verdict(quantity: Quantity, gaps: Tensor) -> Verdict:
    """Compare drawn images with the floor, by the gaps over resamples."""
    gap = gaps.mean().item()
    if abs(gap) <= T_19 * gaps.std().item():
        return "tie"
    return "worse" if (gap > 0) == quantity.lower_is_better else "better"


def _note(quantity: Quantity, verdict: Verdict, value: float, floor: Floor) -> str:
    """A caveat, or ""."""
    if quantity.name == "copies":
        if verdict != "worse":
            return ""
        alarm = "these images are copies of the training images: " if value > 0.5 else ""
        return f"{alarm}{value:.0%} are as near to one as 1 % of real images are"
    if verdict == "better" and quantity.name in ("fd", "kid"):
        return "nearer to the reference than real images are: are these copies? see memorisation"
    if quantity.name == "fd" and floor.real > floor.drawn / 2:
        return "mostly the bias of few images: compare at the same number only"
    return ""
