"""Distances between features: against closed forms, brute force and torchmetrics."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from ddpm_hf.evaluation import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from ddpm_hf.evaluation.metrics import closest_pairs, measure
from ddpm_hf.evaluation.neighbour_statistics import feature_sets, pair_statistics
from ddpm_hf.randomness import seed_of

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _fresh_random_numbers(monkeypatch):
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(0))


def whitened(num, dims):
    """Features whose mean is 0 and whose covariance is the identity, both exactly."""
    x = RNG.standard_normal((num, dims))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def sets(num=40, dims=7, shift=0.5):
    return RNG.standard_normal((num, dims)), RNG.standard_normal((num - 9, dims)) * 1.3 + shift


def test_fd_of_gaussian_features_matches_the_closed_form():
    """N(0, I) and N(m, A A^T): |m|^2 + d + |A|_F^2 - 2 |A|_*."""
    mean, a = RNG.standard_normal(6), RNG.standard_normal((6, 6))
    real, drawn = whitened(50, 6), whitened(300, 6) @ a.T + mean
    nuclear = np.linalg.svd(a, compute_uv=False).sum()
    want = (mean**2).sum() + (a**2).sum() + 6 - 2 * nuclear
    assert frechet_distance(real, drawn) == pytest.approx(want, rel=1e-12)


def by_symmetric_square_roots(real, drawn):
    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    s_1, s_2 = np.cov(real.T), np.cov(drawn.T)
    between = root(root(s_1) @ s_2 @ root(s_1))
    gap = real.mean(0) - drawn.mean(0)
    return gap @ gap + np.trace(s_1) + np.trace(s_2) - 2 * np.trace(between)


# With at most as many images as dimensions, one or both covariances are singular.
@pytest.mark.parametrize(("num", "dims"), [(300, 20), (30, 50), (25, 25), (26, 25), (30, 25)])
def test_fd_matches_matrix_square_roots_also_for_fewer_images_than_dimensions(num, dims):
    real, drawn = sets(num, dims)
    want = by_symmetric_square_roots(real, drawn)
    # The oracle's null eigenvalues, 1e-16 of the largest, have roots of 1e-8 of its root.
    assert frechet_distance(real, drawn) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(drawn, real) == pytest.approx(frechet_distance(real, drawn), rel=1e-12)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-10)


@pytest.mark.slow
def test_fd_matches_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance  # imports for seconds

    real, drawn = map(torch.from_numpy, sets(300, 30))
    network = torch.nn.Flatten()
    network.num_features = 30
    theirs = FrechetInceptionDistance(feature=network, input_img_size=(30,)).set_dtype(
        torch.float64
    )
    theirs.update(real, real=True)
    theirs.update(drawn, real=False)
    assert frechet_distance(real, drawn) == pytest.approx(theirs.compute().item(), rel=1e-5)


def kid_by_pairs(x, y):
    """The sum over all pairs of different images."""

    def mean(a, b, same):
        return np.mean([
            (p @ q / len(p) + 1) ** 3
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j)
        ])  # fmt: skip

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def square_of_mmd(x, y):
    """Unbiased estimate of the square of the maximum mean discrepancy (which is a square itself).

    Each product of two expectations is a mean over tuples of different images.
    """
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))

    def mean(num_x, num_y, term):
        return np.mean([
            term(*i, *j)
            for i in itertools.permutations(range(len(x)), num_x)
            for j in itertools.permutations(range(len(y)), num_y)
        ])  # fmt: skip

    return (
        mean(4, 0, lambda i, j, m, n: xx[i, j] * xx[m, n])
        + mean(0, 4, lambda i, j, m, n: yy[i, j] * yy[m, n])
        + 4 * mean(2, 2, lambda i, j, m, n: xy[i, m] * xy[j, n])
        + 2 * mean(2, 2, lambda i, j, m, n: xx[i, j] * yy[m, n])
        - 4 * mean(3, 1, lambda i, j, m, n: xx[i, j] * xy[m, n])
        - 4 * mean(1, 3, lambda i, j, m, n: yy[j, m] * xy[i, n])
    )


@pytest.mark.parametrize(("num_real", "num_drawn"), [(6, 7), (7, 4)])
def test_kid_matches_the_mean_over_pairs_and_the_unbiased_variance(num_real, num_drawn):
    """var T = E T^2 - (E T)^2; its symmetric unbiased estimate is unique."""
    rng = np.random.default_rng(3)
    real, drawn = rng.standard_normal((num_real, 5)), rng.standard_normal((num_drawn, 5)) + 1.5
    distance = kernel_distance(real, drawn)
    assert distance == pytest.approx(kid_by_pairs(real, drawn), rel=1e-12)
    var = distance**2 - square_of_mmd(real, drawn)
    assert distance.standard_error**2 == pytest.approx(var, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "other_shape", "shift"),
    [((60, 4), (60, 4), s) for s in (0.3, 0)] + [((40, 30), (80, 30), 0), ((20, 9), (20, 9), 0)],
)
def test_the_error_of_kid_matches_the_spread_over_samples(shape, other_shape, shift):
    """Equal distributions, where KID is degenerate, and different ones."""
    rng = np.random.default_rng(0)
    draws = [
        kernel_distance(rng.standard_normal(shape), rng.standard_normal(other_shape) + shift)
        for _ in range(600)
    ]
    errors = np.array([draw.standard_error for draw in draws])
    spread = np.std(draws)  # accurate to 5 % for these tails
    assert errors.mean() == pytest.approx(spread, rel=0.12)
    assert np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.15)
    assert errors.min() > 0.15 * spread


def test_kid_is_unbiased():
    same = [kernel_distance(*RNG.standard_normal((2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(len(same))
    assert min(same) < 0
    assert kernel_distance(*RNG.standard_normal((2, 3, 4))).standard_error > 0


def balls(centres, k):
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    return np.sort(gaps, axis=1)[:, k]  # the 0th is itself


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_match_the_definitions_of_their_papers(k):
    real, drawn = sets(40, 3, 0.8)
    gaps = np.linalg.norm(real[:, None] - drawn[None], axis=2)  # (N, M)
    in_real, in_drawn = gaps <= balls(real, k)[:, None], gaps <= balls(drawn, k)[None]
    want = in_real.any(0).mean(), in_drawn.any(1).mean()
    assert precision_recall(real, drawn, k=k) == pytest.approx(want)
    in_real = gaps < balls(real, k)[:, None]
    want = in_real.sum(0).mean() / k, in_real.any(1).mean()
    assert density_coverage(real, drawn, k=k) == pytest.approx(want)


def measures(real, drawn):
    precision, recall = precision_recall(real, drawn)
    density, coverage = density_coverage(real, drawn)
    return {
        "fd": frechet_distance(real, drawn), "kid": kernel_distance(real, drawn),
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    }  # fmt: skip


def test_block_size_and_order_of_images_only_affect_rounding(monkeypatch):
    real, drawn = sets(60, 5)
    want = measures(real, drawn)
    monkeypatch.setattr("ddpm_hf.evaluation.neighbour_statistics._BLOCK", 7 * 60)
    order = RNG.permutation(len(drawn))
    # Sums in another order: some 1e4 roundings of 1e-16, and 1e3 of cancellation.
    assert measures(real[::-1].copy(), drawn[order]) == pytest.approx(want, rel=1e-9)


def by_scikit_learn(real, drawn):
    """All pairwise figures, by nearest-neighbour search and full matrices."""

    def radii(x, k):
        return NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x).kneighbors()[0][:, -1]

    def gaps(x, y):
        return NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(y).kneighbors(x)[0][:, 0]

    def kernel(x, y):
        values = polynomial_kernel(x, y, degree=3)
        if y is not x:
            return values.mean()
        return (values.sum() - values.trace()) / len(x) / (len(x) - 1)

    pairs = np.linalg.norm(real[:, None] - drawn[None], axis=2)
    near = max(np.quantile(radii(real, 1), 0.01), 1e-3 * np.median(radii(real, 1)))
    return {
        "kid": kernel(real, real) + kernel(drawn, drawn) - 2 * kernel(real, drawn),
        "precision": (pairs <= radii(real, 3)[:, None]).any(0).mean(),
        "recall": (pairs <= radii(drawn, 3)[None]).any(1).mean(),
        "density": (pairs < radii(real, 5)[:, None]).sum() / 5 / len(drawn),
        "coverage": (gaps(real, drawn) < radii(real, 5)).mean(),
        "copies": (gaps(drawn, real) <= near).mean(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_held_out", [None, 16])
def test_pairwise_figures_of_all_resamples_match_scikit_learn(num_held_out, monkeypatch):
    monkeypatch.setattr("ddpm_hf.evaluation.neighbour_statistics._BLOCK", 7 * 60)
    real, drawn = sets(91, 5)
    drawn[:8] = real[:8] + 1e-6
    z = None if num_held_out is None else RNG.standard_normal((num_held_out, 5))
    metrics = ["kid", "precision-recall", "coverage", "memorisation"]
    others = None if z is None else torch.from_numpy(z)
    measured = measure(metrics, torch.from_numpy(real), torch.from_numpy(drawn), others)
    by_name = {figure.name: figure for figure in measured}
    want = by_scikit_learn(real, drawn)
    assert {name: figure.value for name, figure in by_name.items()} == pytest.approx(want)
    generator = torch.Generator().manual_seed(seed_of(0, "halves"))
    halves, floors = [], []
    for _ in range(20):
        x, *rest = (
            images[torch.randperm(len(images), generator=generator).numpy()]
            for images in (real, *([] if z is None else [z]), drawn)
        )
        half = rest[-1][: len(drawn) // 2]
        others = x[46:] if z is None else rest[0][: len(z) // 2]
        size = min(len(others), len(half))
        halves.append(by_scikit_learn(x[:46], half))
        floors.append([by_scikit_learn(x[:46], y[:size]) for y in (half, others)])
    for name, figure in by_name.items():
        assert figure.halves == pytest.approx([half[name] for half in halves]), name
        means = [np.mean([floor[i][name] for floor in floors]) for i in range(2)]
        assert (figure.floor.drawn, figure.floor.real) == pytest.approx(tuple(means)), name


MEASURES = [frechet_distance, kernel_distance, precision_recall, density_coverage]


@pytest.mark.parametrize("measure", MEASURES)
def test_views_lists_and_read_only_arrays_are_accepted(measure):
    real, drawn = sets(20, 4)
    want = measure(real[::-1].copy(), drawn)
    frozen = np.asfortranarray(real[::-1])
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (real[::-1], frozen, real[::-1].tolist(), torch.from_numpy(real).flip(0)):
            assert measure(x, drawn) == pytest.approx(want, rel=1e-12)
        assert measure(real[::-1], drawn[:, ::-1][:, ::-1]) == pytest.approx(want, rel=1e-12)


def test_equal_images_have_distance_0_despite_rounding():
    """Many dimensions far from the origin: squared distances have rounding errors of 1e-13."""
    one = RNG.standard_normal((60, 700)) + 10
    real = np.repeat(one, 6, 0)  # balls of radius 0
    (pair,) = pair_statistics([tuple(feature_sets(torch.from_numpy(real), torch.from_numpy(one)))])
    assert (pair.drawn_to_real.nearest == 0).all()
    assert precision_recall(real, one) == (1, 1)
    assert density_coverage(real, one) == (0, 0)  # open balls of radius 0 are empty
    assert sorted(closest_pairs(torch.from_numpy(one), torch.from_numpy(one[::-1].copy()), 60)) == [
        (i, 59 - i) for i in range(60)
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("num", "dims", "mean"), [(200, 5, 0), (150, 700, 10), (61, 64, 100)])
def test_copies_have_density_and_coverage_1(k, num, dims, mean):
    """A copy of the k-th neighbour is at the radius, up to rounding: not in the open ball."""
    real = RNG.standard_normal((num, dims)) + mean
    copies = real[RNG.permutation(num)]
    assert density_coverage(real, copies, k=k) == (1, 1)
    assert precision_recall(real, copies, k=k) == (1, 1)


def test_images_on_a_grid_have_the_density_of_open_balls():
    """The nearest neighbours of a point of the grid are at distance 1, the radius of its ball."""
    grid = np.stack(np.meshgrid(*3 * [np.arange(6.0)]), -1).reshape(-1, 3)
    assert density_coverage(grid, grid, k=3) == (1 / 3, 1)  # each point is only in its own ball
    beside = grid[grid[:, 0] > 0] - (1, 0, 0)
    assert density_coverage(grid, beside, k=3) == (1 / 3, 5 / 6)
    assert precision_recall(grid, beside, k=3).precision == 1


def test_noise_lost_modes_and_copies_each_move_the_corresponding_metric():
    modes = RNG.standard_normal((9, 6))

    def draw(num, modes=modes, noise=0.2):
        return modes[np.arange(num) % len(modes)] + noise * RNG.standard_normal((num, 6))

    real = draw(400)
    good, noisy = measures(real, draw(400)), measures(real, draw(400, noise=1))
    fewer, copies = measures(real, draw(400, modes[:3])), measures(real, real[RNG.permutation(400)])
    for worse in (noisy, fewer):
        assert worse["fd"] > 3 * good["fd"]
        assert worse["kid"] - good["kid"] > 4 * worse["kid"].standard_error
    assert noisy["precision"] < good["precision"] - 0.2
    assert noisy["density"] < good["density"] - 0.2
    assert fewer["precision"] > good["precision"] - 0.1  # drawn images still look real
    assert fewer["recall"] < good["recall"] - 0.3
    assert fewer["coverage"] < good["coverage"] - 0.3
    assert copies["fd"] < 0.1 * good["fd"]  # better than real images: hence the floor


REFUSED = [
    (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\)"),
    (np.zeros((5, 3)), np.zeros((1, 3)), "`drawn` must be features"),
    (np.zeros(5), np.zeros((5, 3)), "`real` must be features"),
    (np.zeros((5, 3)), np.full((5, 3), math.nan), "`drawn` must be finite, but 15 values"),
]


@pytest.mark.parametrize(("real", "drawn", "message"), REFUSED)
@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_invalid_feature_arrays_are_rejected(measure, real, drawn, message):
    with pytest.raises(ValueError, match=message):
        measure(real, drawn)
