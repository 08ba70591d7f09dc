"""How far drawn images are from real ones, by their features: arrays (N, d), computed in float64.

Each function takes numpy arrays or tensors; `real` and `drawn` may differ in N. Images are compared
on the device that the tensors are on, in blocks, so that memory grows with N alone.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

_BLOCK = 2**24  # entries of a matrix of pairs that are in memory at once: 128 MB


class Estimate(float):
    """A number with its standard error.

    Attributes:
        standard_error: its standard deviation over draws of as many images.
    """

    standard_error: float

    def __new__(cls, value: float, standard_error: float) -> Self:
        estimate = super().__new__(cls, value)
        estimate.standard_error = standard_error
        return estimate

    def __repr__(self) -> str:
        return f"{float(self)} +- {self.standard_error:.2g}"


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of drawn images that look real, and of real ones that could be drawn."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, at least 0 and about 1 for real images; coverage, a share in [0, 1]."""

    density: float
    coverage: float


def frechet_distance(real: Any, drawn: Any) -> float:
    """Squared distance of the two Gaussians that have the means and covariances of the features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2)). The last trace is the sum
    of the singular values of B A^T for any A^T A = S_1 and B^T B = S_2: no square root of a
    covariance is taken, and N < d is no special case. Biased upwards, the more the fewer images.

    Args:
        real: features (N, d), N at least 2.
        drawn: features (M, d).
    Raises:
        ValueError: if they are no such arrays, or not finite.
    Source: FID (1706.08500), eq. 6.
    """
    real, drawn = _checked(real, drawn, at_least=2)
    (mean_1, a), (mean_2, b) = _mean_and_factor(real), _mean_and_factor(drawn)
    squares = (mean_1 - mean_2).square().sum() + a.square().sum() + b.square().sum()
    distance = squares - 2 * torch.linalg.svdvals(b @ a.T).sum()
    return max(0.0, float(distance))


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,), and A of at most d rows with A^T A the covariance."""
    num, dims = x.shape
    mean = x.sum(0, dtype=torch.float64) / num
    factor = torch.empty(0, dims, dtype=torch.float64, device=x.device)
    for rows in torch.split(x, 4 * dims + 1024):
        factor = torch.cat([factor, rows.double() - mean])
        if len(factor) > dims:
            factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor / math.sqrt(num - 1)


def kernel_distance(real: Any, drawn: Any) -> Estimate:
    """Squared maximum mean discrepancy for the kernel (x.y / d + 1)^3; unbiased, so it may be < 0.

    Args:
        real: features (N, d), N at least 3.
        drawn: features (M, d).
    Returns:
        the value, with its standard error by the jackknife over the images of both sets.
    Raises:
        ValueError: if they are no such arrays, or not finite.
    Source: KID (1801.01401), section 4.
    """
    real, drawn = _checked(real, drawn, at_least=3)
    # Sums of k(x, x'), k(y, y'), k(x, y) for each image.
    among_x, among_y = (_kernel_sums(x, x) - _kernel(x, x) for x in (real, drawn))
    x_to_y, y_to_x = _kernel_sums(real, drawn), _kernel_sums(drawn, real)
    n, m = len(real), len(drawn)
    s_xx, s_yy, s_xy = among_x.sum(), among_y.sum(), x_to_y.sum()

    def mmd(s_xx: Tensor, s_yy: Tensor, s_xy: Tensor, n: int, m: int) -> Tensor:
        return s_xx / (n * (n - 1)) + s_yy / (m * (m - 1)) - 2 * s_xy / (n * m)

    without_x = mmd(s_xx - 2 * among_x, s_yy, s_xy - x_to_y, n - 1, m)
    without_y = mmd(s_xx, s_yy - 2 * among_y, s_xy - y_to_x, n, m - 1)
    var = sum((len(v) - 1) * v.var(correction=0) for v in (without_x, without_y))
    return Estimate(mmd(s_xx, s_yy, s_xy, n, m).item(), math.sqrt(var))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x * y).sum(1, dtype=torch.float64) / x.shape[1] + 1) ** 3


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """The sum of k(x, y) over all y, for every x."""
    y = y.double()
    return torch.cat([((rows @ y.T / x.shape[1] + 1) ** 3).sum(1) for rows in _blocks(x, len(y))])


def precision_recall(real: Any, drawn: Any, k: int = 3) -> PrecisionRecall:
    """The share of drawn images among the real ones, and of real images among the drawn ones.

    An image is among others if it is no farther from one of them than that is from its k-th
    nearest neighbour.

    Args:
        real: features (N, d), N greater than k.
        drawn: features (M, d), likewise.
        k: neighbours that the radius reaches to.
    Raises:
        ValueError: if they are no such arrays, or not finite.
    Source: improved precision and recall (1904.06991), eq. 1 and 2.
    """
    real, drawn = _checked(real, drawn, at_least=k + 1)
    return PrecisionRecall(
        (_num_balls(drawn, real, k) > 0).double().mean().item(),
        (_num_balls(real, drawn, k) > 0).double().mean().item(),
    )


def density_coverage(real: Any, drawn: Any, k: int = 5) -> DensityCoverage:
    """How many real images' balls a drawn image lies in, over k; the share of balls with one in.

    The ball of a real image reaches to its k-th nearest real neighbour.

    Args:
        real: features (N, d), N greater than k.
        drawn: features (M, d).
        k: neighbours that the radius reaches to.
    Raises:
        ValueError: if they are no such arrays, or not finite.
    Source: density and coverage (2002.09797), eq. 3 and 4.
    """
    real, drawn = _checked(real, drawn, at_least=k + 1)
    is_covered = nearest_distances(real, drawn) <= nearest_distances(real, k=k)
    return DensityCoverage(
        _num_balls(drawn, real, k).double().mean().item() / k, is_covered.double().mean().item()
    )


def nearest_distances(x: Tensor, y: Tensor | None = None, k: int = 1) -> Tensor:
    """The distance of each of `x` to its k-th nearest of `y`; without `y` of the others of `x`."""
    others = x if y is None else y
    nearest = torch.empty(len(x), dtype=torch.float64, device=x.device)
    first = 0
    for rows in _pair_distances(x, others):
        last = first + len(rows)
        if y is None:
            rows[:, first:last].fill_diagonal_(math.inf)
        nearest[first:last] = rows.kthvalue(k, dim=1).values
        first = last
    return nearest


def _num_balls(x: Tensor, centres: Tensor, k: int) -> Tensor:
    """In how many balls around `centres`, each up to its k-th neighbour, each of `x` lies."""
    radii = nearest_distances(centres, k=k)
    return torch.cat([(rows <= radii).sum(1) for rows in _pair_distances(x, centres)])


def _pair_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    y = y.double()
    return (torch.cdist(rows, y) for rows in _blocks(x, len(y)))


def _blocks(x: Tensor, width: int) -> Iterator[Tensor]:
    return (rows.double() for rows in torch.split(x, max(1, _BLOCK // width)))


def _checked(real: Any, drawn: Any, at_least: int) -> tuple[Tensor, Tensor]:
    real, drawn = torch.as_tensor(real), torch.as_tensor(drawn)
    for name, x in (("real", real), ("drawn", drawn)):
        if x.ndim != 2 or x.shape[1] != real.shape[-1] or len(x) < at_least:
            raise ValueError(
                f"{name} must be features (N, d) of N >= {at_least} images, the same d for both, "
                f"got shapes {tuple(real.shape)} and {tuple(drawn.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(
                f"{name} must be finite, but {int((~x.isfinite()).sum())} values are not"
            )
    return real, drawn
