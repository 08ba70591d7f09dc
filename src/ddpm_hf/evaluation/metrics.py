"""What is measured between sets of images, each figure with an interval and beside its floor.

The floor is the same figure of real images: what a perfect model would get at this number of
images. Interval and floor come from `NUM_RESAMPLES` random halves of both sets, drawn without
replacement: the bootstrap's repeated images would count as copies, and move the Frechet distance
upwards. The standard deviation over halves is the standard error of the whole (the half-sample
jackknife: McCarthy 1969; Shao and Wu 1989), and too wide rather than too narrow for distances.

The Frechet distance of one pair of halves is measured in all dimensions. Where these are many, the
others are measured by the leading directions, in which nearly all of its variance lies, and shifted
by what the first pair has in the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.evaluation.distances import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from ddpm_hf.evaluation.pool import FeatureSet, Pool, in_span, pooled
from ddpm_hf.randomness import seed_of

NUM_RESAMPLES = 20
T_19 = 2.093  # of Student's distribution: 95 % within, at 19 degrees of freedom
_NUM_DIRECTIONS = 256
_NEAR_QUANTILE, _SAME = 0.01, 1e-3


@dataclass(frozen=True)
class Figure:
    """A number that is measured: its name, and which way is better."""

    name: str
    label: str
    lower_is_better: bool
    limits: tuple[float, float] = (0.0, 1.0)


def share_of_copies(real: FeatureSet, drawn: FeatureSet) -> float:
    """The share of drawn images that are nearer to a real one than 99 % of the real ones are.

    1 % is what chance gives. "Near" is at least a thousandth of the real images' median distance to
    their nearest neighbour, should some of them be there twice.

    Args:
        real: the images that the model was trained on.
        drawn: others of the same pool.
    """
    among = nearest_distances(real)
    near = torch.maximum(among.quantile(_NEAR_QUANTILE), _SAME * among.median())
    return (nearest_distances(drawn, real) <= near).double().mean().item()


def closest_pairs(real: Tensor, drawn: Tensor, number: int) -> list[tuple[int, int]]:
    """The drawn images that are nearest to a real one: (index of the drawn, index of the real)."""
    x, y = pooled(real, drawn)
    found = nearest_distances(y, x).topk(min(number, len(y)), largest=False).indices
    partners = torch.cat([rows.argmin(1) for rows in y[found].distances(x)])
    return list(zip(found.tolist(), partners.tolist(), strict=True))


INFINITE = float("inf")
# By the name of the metric: what it computes, and the figures that this gives.
METRICS: dict[str, tuple[Callable[[Any, Any], Any], tuple[Figure, ...]]] = {
    "fd": (frechet_distance, (Figure("fd", "Frechet distance", True, (0, INFINITE)),)),
    "kid": (kernel_distance, (Figure("kid", "kernel distance", True, (-INFINITE, INFINITE)),)),
    "precision-recall": (
        precision_recall,
        (Figure("precision", "precision", False), Figure("recall", "recall", False)),
    ),
    "coverage": (
        density_coverage,
        (Figure("density", "density", False, (0, INFINITE)), Figure("coverage", "coverage", False)),
    ),
    "memorisation": (share_of_copies, (Figure("copies", "share of copies", True),)),
}


# Of each set, so that its halves are enough: as many as neighbours are looked for, and one more.
FEWEST = {"fd": 4, "kid": 6, "precision-recall": 8, "coverage": 12, "memorisation": 4}


def measure(
    metric: str,
    real: Tensor,
    drawn: Tensor,
    held_out: Tensor | None = None,
    *,
    seed: int = 0,
    device: Any = "cpu",
) -> list[dict[str, Any]]:
    """The figures of a metric, as JSON values.

    Args:
        metric: a key of `METRICS`.
        real: features of real images, (N, d): those that the model was trained on.
        drawn: features of drawn ones, (M, d).
        held_out: of real images that it was not trained on; without them the floor is measured
            between two halves of `real`.
        seed: of the halves.
        device: where they are compared.
    Returns:
        for each figure "value", its "interval" of 95 %, its values of the "halves", and its
        "floor": the value between real images, and at the same numbers of images that of the drawn
        ones.
    Raises:
        ValueError: if there are too few images.
    """
    function, figures = METRICS[metric]
    x, y, *z = pooled(real, drawn, *([] if held_out is None else [held_out]), device=device)
    for name, images in zip(("real", "drawn", "held-out"), (x, y, *z), strict=False):
        if len(images) < FEWEST[metric]:
            raise ValueError(
                f"{metric} needs {FEWEST[metric]} {name} images at least, got {len(images)}"
            )
    if not x.pool.features.isfinite().all():
        raise ValueError("features must be finite, but some are not")
    splits = _splits(x, y, z[0] if z else None, seed)
    half, second = splits[0][1:]
    by_directions = metric == "fd" and min(real.shape[1], len(half), len(second)) > _NUM_DIRECTIONS
    pool = Pool(in_span(x.pool.features, _NUM_DIRECTIONS)) if by_directions else x.pool
    measured = torch.stack([_of_split(function, pool, split) for split in splits])
    if by_directions:
        measured += _of_split(function, x.pool, splits[0]) - measured[0]
    halves, draws, floors = measured.unbind(1)
    values, errors = _values(function, x, y), halves.std(0)
    size = min(len(half), len(second))
    return [
        _described(figure, values[i].item(), errors[i].item(), draws[:, i], floors[:, i])
        | {
            "metric": metric,
            "num_real": len(real),
            "num_drawn": len(drawn),
            "halves": halves[:, i].tolist(),
            "num_resamples": NUM_RESAMPLES,
            "floor_between": "halves" if held_out is None else "training and held-out images",
            "floor_num_images": [len(real) // 2, size],
        }
        for i, figure in enumerate(figures)
    ]


def _splits(
    real: FeatureSet, drawn: FeatureSet, held_out: FeatureSet | None, seed: int
) -> list[tuple[FeatureSet, ...]]:
    """Random halves: of the real images, of the drawn ones, and of those that give the floor."""
    generator = torch.Generator().manual_seed(seed_of(seed, "halves"))

    def shuffled(x: FeatureSet) -> FeatureSet:
        return x[torch.randperm(len(x), generator=generator).to(x.rows.device)]

    splits: list[tuple[FeatureSet, ...]] = []
    for _ in range(NUM_RESAMPLES):
        order = shuffled(real)
        first, second = order[: -(-len(order) // 2)], order[-(-len(order) // 2) :]
        if held_out is not None:
            second = shuffled(held_out)[: max(len(held_out) // 2, 1)]
        splits.append((first, shuffled(drawn)[: len(drawn) // 2], second))
    return splits


def _values(function: Callable[[Any, Any], Any], a: FeatureSet, b: FeatureSet) -> Tensor:
    return torch.tensor(function(a, b), dtype=torch.float64).reshape(-1)


def _of_split(
    function: Callable[[Any, Any], Any], pool: Pool, split: tuple[FeatureSet, ...]
) -> Tensor:
    """Figures of a half of the drawn images, of as many as there are for the floor, and of the
    floor, by the features in `pool`: (3, figures)."""
    first, half, second = (FeatureSet(pool, part.rows) for part in split)
    of_half = _values(function, first, half)
    size = min(len(second), len(half))
    # Where few images are held out, the floor is that of few, but not the interval.
    of_drawn = _values(function, first, half[:size]) if size < len(half) else of_half
    return torch.stack([of_half, of_drawn, _values(function, first, second[:size])])


def _described(
    figure: Figure, value: float, error: float, draws: Tensor, floors: Tensor
) -> dict[str, Any]:
    low, high = figure.limits
    half_width = T_19 * error
    gap, of_chance = (draws - floors).mean().item(), T_19 * (draws - floors).std().item()
    if abs(gap) <= of_chance:
        verdict = "tie"
    else:
        verdict = "worse" if (gap > 0) == figure.lower_is_better else "better"
    return {
        "name": figure.name,
        "label": figure.label,
        "value": value,
        "interval": [max(low, value - half_width), min(high, value + half_width)],
        "standard_error": error,
        "floor": {"real": floors.mean().item(), "drawn": draws.mean().item()},
        "verdict": verdict,
        "note": _note(figure, verdict, value, floors.mean().item(), draws.mean().item()),
    }


def _note(figure: Figure, verdict: str, value: float, floor: float, drawn: float) -> str:
    """What a reader might miss, or nothing."""
    if figure.name == "copies":
        if verdict != "worse":
            return ""
        whole = "these images are copies of the training images: " if value > 0.5 else ""
        return f"{whole}{value:.0%} are as near to one as 1 % of real images are"
    if verdict == "better" and figure.name in ("fd", "kid"):
        return "nearer to the reference than real images are: are these copies? see memorisation"
    if figure.name == "fd" and floor > drawn / 2:
        return "mostly the bias of few images: compare at the same number only"
    return ""
