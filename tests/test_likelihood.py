"""The variational bound: its terms, its decoder and bits/dim, against other routes to each."""

import pytest
import torch
from oracles import randn
from torch.testing import assert_close

from ddpm_hf import GaussianDDPMScheduler

VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned", "learned_range"]


def kl_of_normals(mean_q, log_var_q, mean_p, log_var_p):
    """The textbook formula, from means and log-variances."""
    ratio, distance = (log_var_q - log_var_p).exp(), (mean_q - mean_p).square()
    return (log_var_p - log_var_q - 1 + ratio + distance / log_var_p.exp()) / 2


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("num_inference_steps", [1000, 10])
def test_step_kl_is_the_kl_of_posterior_and_reverse_process(
    num_inference_steps, prediction_type, variance_type
):
    scheduler = GaussianDDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(num_inference_steps)
    x_0, x_t = randn(5, 2, 3, seed=1).clamp(-1, 1), randn(5, 2, 3, seed=2)
    learned = variance_type.startswith("learned")
    output = randn(5, 4 if learned else 2, 3, seed=3)
    steps = scheduler.timesteps
    t = steps[[0, 1, len(steps) // 2, -2, -1]]
    q = scheduler.q_posterior_mean_variance(x_0, x_t, t)
    p = scheduler.p_mean_variance(output, t, x_t)
    want = kl_of_normals(q.mean, q.log_variance, p.mean, p.log_variance)

    got = scheduler.step_kl(output, x_0, x_t, t)

    # Differences of means lose up to 9 of 16 digits at large t; the last step has a decoder.
    assert_close(got.kl[:-1], want.expand_as(x_0)[:-1], rtol=1e-6, atol=1e-9)
    assert_close(got.log_variance, p.log_variance, rtol=1e-12, atol=0)
    assert torch.equal(got.pred_original_sample, p.pred_original_sample)
    assert got.is_last.flatten().tolist() == [0, 0, 0, 0, 1]


def test_without_the_clip_step_kl_has_the_estimate_as_the_network_gave_it():
    scheduler = GaussianDDPMScheduler(prediction_type="sample", clip_sample_range=1.5)
    x_0, x_t, output = torch.zeros(1, 1, 2), randn(1, 1, 2), torch.tensor([[[3.0, -2.0]]])
    clipped = scheduler.step_kl(output.double(), x_0.double(), x_t, 500)
    plain = scheduler.step_kl(output.double(), x_0.double(), x_t, 500, clip=False)
    assert clipped.pred_original_sample.abs().max() == 1.5
    assert plain.pred_original_sample.tolist() == output.tolist()


def normal_posterior_of_ddim(scheduler, x_0, x_t, t, eta):
    """2010.02502, eq. 7 with the sigma of eq. 16, as the paper writes them."""
    steps = scheduler.timesteps.tolist()
    alphas_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    a_t, a_prev = alphas_bar[t], alphas_bar[steps[steps.index(t) + 1]]
    sigma = eta * ((1 - a_prev) / (1 - a_t)).sqrt() * (1 - a_t / a_prev).sqrt()
    direction = (x_t - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
    return a_prev.sqrt() * x_0 + (1 - a_prev - sigma**2).sqrt() * direction, 2 * sigma.log()


def test_at_smaller_eta_step_kl_compares_the_processes_of_ddim():
    scheduler = GaussianDDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(20)
    x_0, x_t, x_0_hat = (randn(2, 3, seed=seed) for seed in range(3))
    t, eta = scheduler.timesteps[7].item(), 0.3
    mean_q, log_var = normal_posterior_of_ddim(scheduler, x_0, x_t, t, eta)
    mean_p, _ = normal_posterior_of_ddim(scheduler, x_0_hat, x_t, t, eta)
    want = kl_of_normals(mean_q, log_var, mean_p, log_var)
    assert_close(scheduler.step_kl(x_0_hat, x_0, x_t, t, eta=eta).kl, want, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"eta must be .*0 has no bound, got 0"):
        scheduler.step_kl(x_0_hat, x_0, x_t, t, eta=0)
