"""Sets of features in one pool, and what the images of one set see of those of another.

Sets such as random halves are many and overlap. So all pairs of images are looked at in one pass,
a block at once: its inner products, in float64, are computed once for all sets. Memory is 8 N d
bytes, and some five blocks of 32 MB on a CPU, of 128 MB elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**22  # pairs of images that are looked at at once: larger ones come from no heap or cache
# Of the mean square of features: below it a square of a distance is rounding, also of the features.
_ZERO = 1e-14


class FeatureSet:
    """Some images of a pool.

    Attributes:
        pool: the features of all images at hand, (N, d).
        rows: which of them, (n,), in ascending order.
    """

    def __init__(self, pool: Tensor, rows: Tensor) -> None:
        self.pool, self.rows = pool, rows.sort().values

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,), and A of at most d rows with A^T A the covariance."""
        return _mean_and_factor(self.pool[self.rows])


class Seen:
    """What each image of one set sees of another set, or of the other images of its own.

    The ball of an image reaches to its k-th nearest neighbour in its own set.

    Attributes:
        kernel_sums: the sum of (x.y / d + 1)^3 over the others, (n,).
        nearest: the distance to the nearest of them, (n,).
        has_inside: by k, whether one of another set is in its ball, (n,).
        num_balls: by k, in how many of the balls each of the other set is, (m,).
    """

    def __init__(self, x: FeatureSet, y: FeatureSet, ks: Sequence[int]) -> None:
        of_x = x.pool.new_empty(len(x), dtype=torch.float64)
        self.kernel_sums, self.nearest = of_x, of_x.clone()
        self.has_inside = {k: of_x.bool() for k in ks}
        self.num_balls = {k: torch.zeros_like(y.rows, dtype=torch.int32) for k in ks}

    def add(self, part: slice, kernel_sums: Tensor, distances: Tensor, radii: Tensor) -> None:
        """Look with some of the images, p of them.

        Args:
            part: which of the n.
            kernel_sums: theirs, (p,).
            distances: of each to all of the others, (p, m).
            radii: of their balls, (p, largest k).
        """
        self.kernel_sums[part] = kernel_sums
        self.nearest[part] = distances.amin(1)
        for k, num_balls in self.num_balls.items():
            is_inside = distances <= radii[:, k - 1 : k]
            self.has_inside[k][part] = is_inside.any(1)
            num_balls += is_inside.sum(0, dtype=torch.int32)


class Pair(NamedTuple):
    """What real images see of each other, drawn ones of each other, and each of the others."""

    among_real: Seen
    among_drawn: Seen
    real_to_drawn: Seen
    drawn_to_real: Seen


def look(pairs: Sequence[tuple[FeatureSet, FeatureSet]], ks: Sequence[int] = ()) -> list[Pair]:
    """What the images of two sets see, for each pair of sets of one pool.

    Args:
        pairs: real and drawn ones.
        ks: neighbours that balls reach to; all sets have more images than the largest.
    """
    pool, sets = pairs[0][0].pool, list(dict.fromkeys(chain(*pairs)))
    views = {x: {x: Seen(x, x, ())} for x in sets}
    for x, y in pairs:
        views[x][y], views[y][x] = Seen(x, y, ks), Seen(y, x, ks)
    numbers = {x: number for number, x in enumerate(sets)}
    is_in = torch.zeros(len(pool), len(sets), dtype=torch.float64, device=pool.device)
    for x, number in numbers.items():
        is_in[x.rows, number] = 1
    for block, kernel, distances in _blocks(pool):
        kernel_sums = kernel @ is_in  # (B, sets)
        for x, of_x in views.items():
            start, stop = torch.searchsorted(x.rows, block).tolist()
            rows = x.rows[start:stop] - block[0]
            to_all, sums = distances[rows], kernel_sums[rows]
            for y, seen in of_x.items():  # its own set is the first
                to_y = to_all.gather(1, y.rows.expand(len(rows), -1))
                if y is x:
                    radii = to_y.topk(max(ks, default=1), largest=False).values
                seen.add(slice(start, stop), sums[:, numbers[y]], to_y, radii)
    return [Pair(views[x][x], views[y][y], views[x][y], views[y][x]) for x, y in pairs]


def _blocks(features: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some rows at once the first and the last, the kernel and the distances to all images.

    No image is among its own neighbours: there the kernel is 0, and the distance infinite.
    """
    x = features.double()
    squares = x.square().sum(1)
    zero = _ZERO * squares.mean().item()
    # Elsewhere than on a CPU an operation on few takes as long as one on many.
    size = max(1, _BLOCK * (1 if x.is_cpu else 4) // len(x))
    for first in range(0, len(x), size):
        block = slice(first, first + size)
        products = x[block] @ x.T
        distances = squares[block, None] + squares
        distances.sub_(products, alpha=2)
        F.threshold(distances, zero, 0, inplace=True).sqrt_()
        kernel = products.div_(x.shape[1]).add_(1).pow_(3)
        kernel[:, block].fill_diagonal_(0)
        distances[:, block].fill_diagonal_(math.inf)
        yield torch.tensor([first, first + len(kernel)], device=x.device), kernel, distances


def pooled(*sets: Tensor, device: Any = None) -> list[FeatureSet]:
    """Sets of one pool.

    Args:
        sets: features, (n, d) each.
        device: where they are compared; without float64 there, on the CPU.
    """
    pool = torch.cat(sets)
    if device is not None:
        pool = pool.to("cpu" if torch.device(device).type == "mps" else device)
    rows = torch.arange(len(pool), device=pool.device)
    return [FeatureSet(pool, part) for part in torch.split(rows, [len(x) for x in sets])]


def in_span(features: Tensor, num_directions: int) -> Tensor:
    """Features (N, d) along the directions in which they differ most, (N, num_directions).

    Those are found on some 1,000 images, evenly spread.
    """
    some = features[:: max(1, len(features) // 1024)].double()
    some = some - some.mean(0)
    vectors = torch.linalg.eigh(some @ some.T).eigenvectors[:, -num_directions:]
    directions = torch.linalg.qr(some.T @ vectors).Q  # (d, num_directions)
    return torch.cat([rows.double() @ directions for rows in torch.split(features, 4096)])


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,), and A of at most d rows with A^T A the covariance."""
    num, dims = x.shape
    mean = x.sum(0, dtype=torch.float64) / num
    if num <= dims + 1:
        return mean, _contrasts(x.double()) / math.sqrt(num - 1)
    factor = torch.empty(0, dims, dtype=torch.float64, device=x.device)
    for rows in torch.split(x, 6 * dims + 1024):
        factor = torch.cat([factor, rows.double() - mean])
        if len(factor) > dims:
            factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor / math.sqrt(num - 1)


def _contrasts(x: Tensor) -> Tensor:
    """One row less, which have the sums of squares and products about the mean: (n - 1, d).

    Row k is that of Helmert: the mean of the first k rows less the next one, by sqrt(k / (k + 1)).
    """
    k = torch.arange(1, len(x), device=x.device, dtype=x.dtype)[:, None]
    return (x.cumsum(0)[:-1] / k - x[1:]) * (k / (k + 1)).sqrt()
