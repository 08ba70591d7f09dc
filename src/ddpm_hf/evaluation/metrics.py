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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
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
from ddpm_hf.evaluation.neighbour_statistics import FeatureSet, Pair, in_span, look, pooled
from ddpm_hf.randomness import seed_of

NUM_RESAMPLES = 20
T_19 = 2.093  # of Student's distribution: 95 % within, at 19 degrees of freedom
_NUM_DIRECTIONS = 256
_NEAR_QUANTILE, _SAME = 0.01, 1e-3
_NEIGHBOURS = {"precision-recall": 3, "coverage": 5}  # that balls reach to
_BLOCK = 2**22  # pairs of images that are looked at at once

Sets = tuple[FeatureSet, FeatureSet]


@dataclass(frozen=True)
class Figure:
    """A number that is measured: its name, and which way is better."""

    name: str
    label: str
    lower_is_better: bool
    limits: tuple[float, float] = (0.0, 1.0)


def share_of_copies_of(pair: Pair) -> float:
    """The share of drawn images that are nearer to a real one than 99 % of the real ones are.

    1 % is what chance gives. "Near" is at least a thousandth of the real images' median distance to
    their nearest neighbour, should some of them be there twice.

    Args:
        pair: the real ones are those that the model was trained on.
    """
    among = pair.among_real.nearest
    near = torch.maximum(among.quantile(_NEAR_QUANTILE), _SAME * among.median())
    return (pair.drawn_to_real.nearest <= near).double().mean().item()


def closest_pairs(real: Tensor, drawn: Tensor, number: int) -> list[tuple[int, int]]:
    """The drawn images that are nearest to a real one: (index of the drawn, index of the real)."""
    real, blocks = real.double(), torch.split(drawn, max(1, _BLOCK // len(real)))
    nearest = [torch.cdist(rows.double(), real).min(1) for rows in blocks]
    distances, partners = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    found = distances.topk(min(number, len(drawn)), largest=False).indices
    return list(zip(found.tolist(), partners[found].tolist(), strict=True))


INFINITE = float("inf")
# By the name of the metric: what computes it, and the figures that this gives.
METRICS: dict[str, tuple[Callable[..., Any], tuple[Figure, ...]]] = {
    "fd": (frechet_distance, (Figure("fd", "Frechet distance", True, (0, INFINITE)),)),
    "kid": (kernel_distance_of, (Figure("kid", "kernel distance", True, (-INFINITE, INFINITE)),)),
    "precision-recall": (
        precision_recall_of,
        (Figure("precision", "precision", False), Figure("recall", "recall", False)),
    ),
    "coverage": (
        density_coverage_of,
        (Figure("density", "density", False, (0, INFINITE)), Figure("coverage", "coverage", False)),
    ),
    "memorisation": (share_of_copies_of, (Figure("copies", "share of copies", True),)),
}


# Of each set, so that its halves are enough: as many as neighbours are looked for, and one more.
FEWEST = {"fd": 4, "kid": 6, "precision-recall": 8, "coverage": 12, "memorisation": 4}


def measure(
    metrics: str | Sequence[str],
    real: Tensor,
    drawn: Tensor,
    held_out: Tensor | None = None,
    *,
    seed: int = 0,
    device: Any = "cpu",
) -> list[dict[str, Any]]:
    """The figures of one or more metrics, as JSON values; more of them cost little.

    Args:
        metrics: keys of `METRICS`.
        real: features of real images, (N, d): those that the model was trained on.
        drawn: features of drawn ones, (M, d).
        held_out: of real images that it was not trained on; without them the floor is measured
            between two halves of `real`.
        seed: of the halves.
        device: where they are compared.
    Returns:
        for each figure its "metric", "value", its "interval" of 95 %, its values of the "halves",
        and its "floor": the value between real images, and at the same numbers of images that of
        the drawn ones.
    Raises:
        ValueError: if there are too few images.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    x, y, *z = pooled(real, drawn, *([] if held_out is None else [held_out]), device=device)
    for metric in metrics:
        for name, images in zip(("real", "drawn", "held-out"), (x, y, *z), strict=False):
            if len(images) < FEWEST[metric]:
                raise ValueError(
                    f"{metric} needs {FEWEST[metric]} {name} images at least, got {len(images)}"
                )
    if not x.pool.isfinite().all():
        raise ValueError("features must be finite, but some are not")
    splits = _splits(x, y, z[0] if z else None, seed)
    found = _found(metrics, (x, y), splits)
    shared = {
        "num_real": len(real),
        "num_drawn": len(drawn),
        "num_resamples": NUM_RESAMPLES,
        "floor_between": "halves" if held_out is None else "training and held-out images",
        "floor_num_images": [len(real) // 2, len(splits[0][2][1])],
    }
    results = []
    for metric, values in found.items():
        # Where few images are held out, the floor is that of few, but not the interval.
        halves, draws, floors = (
            torch.stack([values[sets] for sets in column]) for column in zip(*splits, strict=True)
        )
        value, error = values[x, y], halves.std(0)
        for i, figure in enumerate(METRICS[metric][1]):
            described = _described(
                figure, value[i].item(), error[i].item(), draws[:, i], floors[:, i]
            )
            own = {"metric": metric, "halves": halves[:, i].tolist()}
            results.append(described | own | shared)
    return results


def _splits(
    real: FeatureSet, drawn: FeatureSet, held_out: FeatureSet | None, seed: int
) -> list[tuple[Sets, Sets, Sets]]:
    """Random halves: of the real images, with one of the drawn ones, then with what the floor
    compares, which is as many drawn and other real ones."""
    generator = torch.Generator().manual_seed(seed_of(seed, "halves"))

    def shuffled(x: FeatureSet) -> Tensor:
        return x.rows[torch.randperm(len(x), generator=generator).to(x.rows.device)]

    splits = []
    for _ in range(NUM_RESAMPLES):
        order = shuffled(real)
        first, second = order[: -(-len(order) // 2)], order[-(-len(order) // 2) :]
        if held_out is not None:
            second = shuffled(held_out)[: max(len(held_out) // 2, 1)]
        half = shuffled(drawn)[: len(drawn) // 2]
        size = min(len(second), len(half))
        x, y, floor = (FeatureSet(real.pool, rows) for rows in (first, half, second[:size]))
        few = y if size == len(half) else FeatureSet(real.pool, half[:size])
        splits.append(((x, y), (x, few), (x, floor)))
    return splits


def _found(
    metrics: Sequence[str], whole: Sets, splits: list[tuple[Sets, Sets, Sets]]
) -> dict[str, dict[Sets, Tensor]]:
    """By metric, what it gives for the whole sets and for each of the splits, (figures,)."""
    found = {}
    pairs: dict[Sets, Pair] = {}
    for metric in metrics:
        if metric == "fd":
            found[metric] = _frechet_distances(whole, splits)
            continue
        if not pairs:
            sets = list(dict.fromkeys([whole, *chain(*splits)]))
            ks = [_NEIGHBOURS[name] for name in metrics if name in _NEIGHBOURS]
            pairs = dict(zip(sets, look(sets, ks), strict=True))
        function = METRICS[metric][0]
        found[metric] = {sets: _vector(function(pair)) for sets, pair in pairs.items()}
    return found


def _frechet_distances(whole: Sets, splits: list[tuple[Sets, Sets, Sets]]) -> dict[Sets, Tensor]:
    """Of the whole sets and the first split in all dimensions, of the others by what leads."""

    def distances(pairs: Iterable[Sets], pool: Tensor) -> dict[Sets, Tensor]:
        moved = cache(lambda x: FeatureSet(pool, x.rows))
        return {
            (x, y): _vector(frechet_distance(moved(x), moved(y))) for x, y in dict.fromkeys(pairs)
        }

    pool, first = whole[0].pool, splits[0]
    if min(pool.shape[1], len(first[-1][1])) <= _NUM_DIRECTIONS:
        return distances([whole, *chain(*splits)], pool)
    exact = distances([whole, *first], pool)
    leading = distances(chain(*splits), in_span(pool, _NUM_DIRECTIONS))
    shifted = {
        sets: leading[sets] + exact[alike] - leading[alike]
        for split in splits
        for sets, alike in zip(split, first, strict=True)
    }
    return shifted | {whole: exact[whole]}


def _vector(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)


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
