"""Distances between real and drawn images by their features, arrays (N, d); float64 arithmetic.

Each function takes numpy arrays or tensors; `real` and `drawn` may differ in N. Images are compared
on their device in blocks, so that memory is linear in N. A function whose name ends in `_of` takes
precomputed statistics of a pair of sets.
"""

import math
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.evaluation.neighbour_statistics import (
    Balls,
    FeatureSet,
    NeighbourStatistics,
    PairStatistics,
    feature_sets,
    pair_statistics,
)

# If the smallest eigenvalue exceeds this share of the largest, its root is accurate to 1e-9 of the
# root of the largest.
_WELL_CONDITIONED = 1e-12


class Estimate(float):
    """A number with its standard error.

    Attributes:
        standard_error: standard deviation over samples of the same size.
    """

    standard_error: float

    def __new__(cls, value: float, standard_error: float) -> Self:
        estimate = super().__new__(cls, value)
        estimate.standard_error = standard_error
        return estimate

    def __repr__(self) -> str:
        return f"{float(self)} +- {self.standard_error:.2g}"


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: drawn images that look real, and real images that the model covers."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, at least 0 and about 1 for real images; coverage, a share in [0, 1]."""

    density: float
    coverage: float


def frechet_distance(real: Any, drawn: Any) -> float:
    """Squared Frechet distance of Gaussians with the means and covariances of the features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2)). The last trace is the sum
    of the singular values of B A^T for any A^T A = S_1 and B^T B = S_2: no square root of a
    covariance is needed, and N < d is not a special case. Biased upwards, more for fewer images.

    Args:
        real: features (N, d), N at least 2.
        drawn: features (M, d), M at least 2.
    Raises:
        ValueError: for other shapes, or features that are not finite.
    Source: FID (1706.08500), eq. 6.
    """
    real, drawn = _checked(real, drawn, at_least=2)
    (mean_1, a), (mean_2, b) = real.moments, drawn.moments
    squares = (mean_1 - mean_2).square().sum() + a.square().sum() + b.square().sum()
    return max(0.0, float(squares - 2 * _sum_of_singular_values(b @ a.T)))


def _sum_of_singular_values(matrix: Tensor) -> Tensor:
    """Sum of the singular values.

    Uses the eigenvalues of the smaller Gram matrix, three times as fast, if it is well conditioned.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    if squares[0] > _WELL_CONDITIONED * squares[-1]:
        return squares.sqrt().sum()
    values: Tensor = torch.linalg.svdvals(wide)
    return values.sum()


def kernel_distance(real: Any, drawn: Any) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3; unbiased, so may be < 0.

    Args:
        real: features (N, d), N at least 3.
        drawn: features (M, d), M at least 3.
    Returns:
        the value and its standard error: the square root of the unbiased estimate of the variance.
    Raises:
        ValueError: for other shapes, or features that are not finite.
    Source: KID (1801.01401), section 4; variance of a U-statistic: Hoeffding (1948).
    """
    (pair,) = pair_statistics([_checked(real, drawn, at_least=3)])
    return kernel_distance_of(pair)


def kernel_distance_of(pair: PairStatistics) -> Estimate:
    """See `kernel_distance`."""
    among_x, among_y, x_to_y, y_to_x = (statistics.kernel_sums for statistics in pair)
    n, m = len(among_x), len(among_y)
    s_xx, s_yy, s_xy = among_x.sum(), among_y.sum(), x_to_y.sum()

    def mmd(s_xx: Tensor, s_yy: Tensor, s_xy: Tensor, n: int, m: int) -> Tensor:
        return s_xx / (n * (n - 1)) + s_yy / (m * (m - 1)) - 2 * s_xy / (n * m)

    without_x = mmd(s_xx - 2 * among_x, s_yy, s_xy - x_to_y, n - 1, m)
    without_y = mmd(s_xx, s_yy - 2 * among_y, s_xy - y_to_x, n, m - 1)
    jackknife = sum((len(v) - 1) * v.var(correction=0).item() for v in (without_x, without_y))
    var = _without_excess(jackknife, pair, n, m)
    return Estimate(mmd(s_xx, s_yy, s_xy, n, m).item(), math.sqrt(var))


def _without_excess(jackknife: float, pair: PairStatistics, n: int, m: int) -> float:
    """The jackknife variance of the kernel distance without its bias.

    The jackknife counts twice the part of the variance that comes from pairs of images (second
    order in the Hoeffding decomposition), which is all of it if both distributions are equal. The
    estimate of the rest may be negative: the result is at least half of the part from pairs.
    """
    v_xx, v_yy = _centred_square(pair.among_real), _centred_square(pair.among_drawn)
    v_xy = _centred_square_between(pair.real_to_drawn, pair.drawn_to_real)
    of_pairs = 2 * v_xx / (n * (n - 1)) + 2 * v_yy / (m * (m - 1)) + 4 * v_xy / (n * m)
    excess = 2 * v_xx / ((n - 1) * (n - 2)) + 2 * v_yy / ((m - 1) * (m - 2)) + 4 * v_xy / (n * m)
    return max(jackknife - excess, of_pairs / 2)


def _centred_square(among: NeighbourStatistics) -> float:
    """Unbiased estimate of the mean square of the doubly centred kernel within a set; 0 for n = 3.

    Source: partial distance correlation (1310.2926), eq. 3.1 and proposition 1.
    """
    n, sums = len(among.kernel_sums), among.kernel_sums
    total = among.kernel_squares.sum() - 2 / (n - 2) * sums.square().sum()
    total += sums.sum().square() / ((n - 1) * (n - 2))
    return max(0.0, total.item()) / (n * (n - 3)) if n > 3 else 0.0


def _centred_square_between(x_to_y: NeighbourStatistics, y_to_x: NeighbourStatistics) -> float:
    """Unbiased estimate of the mean square of the doubly centred kernel between two sets."""
    rows, columns = x_to_y.kernel_sums, y_to_x.kernel_sums
    n, m = len(rows), len(columns)
    total = x_to_y.kernel_squares.sum() - rows.square().sum() / m - columns.square().sum() / n
    total += rows.sum().square() / (n * m)
    return max(0.0, total.item()) / ((n - 1) * (m - 1))


def precision_recall(real: Any, drawn: Any, k: int = 3) -> PrecisionRecall:
    """Shares of drawn images in the real manifold, and of real images in the drawn manifold.

    The manifold of a set is the union of closed balls around its images; a ball reaches to the k-th
    nearest neighbour in the set.

    Args:
        real: features (N, d), N greater than k.
        drawn: features (M, d), M greater than k.
        k: rank of the neighbour at the radius of a ball.
    Raises:
        ValueError: for other shapes, or features that are not finite.
    Source: improved precision and recall (1904.06991), eq. 1 and 2.
    """
    (pair,) = pair_statistics([_checked(real, drawn, at_least=k + 1)], Balls(closed=[k]))
    return precision_recall_of(pair, k)


def precision_recall_of(pair: PairStatistics, k: int = 3) -> PrecisionRecall:
    """See `precision_recall`."""
    return PrecisionRecall(
        pair.real_to_drawn.is_covered[k].double().mean().item(),
        pair.drawn_to_real.is_covered[k].double().mean().item(),
    )


def density_coverage(real: Any, drawn: Any, k: int = 5) -> DensityCoverage:
    """Mean number of balls around a drawn image, over k; share of balls with a drawn image.

    The open ball of a real image reaches to its k-th nearest real neighbour, which is outside.

    Args:
        real: features (N, d), N greater than k.
        drawn: features (M, d), M greater than k.
        k: rank of the neighbour at the radius of a ball.
    Raises:
        ValueError: for other shapes, or features that are not finite.
    Source: density and coverage (2002.09797), eq. 3 and 4.
    """
    (pair,) = pair_statistics([_checked(real, drawn, at_least=k + 1)], Balls(open=[k]))
    return density_coverage_of(pair, k)


def density_coverage_of(pair: PairStatistics, k: int = 5) -> DensityCoverage:
    """See `density_coverage`."""
    balls = pair.real_to_drawn
    return DensityCoverage(
        balls.num_balls[k].double().mean().item() / k, balls.has_inside[k].double().mean().item()
    )


def _checked(real: Any, drawn: Any, at_least: int) -> tuple[FeatureSet, FeatureSet]:
    if not isinstance(real, FeatureSet):
        real, drawn = _as_tensor(real), _as_tensor(drawn)
        for name, x in (("real", real), ("drawn", drawn)):
            if x.ndim != 2 or x.shape[1] != real.shape[-1]:
                raise ValueError(
                    f"`{name}` must be features (N, d) with the same d for both, got shapes"
                    f" {tuple(real.shape)} and {tuple(drawn.shape)}"
                )
            if not x.isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite, but {int((~x.isfinite()).sum())} values are not"
                )
        real, drawn = feature_sets(real, drawn)
    for name, x in (("real", real), ("drawn", drawn)):
        if len(x) < at_least:
            raise ValueError(
                f"`{name}` must be features of at least {at_least} images, got {len(x)}"
            )
    return real, drawn


def _as_tensor(x: Any) -> Tensor:
    # torch refuses negative strides, and warns about read-only memory.
    return x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))
