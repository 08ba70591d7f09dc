"""Pairwise nearest-neighbour statistics of many sets of features in one pass.

Sets such as random halves are many and overlap. All pairs of images are therefore visited once, in
blocks: the inner products of a block, in float64, serve all sets. Memory is 8 N d bytes, plus about
five blocks of 32 MB on a CPU or 128 MB on other devices.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**22  # pairs of images per block: larger tensors come from neither heap nor cache
# Share of the mean squared norm below which a squared distance is rounding error.
_ZERO = 1e-14


class FeatureSet:
    """A subset of images, by their features.

    Attributes:
        all_features: features of all images, (N, d).
        rows: indices of the subset, (n,), ascending.
    """

    def __init__(self, all_features: Tensor, rows: Tensor) -> None:
        self.all_features, self.rows = all_features, rows.sort().values

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,), and a factor A of at most d rows with A^T A the covariance."""
        return _mean_and_factor(self.all_features[self.rows])


class NeighbourStatistics:
    """Statistics of each image of a set x with respect to a set y, or to the rest of x.

    The ball of an image reaches to its k-th nearest neighbour in its own set. A closed ball
    contains its boundary, an open ball does not.

    Attributes:
        kernel_sums: sum of (x.y / d + 1)^3 over the images of y, (n,).
        kernel_squares: sum of its square, (n,).
        nearest: distance to the nearest image of y, (n,).
        is_covered: by k, whether each image of y is in a closed ball, (m,).
        has_inside: by k, whether the open ball contains an image of y, (n,).
        num_balls: by k, number of open balls that contain each image of y, (m,).
    """

    def __init__(self, x: FeatureSet, y: FeatureSet, balls: "Balls") -> None:
        per_image = x.all_features.new_empty(len(x), dtype=torch.float64)
        self.kernel_sums, self.kernel_squares = per_image, per_image.clone()
        self.nearest = per_image.clone()
        self.is_covered = {k: torch.zeros_like(y.rows, dtype=torch.bool) for k in balls.closed}
        self.has_inside = {k: per_image.bool() for k in balls.open}
        self.num_balls = {k: torch.zeros_like(y.rows, dtype=torch.int32) for k in balls.open}

    def add(self, rows: slice, distances: Tensor, radii: Tensor, open_radii: Tensor) -> None:
        """Add the neighbours of p images of x.

        Args:
            rows: their positions among the n.
            distances: to all images of y, (p, m).
            radii: of their balls, (p, largest k).
            open_radii: likewise, less the rounding error of a distance.
        """
        self.nearest[rows] = distances.amin(1)
        for k, is_covered in self.is_covered.items():
            is_covered |= (distances <= radii[:, k - 1 : k]).any(0)
        for k, num_balls in self.num_balls.items():
            is_inside = distances < open_radii[:, k - 1 : k]
            self.has_inside[k][rows] = is_inside.any(1)
            num_balls += is_inside.sum(0, dtype=torch.int32)


class Balls(NamedTuple):
    """Ranks k of the neighbours at the radii of closed and of open balls."""

    closed: Sequence[int] = ()
    open: Sequence[int] = ()


_NO_BALLS = Balls()


class PairStatistics(NamedTuple):
    """Statistics within the real and the drawn images, and between them."""

    among_real: NeighbourStatistics
    among_drawn: NeighbourStatistics
    real_to_drawn: NeighbourStatistics
    drawn_to_real: NeighbourStatistics


def pair_statistics(
    pairs: Sequence[tuple[FeatureSet, FeatureSet]], balls: Balls = _NO_BALLS
) -> list[PairStatistics]:
    """Statistics of each pair of real and drawn images.

    Args:
        pairs: subsets of the same features.
        balls: ranks of neighbours, smaller than the size of each set.
    """
    features, sets = pairs[0][0].all_features, list(dict.fromkeys(chain(*pairs)))
    statistics = {x: {x: NeighbourStatistics(x, x, _NO_BALLS)} for x in sets}
    for x, y in pairs:
        statistics[x][y] = NeighbourStatistics(x, y, balls)
        statistics[y][x] = NeighbourStatistics(y, x, balls)
    largest_k = max((*balls.closed, *balls.open), default=1)
    columns = {x: column for column, x in enumerate(sets)}
    membership = torch.zeros(len(features), len(sets), dtype=torch.float64, device=features.device)
    for x, column in columns.items():
        membership[x.rows, column] = 1
    for block, kernel, distances, rounding in _blocks(features):
        kernel_sums = kernel @ membership  # (B, sets)
        kernel_squares = kernel.square_() @ membership
        for x, of_x in statistics.items():
            start, stop = torch.searchsorted(x.rows, block).tolist()
            rows = x.rows[start:stop] - block[0]
            to_all, sums, squares = distances[rows], kernel_sums[rows], kernel_squares[rows]
            for y, x_to_y in of_x.items():  # x itself comes first and gives the radii
                to_y = to_all.gather(1, y.rows.expand(len(rows), -1))
                if y is x:
                    radii = to_y.topk(largest_k, largest=False).values
                    open_radii = (radii.square() - rounding).clamp(min=0).sqrt()
                x_to_y.kernel_sums[start:stop] = sums[:, columns[y]]
                x_to_y.kernel_squares[start:stop] = squares[:, columns[y]]
                x_to_y.add(slice(start, stop), to_y, radii, open_radii)
    return [
        PairStatistics(statistics[x][x], statistics[y][y], statistics[x][y], statistics[y][x])
        for x, y in pairs
    ]


def _blocks(features: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Blocks of rows: first and last row, kernel, distances, rounding error of squared distances.

    An image is not its own neighbour: there the kernel is 0 and the distance infinite.
    """
    x = features.double()
    squares = x.square().sum(1)
    zero = _ZERO * squares.mean().item()
    # On an accelerator a small operation takes as long as a larger one.
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
        yield torch.tensor([first, first + len(kernel)], device=x.device), kernel, distances, zero


def feature_sets(*sets: Tensor, device: Any = None) -> list[FeatureSet]:
    """Disjoint subsets of the concatenated features.

    Args:
        sets: features, (n, d) each.
        device: where they are compared; the CPU for MPS, which has no float64.
    """
    features = torch.cat(sets)
    if device is not None:
        features = features.to("cpu" if torch.device(device).type == "mps" else device)
    rows = torch.arange(len(features), device=features.device)
    sizes = [len(x) for x in sets]
    return [FeatureSet(features, subset) for subset in torch.split(rows, sizes)]


def leading_components(features: Tensor, num_directions: int) -> Tensor:
    """Features (N, d) along their directions of largest variance, (N, num_directions).

    The directions are estimated from about 1,000 evenly spaced images.
    """
    subset = features[:: max(1, len(features) // 1024)].double()
    subset = subset - subset.mean(0)
    vectors = torch.linalg.eigh(subset @ subset.T).eigenvectors[:, -num_directions:]
    directions = torch.linalg.qr(subset.T @ vectors).Q  # (d, num_directions)
    return torch.cat([rows.double() @ directions for rows in torch.split(features, 4096)])


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,), and a factor A of at most d rows with A^T A the covariance."""
    num, dims = x.shape
    mean = x.sum(0, dtype=torch.float64) / num
    if num <= dims + 1:
        return mean, _helmert_contrasts(x.double()) / math.sqrt(num - 1)
    factor = torch.empty(0, dims, dtype=torch.float64, device=x.device)
    for rows in torch.split(x, 6 * dims + 1024):
        factor = torch.cat([factor, rows.double() - mean])
        if len(factor) > dims:
            factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor / math.sqrt(num - 1)


def _helmert_contrasts(x: Tensor) -> Tensor:
    """Helmert contrasts (n - 1, d), with the sums of squares and products about the mean.

    Row k is the mean of the first k rows minus the next one, times sqrt(k / (k + 1)).
    """
    k = torch.arange(1, len(x), device=x.device, dtype=x.dtype)[:, None]
    return (x.cumsum(0)[:-1] / k - x[1:]) * (k / (k + 1)).sqrt()
