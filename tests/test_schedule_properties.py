"""Properties of all schedules and trajectories."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ddpm_hf.diffusion.schedules import BETA_SCHEDULES
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
F64 = torch.float64
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def schedulers(draw, **fixed):
    """Any schedule, T, prediction type and trajectory; no "epsilon" with zero terminal SNR."""
    name = draw(st.sampled_from(sorted(BETA_SCHEDULES)))
    T = draw(st.integers(25, 300))
    prediction = "v_prediction" if name == "jsd" else draw(st.sampled_from(PREDICTIONS))
    start = draw(st.floats(1e-6, 1e-2))
    config = {
        "num_train_timesteps": T,
        "beta_schedule": name,
        "beta_start": start,
        "beta_end": draw(st.floats(start, 0.02)),
        "prediction_type": prediction,
        "clip_sample": False,
        **fixed,
    }
    scheduler = GaussianDDPMScheduler(**config)
    steps = draw(st.sets(st.integers(0, T - 1), min_size=1, max_size=20))
    scheduler.set_timesteps(timesteps=sorted(steps, reverse=True))
    return scheduler


def pixels(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@quick
@given(schedulers())
def test_alpha_bar_and_log_snr_strictly_fall(scheduler):
    t = torch.arange(len(scheduler))
    signal = scheduler.q_mean_variance(torch.ones(len(t), 1, dtype=F64), t).mean
    assert (signal.diff(dim=0) < 0).all()
    assert (scheduler.log_snr(t).diff() < 0).all()
    assert (scheduler.betas > 0).all()
    assert (scheduler.betas <= 1).all()


@quick
@given(schedulers())
def test_the_variances_of_signal_and_noise_sum_to_one(scheduler):
    t, ones = torch.arange(len(scheduler)), torch.ones(len(scheduler), 1, dtype=F64)
    q = scheduler.q_mean_variance(ones, t)
    assert_close(q.mean**2 + q.variance, ones, rtol=1e-14, atol=0)


@quick
@given(schedulers())
def test_one_step_kernels_along_any_trajectory_compose_to_the_marginal(scheduler):
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    mean, variance = one, zero
    for t in scheduler.timesteps.flip(0).tolist():
        mean = scheduler.diffuse_one_step(mean, t, zero)
        a = scheduler.diffuse_one_step(one, t, zero)
        variance = a**2 * variance + scheduler.diffuse_one_step(zero, t, one) ** 2
        jump = scheduler.q_mean_variance(one, t)
        assert_close(mean, jump.mean, rtol=1e-12, atol=0)  # up to 20 products
        assert_close(variance, jump.variance, rtol=1e-12, atol=0)


@quick
@given(schedulers())
def test_the_posterior_marginalises_to_the_previous_marginal(scheduler):
    """The mean of q(x_prev | x_t, x_0) over x_t given x_0 is q(x_prev | x_0)."""
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for t in scheduler.timesteps.tolist():
        prev = scheduler.previous_timestep(t)
        q_t = scheduler.q_mean_variance(one, t)
        posterior = scheduler.q_posterior_mean_variance(one, q_t.mean, t)
        coef_x_t = scheduler.q_posterior_mean_variance(zero, one, t).mean
        variance = coef_x_t**2 * q_t.variance + posterior.variance
        want = scheduler.q_mean_variance(one, prev) if prev >= 0 else None
        assert_close(posterior.mean, want.mean if want else one, rtol=1e-12, atol=0)
        # Both terms are at most as large as their sum.
        assert_close(variance, want.variance if want else zero, rtol=1e-12, atol=1e-30)


@quick
@given(schedulers(), st.floats(0, 1))
def test_prediction_from_the_true_target_recovers_x_0(scheduler, eta):
    t = torch.tensor(scheduler.timesteps.tolist())
    x_0, eps = pixels(len(t), 2, 3), pixels(len(t), 2, 3, seed=1)
    x_t = scheduler.add_noise(x_0, eps, t)
    kind = scheduler.config.prediction_type
    v = scheduler.get_velocity(x_0, eps, t)
    output = {"epsilon": eps, "sample": x_0, "v_prediction": v}[kind]
    got = scheduler.step(output, t, x_t, eta=eta).pred_original_sample
    # Division by sqrt(alpha_bar) amplifies the rounding errors of epsilon.
    growth = (1 + (-scheduler.log_snr(t) / 2).exp()).double().reshape(-1, 1, 1)
    slack = 1e-14 * (growth if kind == "epsilon" else torch.ones_like(growth)) * 10
    assert ((got - x_0).abs() <= slack).all()


@quick
@given(schedulers(), st.floats(0, 1))
def test_every_eta_keeps_the_previous_marginal(scheduler, eta):
    """2010.02502, lemma 1: given the true x_0, x_prev has the variance 1 - alpha_bar_prev."""
    kind = scheduler.config.prediction_type
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for t in scheduler.timesteps.tolist()[:-1]:
        x_t = scheduler.add_noise(zero, one, t)  # x_0 = 0 and eps = 1
        v = scheduler.get_velocity(zero, one, t)
        output = {"epsilon": one, "sample": zero, "v_prediction": v}[kind]
        a = scheduler.step(output, t, x_t, variance_noise=zero, eta=eta).prev_sample
        s = scheduler.step(zero, t, zero, variance_noise=one, eta=eta).prev_sample
        want = scheduler.q_mean_variance(one, scheduler.previous_timestep(t)).variance
        growth = 1 + (-scheduler.log_snr(t) / 2).exp().item()
        assert_close(a**2 + s**2, want, rtol=1e-13 * growth + 1e-12, atol=0)


@quick
@given(schedulers(), st.integers(1, 4), st.sampled_from([(), (3,), (2, 5), (1, 4, 4)]))
def test_a_batch_gives_the_same_bits_as_single_images(scheduler, batch, trailing):
    steps = scheduler.timesteps.tolist()
    t = torch.tensor([steps[i % len(steps)] for i in range(batch)])
    x, output, noise = (pixels(batch, *trailing, seed=s).float() for s in range(3))
    together = scheduler.step(output, t, x, variance_noise=noise).prev_sample
    noisy = scheduler.add_noise(x, noise, t)
    for i in range(batch):
        one = slice(i, i + 1)
        alone = scheduler.step(output[one], int(t[i]), x[one], variance_noise=noise[one])
        assert torch.equal(together[one], alone.prev_sample)
        assert torch.equal(noisy[one], scheduler.add_noise(x[one], noise[one], int(t[i])))


@quick
@given(schedulers())
def test_from_config_reproduces_the_scheduler(scheduler):
    again = GaussianDDPMScheduler.from_config(dict(scheduler.config))
    t = torch.arange(len(scheduler))
    ones = torch.ones(len(t), 1, dtype=F64)
    assert torch.equal(scheduler.q_mean_variance(ones, t).mean, again.q_mean_variance(ones, t).mean)


@quick
@given(st.data())
def test_any_valid_betas_are_kept_to_the_last_bit(data):
    T = data.draw(st.integers(1, 40))
    betas = data.draw(st.lists(st.floats(1e-8, 0.9999), min_size=T, max_size=T))
    for sequence in (betas, np.array(betas), torch.tensor(betas, dtype=F64)):
        scheduler = GaussianDDPMScheduler(T, trained_betas=sequence)
        assert scheduler.config.trained_betas == betas
        assert_close(scheduler.betas.double(), torch.tensor(betas, dtype=F64), rtol=6e-8, atol=0)
