"""Sets of images by their features, in one pool: halves of them are cheap to compare."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_KEPT = 2**26  # entries of the matrix of all inner products that is kept: 512 MB
_BLOCK = 2**24  # entries of a matrix of pairs that are in memory at once: 128 MB


class Pool:
    """Features of all images at hand, (N, d), and their inner products in float64.

    Those are kept where they fit, up to some 8,000 images, or else computed each time.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features

    @cached_property
    def products(self) -> Tensor | None:
        """All of them, (N, N), or None where that is too large."""
        x = self.features
        return x.double() @ x.double().T if len(x) ** 2 <= _KEPT else None

    @cached_property
    def squares(self) -> Tensor:
        """Of each image with itself, (N,)."""
        if self.products is not None:
            return self.products.diagonal()
        return torch.cat(
            [rows.double().square().sum(1) for rows in torch.split(self.features, 4096)]
        )


class FeatureSet:
    """Some images of a pool; indexed like a tensor, it gives some of these.

    Attributes:
        pool: where they are.
        rows: which, (n,).
    """

    def __init__(self, pool: Pool, rows: Tensor) -> None:
        self.pool, self.rows = pool, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, picked: Any) -> "FeatureSet":
        return FeatureSet(self.pool, self.rows[picked])

    @property
    def features(self) -> Tensor:
        """Of these images, (n, d)."""
        return self.pool.features[self.rows]

    @property
    def squares(self) -> Tensor:
        """The inner product of each image with itself, (n,)."""
        return self.pool.squares[self.rows]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,), and A of at most d rows with A^T A the covariance."""
        return _mean_and_factor(self.features)

    def products(self, other: "FeatureSet") -> Iterator[Tensor]:
        """Inner products with those of another set of the pool: some rows of (n, m) at once."""
        kept, columns = self.pool.products, None
        for rows in torch.split(self.rows, max(1, _BLOCK // len(other))):
            if kept is not None:
                yield kept[rows[:, None], other.rows]
                continue
            if columns is None:
                columns = other.features.double().T
            yield self.pool.features[rows].double() @ columns

    def distances(self, other: "FeatureSet") -> Iterator[Tensor]:
        """Distances to those of another set of the pool: some rows of (n, m) at once."""
        first = 0
        for products in self.products(other):
            last = first + len(products)
            squares = self.squares[first:last, None] + other.squares
            yield squares.sub_(products, alpha=2).clamp_(min=0).sqrt_()
            first = last


def pooled(*sets: Tensor, device: Any = None) -> list[FeatureSet]:
    """Sets of one pool.

    Args:
        sets: features, (n, d) each.
        device: where they are compared; without float64 there, on the CPU.
    """
    features = torch.cat(sets)
    if device is not None:
        features = features.to("cpu" if torch.device(device).type == "mps" else device)
    rows = torch.arange(len(features), device=features.device)
    pool = Pool(features)
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
