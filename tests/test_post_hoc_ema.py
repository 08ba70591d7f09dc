"""Profiles of weight averages against quadrature and explicit sums, and hostile snapshots."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import resolved

from ddpm_hf.paths import RunPaths
from ddpm_hf.post_hoc_ema.profiles import (
    MAX_SIGMA_REL,
    PowerFunctionEMA,
    beta,
    gamma_of,
    inner_product,
    profile,
    sigma_rel_of,
    solve_weights,
)
from ddpm_hf.post_hoc_ema.snapshots import (
    list_snapshots,
    remove_snapshots_after,
    save_snapshot,
    usable_snapshots,
    weighted_sum,
)
from ddpm_hf.training import ConfigError, TrainingConfig

LENGTHS = (0.02, 0.05, 0.1, 0.2, MAX_SIGMA_REL)
# Exact for polynomials up to degree 399; the profiles are smooth between the cuts.
NODES, QUADRATURE = np.polynomial.legendre.leggauss(200)


def integral(function, start, end, cuts=()):
    """Gauss-Legendre quadrature, piece by piece between the cuts."""
    ends = sorted({start, end, *(cut for cut in cuts if start < cut < end)})
    total = 0.0
    for a, b in itertools.pairwise(ends):
        total += (b - a) / 2 * np.sum(QUADRATURE * function((a + b) / 2 + (b - a) / 2 * NODES))
    return total


def running_average(sigma_rel, num_updates):
    """Weight of every update in the running average, (num_updates,): it averages unit vectors."""
    start = torch.full((num_updates,), 1e9, dtype=torch.float64)
    average = PowerFunctionEMA([start], sigma_rel)
    for t, theta in enumerate(torch.eye(num_updates, dtype=torch.float64), start=1):
        average.update([theta], t)
    return average.averages[0].numpy()


def test_the_exponents_of_the_paper_belong_to_its_lengths():
    # Section 3.2 rounds them to two digits.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.001, *LENGTHS])
def test_exponent_and_length_are_inverse(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-11)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.289, float("nan"), float("inf")])
def test_a_length_outside_its_range_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"`sigma_rel` must be in \(0, 0.288675\], got"):
        gamma_of(sigma_rel)
    assert gamma_of(0.288675) < 1e-5  # the bound in the message is inside of the range


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_profile_integrates_to_one_and_has_the_standard_deviation(sigma_rel):
    t, gamma = 7.0, gamma_of(sigma_rel)
    moments = [integral(lambda x, n=n: x**n * profile(x, t, gamma), 0, t) for n in range(3)]
    assert moments[0] == pytest.approx(1, rel=1e-12)
    deviation = np.sqrt(moments[2] - moments[1] ** 2)
    assert deviation / t == pytest.approx(sigma_rel, rel=1e-9)
    assert profile([-1, 7.5], t, gamma).tolist() == [0, 0]


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_running_average_weighs_each_update_by_the_integral_of_the_profile(sigma_rel):
    num_updates, gamma = 40, gamma_of(sigma_rel)
    expected = [
        integral(lambda x: profile(x, num_updates, gamma), s - 1, s)
        for s in range(1, num_updates + 1)
    ]
    np.testing.assert_allclose(running_average(sigma_rel, num_updates), expected, atol=1e-13)


def test_the_first_update_replaces_the_initial_average():
    # Decays that are off by one update, or applied every tenth update only, keep part of it.
    assert beta(1, gamma_of(0.05)) == 0
    average = PowerFunctionEMA([torch.full((3,), 1e9)], 0.05)
    average.update([torch.tensor([1.0, 2.0, 3.0])], 1)
    assert average.averages[0].tolist() == [1, 2, 3]


def test_the_weights_of_a_long_run_have_the_requested_standard_deviation():
    num_updates, times = 300, np.arange(1, 301) - 0.5
    weights = running_average(0.1, num_updates)
    mean = np.sum(weights * times)
    deviation = np.sqrt(np.sum(weights * (times - mean) ** 2)) / num_updates
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert deviation == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("t_a", "t_b"), [(2.0, 5.0), (5.0, 2.0), (3.0, 3.0)])
def test_inner_products_agree_with_quadrature(t_a, t_b):
    a, b = gamma_of(0.05), gamma_of(0.15)
    by_quadrature = integral(
        lambda x: profile(x, t_a, a) * profile(x, t_b, b), 0, max(t_a, t_b), cuts=(t_a, t_b)
    )
    assert inner_product(t_a, a, t_b, b) == pytest.approx(by_quadrature, rel=1e-10)


def test_inner_products_are_finite_and_scale_for_long_runs_and_large_exponents():
    a, b = 1e4, 3e3
    small, large = inner_product(0.999, a, 1, b), inner_product(0.999e12, a, 1e12, b)
    assert 0 < small < np.inf
    assert large * 1e12 == pytest.approx(small, rel=1e-9)
    assert inner_product(1, a, 1e12, a) == 0  # underflows, without a warning


def snapshots_at(times):
    """Times and exponents of two averages at each time."""
    return np.repeat(times, 2), np.tile([gamma_of(0.05), gamma_of(0.10)], len(times))


def test_a_stored_profile_is_reconstructed_exactly():
    times, gammas = snapshots_at(np.arange(100, 1001, 100))
    weights, error = solve_weights(times, gammas, 1000, gamma_of(0.10))
    np.testing.assert_allclose(weights, np.eye(20)[-1], atol=1e-9)
    assert error < 1e-7


@pytest.mark.parametrize(("sigma_rel", "bound"), [(0.03, 0.012), (0.07, 0.001), (0.2, 0.007)])
def test_the_stated_error_is_that_of_the_profile(sigma_rel, bound):
    gamma, cuts = gamma_of(sigma_rel), np.arange(1, 33) / 32
    times, gammas = snapshots_at(cuts)
    weights, error = solve_weights(times, gammas, 1, gamma)
    assert weights.sum() == pytest.approx(1, abs=1e-10)

    def difference(x):
        sums = (weights[:, None] * profile(x, times[:, None], gammas[:, None])).sum(0)
        return (sums - profile(x, 1, gamma)) ** 2

    squared = integral(difference, 0, 1, cuts)
    norm = integral(lambda x: profile(x, 1, gamma) ** 2, 0, 1)
    assert error == pytest.approx(np.sqrt(squared / norm), rel=1e-3)
    assert error < bound


def test_no_other_weights_with_the_same_sum_come_closer():
    times, gammas = snapshots_at(np.arange(1, 9) / 8)
    weights, error = solve_weights(times, gammas, 1, gamma_of(0.03))
    A = inner_product(times[:, None], gammas[:, None], times, gammas)
    b = inner_product(times, gammas, 1, gamma_of(0.03))
    norm = inner_product(1, gamma_of(0.03), 1, gamma_of(0.03))
    for step in np.random.default_rng(0).normal(size=(20, len(weights))) * 1e-3:
        x = weights + step - step.mean()
        assert np.sqrt((x @ A @ x - 2 * x @ b + norm) / norm) > error


def test_an_average_of_another_length_is_reconstructed_from_running_averages():
    num_updates, every, target = 320, 10, 0.03
    thetas = torch.eye(num_updates, dtype=torch.float64)
    averages = [PowerFunctionEMA([thetas[0]], s) for s in (0.05, 0.10)]
    taken, times, gammas = [], [], []
    for t, theta in enumerate(thetas, start=1):
        for average in averages:
            average.update([theta], t)
            if t % every == 0:
                taken.append(average.averages[0].numpy().copy())
                times.append(t)
                gammas.append(average.gamma)
    weights, error = solve_weights(times, gammas, num_updates, gamma_of(target))
    exact = running_average(target, num_updates)
    difference = np.linalg.norm(weights @ np.array(taken) - exact) / np.linalg.norm(exact)
    assert difference == pytest.approx(error, rel=0.1)  # an integral over updates became a sum
    assert difference < 0.012


def test_snapshots_that_almost_coincide_have_moderate_weights():
    times, gammas = snapshots_at([500_000, 999_998, 999_999, 1_000_000])
    weights, _ = solve_weights(times, gammas, 1_000_000, gamma_of(0.07))
    assert np.abs(weights).sum() < 10


SHAPES = {"a": torch.Size([2]), "b": torch.Size([2, 3])}


def weights_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20):
        for sigma_rel in (0.05, 0.1):
            save_snapshot(tmp_path / "s", step, sigma_rel, weights_of(step))
    return tmp_path / "s"


def test_snapshots_are_half_precision_files_in_order_of_the_updates(folder):
    (folder / "notes.txt").touch()
    found = [(s.step, s.sigma_rel) for s in list_snapshots(folder)]
    assert found == [(10, 0.05), (10, 0.1), (20, 0.05), (20, 0.1)]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 500
    stored = load_file(folder / "step-00000010-std-0.05.safetensors")
    assert all(torch.equal(stored[n], w.half()) for n, w in weights_of(10).items())
    assert list_snapshots(folder / "missing") == []


def test_a_weight_beyond_half_precision_keeps_its_value(tmp_path):
    weights = {"a": torch.tensor([1e6, 1.0]), "b": torch.ones(2, 3)}
    save_snapshot(tmp_path, 1, 0.05, weights)
    (snapshot,) = usable_snapshots(tmp_path, SHAPES)
    assert weighted_sum([snapshot], [2.0])["a"].tolist() == [2e6, 2]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"weight a of step-00000001-std-0\.05.* is not finite"):
        save_snapshot(tmp_path, 1, 0.05, {"a": torch.tensor([float("nan")])})
    assert list(tmp_path.iterdir()) == []


def test_a_weighted_sum_is_the_sum_of_the_stored_values(folder):
    snapshots = usable_snapshots(folder, SHAPES)
    total = weighted_sum(snapshots, [0.5, 1.5, -2.0, 1.0])
    for name in SHAPES:
        a, b = (weights_of(step)[name].half().double() for step in (10, 20))
        torch.testing.assert_close(total[name].double(), 2 * a - b, rtol=1e-5, atol=1e-6)


def test_later_snapshots_and_partial_files_are_removed(folder):
    (folder / ".new-step-00000020-std-0.05.safetensors").touch()
    (folder / "mine").touch()
    remove_snapshots_after(folder, 10)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "mine", "step-00000010-std-0.05.safetensors", "step-00000010-std-0.1.safetensors"
    }  # fmt: skip


def damage(path, kind):
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "shape":
        save_file({"a": torch.zeros(3), "b": torch.zeros(2, 3)}, path)
    elif kind == "names":
        save_file({"a": torch.zeros(2), "c": torch.zeros(2, 3)}, path)
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["cut", "empty", "shape", "names", "folder"])
def test_a_damaged_snapshot_is_left_out_with_its_name(folder, caplog, kind):
    damage(folder / "step-00000010-std-0.1.safetensors", kind)
    usable = usable_snapshots(folder, SHAPES)
    assert [(s.step, s.sigma_rel) for s in usable] == [(10, 0.05), (20, 0.05), (20, 0.1)]
    (record,) = caplog.records
    assert "step-00000010-std-0.1.safetensors is left out: " in record.getMessage()


def test_values_that_are_not_finite_are_refused_when_read(folder):
    path = folder / "step-00000020-std-0.05.safetensors"
    save_file({"a": torch.full((2,), float("inf")), "b": torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError, match=r"weight a of .*step-00000020-std-0.05.* is not finite"):
        weighted_sum(usable_snapshots(folder, SHAPES), [0.25] * 4)


def test_a_run_without_usable_snapshots_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no usable snapshots"):
        usable_snapshots(RunPaths(tmp_path).ema_snapshots, SHAPES)


def test_the_interval_of_snapshots_is_a_32nd_of_the_run_and_implies_them():
    config = resolved(TrainingConfig(post_hoc_ema=True, max_train_steps=5000))
    assert config.post_hoc_ema_steps == 157
    assert resolved(TrainingConfig(max_train_steps=5000)).post_hoc_ema_steps is None
    assert TrainingConfig(post_hoc_ema_steps=10).post_hoc_ema
    with pytest.raises(ConfigError, match="`post_hoc_ema_steps` must be at least 1, got 0"):
        TrainingConfig(post_hoc_ema_steps=0)
