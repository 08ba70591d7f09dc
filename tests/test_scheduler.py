"""The scheduler against independent references: 40-digit tables, conditioning, exact networks."""

import copy
import itertools
import pickle
import warnings
from functools import cache
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from mpmath import mpf
from oracles import (
    STD_OF_SAMPLES,
    alpha_bars,
    chen_sigmoid_betas,
    cosine_betas,
    exact_output,
    geodiff_sigmoid_betas,
    iddpm_sections,
    linear_betas,
    posterior_by_conditioning,
    randn,
    relative_error,
    scaled_linear_betas,
    target,
    to_float64,
)
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.diffusion.timestep_spacings import section_timesteps

# Rounding of the ten or so float64 operations behind each coefficient.
EXACT = {"rtol": 1e-13, "atol": 0}
F64 = torch.float64
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = [
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]  # fmt: skip

REFERENCES = {
    "linear 1000": ("linear", linear_betas, (1000,)),
    "linear 4000": ("linear", linear_betas, (4000,)),
    "iddpm_linear 4000": ("iddpm_linear", linear_betas, (4000, 2.5e-5, 0.005)),
    "cosine 1000": ("squaredcos_cap_v2", cosine_betas, (1000,)),
    "cosine 4000": ("squaredcos_cap_v2", cosine_betas, (4000,)),
}
# The quick tests include a single long schedule.
SLOW = {"linear 4000", "cosine 4000"}
reference = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in REFERENCES],
)


@cache
def betas_and_bars(case: str) -> tuple[list[mpf], list[mpf]]:
    _, source, arguments = REFERENCES[case]
    betas = source(*arguments)
    return betas, alpha_bars(betas)


def scheduler_and_reference(case: str) -> tuple[GaussianDDPMScheduler, list[mpf], list[mpf]]:
    schedule, _, (T, *_) = REFERENCES[case]
    return GaussianDDPMScheduler(T, beta_schedule=schedule), *betas_and_bars(case)


def column(values: torch.Tensor) -> np.ndarray:
    return values.reshape(-1).numpy()


@reference
def test_tables_match_forty_digit_references(case):
    scheduler, betas, bars = scheduler_and_reference(case)
    T, half_ulp = len(betas), 6e-8  # float32 rounds by at most 2^-24
    assert relative_error(scheduler.betas.numpy(), betas) < half_ulp
    assert relative_error(scheduler.alphas_cumprod.numpy(), bars) < half_ulp
    t, ones, zeros = torch.arange(T), torch.ones(T, 1, dtype=F64), torch.zeros(T, 1, dtype=F64)
    marginal = scheduler.q_mean_variance(ones, t)
    want_sigma = [1 - bar for bar in bars]
    # 1e-13, because the mean is the square root of a sum of 4000 logarithms.
    assert relative_error(column(marginal.mean), [mpmath.sqrt(bar) for bar in bars]) < 1e-13
    assert relative_error(column(marginal.variance), want_sigma) < 1e-13
    beta = scheduler.diffuse_one_step(zeros, t, ones) ** 2
    assert relative_error(column(beta), betas) < 1e-13
    snr = [bar / (1 - bar) for bar in bars]
    assert relative_error(column(scheduler.snr(t)), snr) < 1e-7
    assert (
        relative_error(column(scheduler.add_noise(zeros.float(), ones.float(), t) ** 2), want_sigma)
        < 3 * half_ulp
    )  # squared here, in float32


@reference
def test_posterior_matches_forty_digit_conditioning(case):
    scheduler, betas, bars = scheduler_and_reference(case)
    bars, T = [mpf(1), *bars], len(betas)
    want = [posterior_by_conditioning(bars[i + 1], bars[i]) for i in range(T)]
    t, ones, zeros = torch.arange(T), torch.ones(T, 1, dtype=F64), torch.zeros(T, 1, dtype=F64)
    of_x_0 = scheduler.q_posterior_mean_variance(ones, zeros, t)
    of_x_t = scheduler.q_posterior_mean_variance(zeros, ones, t).mean
    assert relative_error(column(of_x_0.mean), [p.coef_x_0 for p in want]) < 1e-13
    assert relative_error(column(of_x_t)[1:], [p.coef_x_t for p in want[1:]]) < 1e-13
    assert relative_error(column(of_x_0.variance)[1:], [p.variance for p in want[1:]]) < 1e-13
    assert of_x_0.variance[0] == 0
    assert of_x_t[0] == 0
    log_var = column(of_x_0.log_variance)
    assert log_var[0] == log_var[1] == pytest.approx(float(mpmath.log(want[1].variance)), rel=1e-12)


@pytest.mark.parametrize("steps", [[999, 500, 3], [700, 699, 1, 0], [123]])
def test_posterior_of_a_strided_trajectory_matches_conditioning(steps):
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(timesteps=steps)
    bars = betas_and_bars("linear 1000")[1]
    x_0, x_t = randn(3, 2), randn(3, 2, seed=1)
    for t, prev in zip(steps, [*steps[1:], -1], strict=True):
        want = posterior_by_conditioning(bars[t], bars[prev] if prev >= 0 else mpf(1))
        got = scheduler.q_posterior_mean_variance(x_0, x_t, t)
        mean = float(want.coef_x_0) * x_0 + float(want.coef_x_t) * x_t
        assert_close(got.mean, mean, rtol=1e-12, atol=1e-15)  # the sum may cancel
        assert_close(got.variance.item(), float(want.variance), rtol=1e-12, atol=1e-39)
        assert scheduler.previous_timestep(t) == prev


@pytest.mark.parametrize("steps", [None, [999, 700, 20, 0], [1]])
def test_one_step_kernels_compose_to_the_marginal(steps):
    scheduler = GaussianDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if steps:
        scheduler.set_timesteps(timesteps=steps)
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    mean, variance = one, zero
    for t in scheduler.timesteps.flip(0).tolist():
        mean = scheduler.diffuse_one_step(mean, t, zero)
        shrink = scheduler.diffuse_one_step(one, t, zero)
        variance = shrink**2 * variance + scheduler.diffuse_one_step(zero, t, one) ** 2
        jump = scheduler.q_mean_variance(one, t)
        # At most a thousand roundings, without amplification.
        assert_close(mean, jump.mean, rtol=1e-12, atol=0)
        assert_close(variance, jump.variance, rtol=1e-12, atol=0)


# alpha_bar at the last step for the constants of the papers, computed outside of this project.
CONSTANTS = {
    ("linear", 1000): 4.03583e-05,
    ("squaredcos_cap_v2", 1000): 2.42877e-09,
    ("squaredcos_cap_v2", 4000): 1.51798e-10,
    ("iddpm_linear", 4000): 4.24665e-05,
    ("quad", 1000): 7.334e-4,
    ("const", 1000): 1.683e-09,
    ("warmup10", 1000): 4.614e-09,
    ("jsd", 1000): 0.0,
}


@pytest.mark.parametrize(("name", "T"), CONSTANTS)
def test_schedules_end_at_the_alpha_bar_of_their_sources(name, T):
    scheduler = GaussianDDPMScheduler(T, beta_schedule=name, prediction_type="v_prediction")
    # The constants are given to four digits or more.
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(CONSTANTS[name, T], rel=2e-4)


def test_stable_diffusion_schedule_ends_at_its_alpha_bar():
    scheduler = GaussianDDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.6601e-03, rel=1e-5)


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    ("name", "params", "source"),
    [
        ("scaled_linear", {}, scaled_linear_betas),
        ("quad", {}, scaled_linear_betas),
        ("sigmoid", {}, geodiff_sigmoid_betas),
        ("cosine", {"offset": 0.03, "cap": 0.99}, cosine_betas),
        ("chen_sigmoid", {}, chen_sigmoid_betas),
        ("chen_sigmoid", {"start": -1.0, "end": 2.0, "tau": 0.4}, chen_sigmoid_betas),
        ("chen_sigmoid", {"start": 0.0, "end": 3.0, "tau": 0.9}, chen_sigmoid_betas),
    ],
)
@pytest.mark.filterwarnings("ignore:.*signal amplitude at the last")
def test_schedules_match_their_sources_in_forty_digits(name, params, source, T):
    scheduler = GaussianDDPMScheduler(
        T, beta_schedule=name, **({"beta_schedule_params": params} if params else {})
    )
    zeros, ones = torch.zeros(T, 1, dtype=F64), torch.ones(T, 1, dtype=F64)
    beta = scheduler.diffuse_one_step(zeros, torch.arange(T), ones) ** 2
    assert relative_error(column(beta), source(T, **params)) < 1e-12  # cosh of differences


@pytest.mark.parametrize(("name", "share"), [("warmup10", 10), ("warmup50", 2)])
def test_warmup_is_linear_and_then_constant(name, share):
    betas = GaussianDDPMScheduler(200, 1e-3, 0.05, beta_schedule=name).betas.double()
    num_warmup = 200 // share
    assert_close(
        betas[:num_warmup], torch.linspace(1e-3, 0.05, num_warmup, dtype=F64), rtol=1e-6, atol=0
    )
    assert (betas[num_warmup:] == betas[-1]).all()
    assert betas[-1].item() == pytest.approx(0.05, rel=1e-7)


def test_alpha_bar_of_jsd_falls_linearly_to_zero():
    scheduler = GaussianDDPMScheduler(50, beta_schedule="jsd", prediction_type="sample")
    assert_close(scheduler.alphas_cumprod, 1 - torch.arange(1, 51) / 50, rtol=1e-5, atol=1e-8)
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 0.7)])
def test_laplace_log_snr_has_laplace_quantiles(mu, b):
    scheduler = GaussianDDPMScheduler(
        beta_schedule="laplace_log_snr",
        beta_schedule_params={"mu": mu, "b": b},
        prediction_type="v_prediction",
    )
    log_snr = scheduler.log_snr(torch.arange(1000)).double()
    share_above = torch.arange(1, 1001, dtype=F64) / 1000
    quantile = torch.distributions.Laplace(torch.tensor(mu, dtype=F64), b).icdf(1 - share_above)
    # The source adds 1e-6 to a probability of at least 2e-3; the last value, where it matters, is
    # excluded.
    assert_close(log_snr[:-1], quantile[:-1], rtol=0, atol=1e-3 * b)
    assert log_snr[499].item() == pytest.approx(mu, abs=1e-5)


def test_zero_terminal_snr_keeps_the_first_beta_and_ends_at_zero():
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = GaussianDDPMScheduler(rescale_betas_zero_snr=True, **config)
    roots = [mpmath.sqrt(bar) for bar in betas_and_bars("linear 1000")[1]]
    scale = roots[0] / (roots[0] - roots[-1])
    want = [(root - roots[-1]) * scale for root in roots]
    got = column(scheduler.q_mean_variance(torch.ones(1000, 1, dtype=F64), torch.arange(1000)).mean)
    assert relative_error(got[:-1], want[:-1]) < 1e-11  # the reference cancels near the end
    assert got[-1] == 0
    assert scheduler.betas[-1] == 1
    assert scheduler.betas[0].item() == pytest.approx(1e-4, rel=1e-7)
    assert scheduler.log_snr(999) == -torch.inf


def test_zero_terminal_snr_of_a_chain_whose_alpha_bar_underflows():
    """alpha_bar of the original chain ends at 1e-1000."""
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = GaussianDDPMScheduler(
        trained_betas=[0.9] * 1000, rescale_betas_zero_snr=True, **config
    )
    roots = [mpmath.sqrt(bar) for bar in alpha_bars([mpf(0.9)] * 1000)]
    shifted = [root - roots[-1] for root in roots]
    want = [1 - (root / prev) ** 2 for prev, root in itertools.pairwise(shifted)]
    # Rounding of log1p, expm1 and of beta: a few units in the last place.
    assert relative_error(scheduler.trajectory_betas().numpy()[1:], want) < 1e-14


def chain(scheduler, network, x, **step_options):
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, **step_options).prev_sample
    return x


SPACINGS = ["leading", "linspace", "trailing", "quadratic", "10", "5,3,2", "ddim10"]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
def test_a_network_that_predicts_x_0_exactly_samples_the_data(spacing, prediction, eta):
    scheduler = GaussianDDPMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(timestep_spacing=spacing) if spacing[0] in "d15" else None
    if spacing[0] not in "d15":
        scheduler.set_timesteps(10, timestep_spacing=spacing)
    bars, x_0 = to_float64(betas_and_bars("linear 1000")[1]), randn(2, 3, 4)

    def network(x_t, t):
        eps = (x_t - bars[t] ** 0.5 * x_0) / (1 - bars[t]) ** 0.5
        return target(prediction, x_0, eps, bars[t])

    generator = torch.Generator().manual_seed(0)
    got = chain(scheduler, network, randn(2, 3, 4, seed=1), eta=eta, generator=generator)
    assert_close(got, x_0, rtol=0, atol=1e-12)  # eps of 1e-16 times 1/sqrt(alpha_bar) = 160


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_trajectory_from_zero_terminal_snr_samples_the_data(prediction):
    scheduler = GaussianDDPMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    x_0 = randn(2, 3, 4).clamp(-1, 1)

    def network(x_t, t):
        signal = scheduler.q_mean_variance(torch.ones(1, dtype=F64), t).mean.item()
        eps = (x_t - signal * x_0) / (1 - signal**2) ** 0.5
        return target(prediction, x_0, eps, signal**2)

    assert_close(chain(scheduler, network, randn(2, 3, 4, seed=1)), x_0, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("K", STD_OF_SAMPLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_of_normal_data_have_the_known_standard_deviation(K, prediction):
    """x_prev = a x_t + s z, with a and s measured from `step`; the variance is propagated."""
    bars = to_float64(betas_and_bars("linear 1000")[1])
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    got = []
    for variance_type, eta in (("fixed_small", 1.0), ("fixed_large", 1.0), ("fixed_small", 0.0)):
        scheduler = GaussianDDPMScheduler(
            variance_type=variance_type, prediction_type=prediction, clip_sample=False
        )
        # The reference rounds ties up; Python and our spacings round ties to even.
        scheduler.set_timesteps(timesteps=np.floor(np.linspace(999, 0, K) + 0.5).astype(int))
        variance = 1.0
        for t in scheduler.timesteps.tolist():
            output = exact_output(prediction, one, bars[t], 0.25)
            a = scheduler.step(output, t, one, variance_noise=zero, eta=eta).prev_sample
            s = scheduler.step(zero, t, zero, variance_noise=one, eta=eta).prev_sample
            variance = a.item() ** 2 * variance + s.item() ** 2
        got.append(variance**0.5)
    assert got == pytest.approx(STD_OF_SAMPLES[K], abs=6e-5)  # the table has four digits


@pytest.mark.parametrize(
    ("eta", "variance_type"),
    [(1.0, "fixed_small"), *itertools.product([0.0, 0.3, 0.9], VARIANCE_TYPES)],
)
def test_a_step_with_any_eta_matches_ddim(eta, variance_type):
    """2010.02502, eq. 12 with the sigma of eq. 16, below 1 for every variance type."""
    scheduler = GaussianDDPMScheduler(variance_type=variance_type, clip_sample=False)
    scheduler.set_timesteps(20)
    bars = to_float64(betas_and_bars("linear 1000")[1])
    x_t, eps, noise, v = (randn(2, 3, seed=seed) for seed in range(4))
    t, prev = scheduler.timesteps[7].item(), scheduler.timesteps[8].item()
    sigma = eta * (((1 - bars[prev]) / (1 - bars[t])) * (1 - bars[t] / bars[prev])) ** 0.5
    x_0 = (x_t - (1 - bars[t]) ** 0.5 * eps) / bars[t] ** 0.5
    want = bars[prev] ** 0.5 * x_0 + (1 - bars[prev] - sigma**2) ** 0.5 * eps + sigma * noise
    output = torch.cat([eps, v], 1) if variance_type.startswith("learned") else eps
    got = scheduler.step(output, t, x_t, variance_noise=noise, eta=eta).prev_sample
    assert_close(got, want, rtol=0, atol=1e-12)  # differences of numbers near 1


def test_float32_samples_have_the_known_standard_deviation():
    scheduler = GaussianDDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timestep_spacing="50")
    bars = to_float64(betas_and_bars("linear 1000")[1])
    x = chain(
        scheduler,
        lambda x, t: exact_output("epsilon", x, bars[t], 0.25),
        randn(200, 1, 16, 16, dtype=torch.float32),
        generator=torch.Generator().manual_seed(1),
    )
    num = x.numel()
    # Four standard errors; the standard error of a standard deviation is std / sqrt(2 n).
    assert x.std().item() == pytest.approx(0.4432, abs=4 * 0.4432 / (2 * num) ** 0.5 + 6e-5)


CHAINS = [
    ("linear 1000", torch.float32, 5e-6),
    ("cosine 1000", torch.float32, 5e-6),
    ("linear 1000", torch.bfloat16, 1e-3),
    ("linear 1000", torch.float16, 1e-3),
    pytest.param("cosine 1000", torch.bfloat16, 1e-3, marks=pytest.mark.slow),
    pytest.param("iddpm_linear 4000", torch.float32, 5e-6, marks=pytest.mark.slow),
    pytest.param("cosine 4000", torch.float32, 5e-6, marks=pytest.mark.slow),
    pytest.param("cosine 4000", torch.bfloat16, 1e-3, marks=pytest.mark.slow),
    pytest.param("cosine 4000", torch.float16, 1e-3, marks=pytest.mark.slow),
    pytest.param("iddpm_linear 4000", torch.bfloat16, 1e-3, marks=pytest.mark.slow),
]


def error_of_whole_chain(case: str, model_dtype: torch.dtype) -> float:
    """Largest difference of the samples from those in float64, with the same noise and K = T."""
    scheduler, _, bars = scheduler_and_reference(case)
    bars = to_float64(bars)

    def network(x, t):
        return exact_output("epsilon", x, bars[t], 0.25)

    exact = randn(1, 1, 8, 8)
    rounded = exact.float()
    for i, t in enumerate(scheduler.timesteps.tolist()):
        noise = randn(1, 1, 8, 8, seed=i + 1)
        exact = scheduler.step(network(exact, t), t, exact, variance_noise=noise).prev_sample
        output = network(rounded, t).to(model_dtype)
        rounded = scheduler.step(output, t, rounded, variance_noise=noise.float()).prev_sample
    return (exact - rounded).abs().max().item()


@pytest.mark.parametrize(("case", "model_dtype", "bound"), CHAINS)
def test_samples_in_low_precision_stay_close_to_float64(case, model_dtype, bound):
    assert error_of_whole_chain(case, model_dtype) <= bound


def inversion_psnr(prediction: str, K: int) -> float:
    """PSNR in dB of an image (range 2) after inversion and sampling with an exact network."""
    bars = to_float64(betas_and_bars("linear 1000")[1])
    image = randn(1, 1, 16, 16).clamp(-1, 1) / 2
    scheduler = GaussianDDPMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(K, timestep_spacing="linspace")

    def network(x, t):
        return exact_output(prediction, x, bars[t], 0.25)

    x = image
    for t in scheduler.timesteps.flip(0)[:-1].tolist():
        x = scheduler.inverse_step(network(x, t), t, x)
    assert 0.5 < x.std() < 1.5  # noise has 1, the data 0.5
    x = chain(scheduler, network, x, eta=0.0)
    return 10 * torch.log10(4 / (x - image).square().mean()).item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampling_without_noise_reconstructs_an_inverted_image(prediction):
    few, many = inversion_psnr(prediction, 50), inversion_psnr(prediction, 1000)
    assert few > 30
    # First-order ODE solver: a step 20 times smaller has an error 20 times smaller, 26 dB.
    assert many > few + 15


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("K", [None, 7])
def test_step_is_mean_plus_noise(prediction, variance_type, K):
    scheduler = GaussianDDPMScheduler(prediction_type=prediction, variance_type=variance_type)
    if K:
        scheduler.set_timesteps(K)
    channels = 4 if variance_type.startswith("learned") else 2
    x, noise = randn(3, 2, 5), randn(3, 2, 5, seed=2)
    output = randn(3, channels, 5, seed=1)
    for t in scheduler.timesteps[:: max(1, (K or 1000) // 7)].tolist():
        p = scheduler.p_mean_variance(output, t, x)
        step = scheduler.step(output, t, x, variance_noise=noise)
        is_last = t == scheduler.timesteps[-1]
        want = p.mean if is_last else p.mean + p.variance.sqrt() * noise
        assert_close(step.prev_sample, want, rtol=1e-12, atol=1e-14)
        assert_close(step.pred_original_sample, p.pred_original_sample, **EXACT)
        if not is_last:
            assert_close(p.log_variance, p.variance.log(), rtol=1e-12, atol=1e-12)


def test_variance_types_match_their_papers():
    def variance(variance_type, output, t):
        scheduler = GaussianDDPMScheduler(variance_type=variance_type)
        return scheduler.p_mean_variance(output, t, torch.zeros(1, 1, 3, dtype=F64)).variance

    one_channel = torch.zeros(1, 1, 3, dtype=F64)
    bars, beta = betas_and_bars("linear 1000")[1], float(linear_betas(1000)[500])
    small = float(posterior_by_conditioning(bars[500], bars[499]).variance)
    assert variance("fixed_small", one_channel, 500).item() == pytest.approx(small, rel=1e-12)
    assert variance("fixed_large", one_channel, 500).item() == pytest.approx(beta, rel=1e-12)
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=F64).reshape(1, 1, 3)
    output = torch.cat([one_channel, v], dim=1)
    want = torch.tensor([small, (small * beta) ** 0.5, beta], dtype=F64).reshape(1, 1, 3)
    assert_close(variance("learned_range", output, 500), want, rtol=1e-12, atol=0)  # log-space mean
    assert_close(variance("learned", output, 500), v.exp(), **EXACT)


@pytest.mark.parametrize("K", [1, 2])
def test_the_log_variance_of_the_last_step_is_clipped(K):
    x = torch.zeros(1, 1, dtype=F64)

    def last(variance_type):
        scheduler = GaussianDDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(timesteps=[600, 200][-K:])
        return scheduler.p_mean_variance(x, 200, x)

    bars = betas_and_bars("linear 1000")[1]
    neighbour = (
        posterior_by_conditioning(bars[600], bars[200]).variance if K == 2 else 1 - bars[200]
    )
    small, large = last("fixed_small"), last("fixed_large")
    assert small.variance == 0
    assert large.variance.item() == pytest.approx(float(neighbour), rel=1e-12)
    for p in (small, large):
        assert p.log_variance.item() == pytest.approx(float(mpmath.log(neighbour)), rel=1e-12)


def test_a_trajectory_of_one_step_returns_the_estimate_of_x_0():
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(1, timestep_spacing="trailing")
    x, output = randn(2, 3), randn(2, 3, seed=1)
    step = scheduler.step(output, 999, x)
    assert_close(step.prev_sample, step.pred_original_sample, **EXACT)
    with pytest.raises(ValueError, match=r"`timestep` must be in scheduler\.timesteps\[1:\], got"):
        scheduler.inverse_step(output, 999, x)


@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
        {"steps_offset": 1},
        {"timestep_spacing": "trailing", "variance_type": "learned_range"},
    ],
)
def test_the_last_step_adds_no_noise_at_any_timestep(config):
    scheduler = GaussianDDPMScheduler(**config)
    scheduler.set_timesteps(10)
    last = scheduler.timesteps[-1]
    assert last > 0  # stock diffusers adds noise at every t > 0
    x = torch.zeros(2, 1, 8, 8)
    channels = 2 if config.get("variance_type") == "learned_range" else 1
    for t in (int(last), last, last.expand(2)):
        assert (scheduler.step(torch.zeros(2, channels, 8, 8), t, x).prev_sample == 0).all()


def test_thresholding_uses_the_quantile_of_each_image():
    scheduler = GaussianDDPMScheduler(
        prediction_type="sample",
        thresholding=True,
        sample_max_value=3.0,
        dynamic_thresholding_ratio=0.9,
    )
    output = torch.linspace(-1, 1, 11, dtype=F64).repeat(3, 1) * torch.tensor([[0.5], [2.0], [9.0]])
    x_0 = scheduler.step(output, 0, torch.zeros(3, 11, dtype=F64)).pred_original_sample
    assert_close(x_0[0], output[0], **EXACT)  # the quantile is below 1
    s = torch.quantile(output[1].abs(), 0.9)
    assert_close(x_0[1], output[1].clamp(-s, s) / s, **EXACT)
    assert_close(x_0[2], output[2].clamp(-3, 3) / 3, **EXACT)  # sample_max_value bounds s


@pytest.mark.parametrize(("clip", "limit"), [(True, 0.5), (False, None)])
def test_clip_sample_clamps_the_estimate_of_x_0(clip, limit):
    scheduler = GaussianDDPMScheduler(
        prediction_type="sample", clip_sample=clip, clip_sample_range=limit or 1.0
    )
    output = randn(4, 5) * 3
    got = scheduler.step(output, 3, randn(4, 5)).pred_original_sample
    assert_close(got, output.clamp(-limit, limit) if clip else output, **EXACT)
    assert output.abs().max() > 3  # the caller's tensor is unchanged


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "quadratic"])
@pytest.mark.parametrize(("T", "offset"), [(1, 0), (2, 1), (7, 3), (50, 1), (60, 0)])
@pytest.mark.filterwarnings("ignore")
def test_every_number_of_steps_gives_that_many_distinct_timesteps(spacing, T, offset):
    scheduler = GaussianDDPMScheduler(T, beta_schedule="squaredcos_cap_v2", steps_offset=offset)
    for K in range(1, T + 1):
        scheduler.set_timesteps(K, timestep_spacing=spacing)
        steps = scheduler.timesteps.tolist()
        assert len(steps) == scheduler.num_inference_steps == K
        assert steps == sorted(set(steps), reverse=True)
        assert steps[-1] >= 0
        assert steps[0] < T


def test_trailing_has_no_extra_timestep():
    scheduler = GaussianDDPMScheduler(timestep_spacing="trailing")
    for K in (61, 103, 121, 122, 201, 206):
        scheduler.set_timesteps(K)
        assert len(scheduler.timesteps) == K
        assert scheduler.timesteps[0] == 999
        assert scheduler.timesteps[-1] >= 0


@pytest.mark.parametrize("sections", ["10,10,20", "50", "1", "7,1,30,2", "1000", "334,333,333"])
@pytest.mark.filterwarnings("ignore:`timestep_spacing` '1'")
def test_sections_match_improved_ddpm(sections):
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(timestep_spacing=sections)
    assert scheduler.timesteps.tolist() == iddpm_sections(1000, sections)[::-1]


@pytest.mark.parametrize("T", [100, 1000])
def test_sections_of_any_length_round_as_in_improved_ddpm(T):
    for K in range(1, T + 1):
        assert section_timesteps(str(K), T).tolist() == iddpm_sections(T, str(K)), K


def test_sections_that_start_with_signal_cause_a_warning():
    with pytest.warns(UserWarning, match="starts at t=500"):
        GaussianDDPMScheduler().set_timesteps(timestep_spacing="ddim2")


def test_assigned_timesteps_become_the_trajectory():
    scheduler, stock = GaussianDDPMScheduler(), DDPMScheduler()
    x, output = randn(2, 3, dtype=torch.float32), randn(2, 3, seed=1, dtype=torch.float32)
    for s in (scheduler, stock):
        s.set_timesteps(10)
    scheduler.timesteps = torch.tensor([900, 500, 100])
    stock.set_timesteps(timesteps=[900, 500, 100])
    assert [scheduler.previous_timestep(t) for t in (900, 500, 100)] == [500, 100, -1]
    assert (scheduler.num_inference_steps, scheduler.custom_timesteps) == (3, True)
    for t in (900, 500):
        a, b = (s.step(output, t, x, torch.Generator().manual_seed(0)) for s in (scheduler, stock))
        assert_close(
            a.prev_sample, b.prev_sample, rtol=1e-3, atol=1e-4
        )  # float32 tables of stock diffusers
    with pytest.raises(ValueError, match="strictly descending"):
        scheduler.timesteps = torch.tensor([1, 2])


def test_ddim_sections_have_a_constant_stride():
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(50, timestep_spacing="ddim50")
    assert scheduler.timesteps.tolist() == list(range(980, -1, -20))


def test_quadratic_timesteps_are_denser_near_zero_and_start_at_the_last():
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(20, timestep_spacing="quadratic")
    steps = scheduler.timesteps
    assert (steps[0], steps[-1]) == (999, 0)
    gaps = steps[:-1] - steps[1:]
    assert (gaps[:-1] >= gaps[1:]).all()


def test_an_offset_never_exceeds_the_last_timestep():
    scheduler = GaussianDDPMScheduler(steps_offset=1)
    scheduler.set_timesteps(1000)  # stock: t = 1000, IndexError (huggingface/diffusers#10003)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(901, 0, -100))


@pytest.mark.parametrize(
    "sequence", [[5, 3, 1], (5, 3, 1), np.array([5, 3, 1]), torch.tensor([5, 3, 1])]
)
def test_custom_timesteps_can_be_any_sequence(sequence):
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(timesteps=sequence)
    assert scheduler.timesteps.tolist() == [5, 3, 1]
    assert scheduler.timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_train_timesteps": 100}, "signal amplitude at the last of 100 timesteps is 60%"),
        ({"beta_schedule": "laplace"}, "'laplace_log_snr'"),
        ({"thresholding": True}, "plain clipping"),
        ({"beta_start": 0.03}, "`beta_start` should be at most `beta_end`, 0.02, got 0.03"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
            "`timestep_spacing` should be 'trailing' .* got 'leading'",
        ),
    ],
)
def test_poor_settings_cause_a_warning_at_the_users_line(config, match):
    with pytest.warns(UserWarning, match=match) as caught:
        GaussianDDPMScheduler(**config)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("K", [1, 2, 334, 501, 600])
def test_leading_timesteps_that_start_with_signal_cause_a_warning(K):
    scheduler = GaussianDDPMScheduler()
    with pytest.warns(UserWarning, match="signal amplitude of .* use 'trailing'") as caught:
        scheduler.set_timesteps(K, timestep_spacing="leading")
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(K)  # "leading" of the configuration, which is the default


@pytest.mark.filterwarnings("error")
def test_common_settings_of_diffusers_cause_no_warning():
    for config in (
        {},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    ):
        scheduler = GaussianDDPMScheduler(**config)
        for K in (10, 20, 50, 100, 250, 500, 1000):
            scheduler.set_timesteps(K)
    scheduler = GaussianDDPMScheduler(100, beta_schedule="iddpm_linear")
    scheduler.set_timesteps(1, timestep_spacing="trailing")


class Operations(TorchDispatchMode):
    """Records the names of dispatched torch operations."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def prepared(variance_type="fixed_small", device="cpu", **config):
    scheduler = GaussianDDPMScheduler(variance_type=variance_type, **config)
    scheduler.set_timesteps(50, device=device)
    channels = 6 if variance_type.startswith("learned") else 3
    x = randn(2, 3, 8, 8, dtype=torch.float32).to(device)
    output = randn(2, channels, 8, 8, seed=1, dtype=torch.float32).to(device)
    return scheduler, output, x


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_int_and_tensor_timesteps_give_equal_bits(variance_type, prediction, eta):
    scheduler, output, x = prepared(variance_type, prediction_type=prediction)
    for t in scheduler.timesteps[::16]:
        step = [
            scheduler.step(output, form, x, torch.Generator().manual_seed(3), eta=eta)
            for form in (int(t), t, t.reshape(1), t.repeat(2), t.int().repeat(2))
        ]
        for other in step[1:]:
            assert torch.equal(step[0].prev_sample, other.prev_sample)
            assert torch.equal(step[0].pred_original_sample, other.pred_original_sample)


def test_int_and_tensor_timesteps_give_equal_bits_for_tiny_samples():
    """Below 16 values torch draws normal numbers by another routine, in float64."""
    scheduler, x = GaussianDDPMScheduler(), randn(2, 3, dtype=torch.float32)
    for t in range(1, 1000, 111):
        forms = (t, torch.tensor(t), torch.tensor([t, t]))
        steps = [scheduler.step(x, form, x, torch.Generator().manual_seed(t)) for form in forms]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
        assert torch.equal(steps[0].prev_sample, steps[2].prev_sample)


def test_half_precision_variance_noise_is_converted_to_float32():
    scheduler, output, x = prepared()
    noise = randn(*x.shape, seed=2, dtype=torch.float32).bfloat16()
    want = scheduler.step(output, 500, x, variance_noise=noise.float()).prev_sample
    for t in (500, torch.tensor([500, 500])):
        assert torch.equal(scheduler.step(output, t, x, variance_noise=noise).prev_sample, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_noise_and_equal_variance_noise_give_equal_bits(dtype):
    scheduler, output, x = prepared()
    x, output = x.to(dtype), output.to(dtype)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    drawn = scheduler.step(output, 500, x, torch.Generator().manual_seed(3)).prev_sample
    assert torch.equal(drawn, scheduler.step(output, 500, x, variance_noise=noise).prev_sample)
    assert drawn.dtype == dtype


def test_a_generator_per_image_makes_noise_independent_of_the_batch():
    scheduler, output, x = prepared()
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    together = scheduler.step(output, 500, x, generators).prev_sample
    for i, seed in enumerate((7, 8)):
        alone = scheduler.step(
            output[i : i + 1], 500, x[i : i + 1], [torch.Generator().manual_seed(seed)]
        )
        assert torch.equal(together[i : i + 1], alone.prev_sample)


@pytest.mark.parametrize("is_global", [False, True])
def test_noise_does_not_depend_on_the_memory_format(is_global):
    scheduler, output, x = prepared()
    every_second_row = x.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(every_second_row, x)
    steps = []
    for form in (x, x.to(memory_format=torch.channels_last), every_second_row):
        seeded = torch.manual_seed(3) if is_global else torch.Generator().manual_seed(3)
        steps.append(scheduler.step(output, 500, form, None if is_global else seeded).prev_sample)
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"]
)
def test_a_step_dispatches_few_operations_and_transfers_no_table(variance_type):
    scheduler, output, x = prepared(variance_type)
    scheduler.add_noise(x, x, scheduler.timesteps[:2])
    for t in (500, scheduler.timesteps[25], scheduler.timesteps[:2]):
        scheduler.step(output, t, x)  # the first call caches coefficients
        with Operations() as operations:
            scheduler.step(output, t, x)
        on_host = not isinstance(t, torch.Tensor) or t.ndim == 0
        is_fixed = variance_type.startswith("fixed")
        assert len(operations.names) <= (8 if on_host and is_fixed else 14), operations.names
        assert not {"_to_copy", "_local_scalar_dense", "copy_"} & set(operations.names)
    t = scheduler.timesteps[:2]
    with Operations() as operations:
        scheduler.add_noise(x, x, t)
    passes = [name for name in operations.names if name not in ("embedding", "view", "unbind")]
    assert passes == ["mul", "addcmul_"]


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("thresholding", [{}, {"thresholding": True, "sample_max_value": 2.0}])
def test_no_method_synchronizes_with_a_device(variance_type, thresholding):
    """Tensors on the meta device have no values: reading one, as a synchronization does, raises."""
    scheduler, output, x = prepared(variance_type, device="meta", **thresholding)
    assert scheduler.timesteps.device.type == "meta"
    for t in (scheduler.timesteps[3], scheduler.timesteps[:2], 500):
        step = scheduler.step(output, t, x)
        assert step.prev_sample.shape == x.shape
        assert step.prev_sample.device.type == "meta"
        scheduler.p_mean_variance(output, t, x)
        scheduler.add_noise(x, x, t)
        scheduler.get_velocity(x, x, t)
        scheduler.q_mean_variance(x, t)
        scheduler.q_posterior_mean_variance(x, x, t)
        scheduler.diffuse_one_step(x, t, x)
        scheduler.inverse_step(output, t, x)
    assert scheduler.snr(scheduler.timesteps[:2]).device.type == "meta"


def test_a_timestep_per_image_outside_of_the_trajectory_is_an_error():
    scheduler, output, x = prepared()
    with pytest.raises(
        ValueError, match=r"`timestep` must be in scheduler\.timesteps .*, got \[1\]"
    ):
        scheduler.step(output, torch.tensor([980, 1]), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"variance_type": "learned_range", "prediction_type": "v_prediction"}, {}),
        pytest.param(
            {"thresholding": True, "sample_max_value": 2.0},
            {"eta": 0.0},
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13", reason="torch.quantile breaks the graph in torch 2.9"
            ),
        ),
    ],
)
def test_step_compiles_to_a_single_graph_once(config, options):
    scheduler, output, x = prepared(**config)
    noise = randn(*x.shape, seed=2, dtype=torch.float32)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda output, t, x: scheduler.step(output, t, x, variance_noise=noise, **options),
        fullgraph=True,
        backend=counter,
    )
    for t in scheduler.timesteps:
        got = compiled(output, t, x).prev_sample
        want = scheduler.step(output, int(t), x, variance_noise=noise, **options).prev_sample
        assert_close(got, want, rtol=1e-6, atol=1e-6)  # the graph runs eagerly: same kernels
    # A graph does not read values of tensors: an invalid timestep gives NaN.
    assert compiled(output, torch.tensor(1), x).prev_sample.isnan().all()
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_made_in_inference_mode_can_be_used_in_training(dtype):
    """A tensor made in inference mode cannot be saved for a backward pass."""
    with torch.inference_mode():
        scheduler, output, x = prepared()
        output, x = output.to(dtype), x.to(dtype)
        scheduler.step(output, 500, x)
        scheduler.step(output, scheduler.timesteps[:2], x)
        scheduler.add_noise(x, x, torch.tensor([3, 5]))
    x = randn(2, 3, 8, 8, dtype=dtype)
    output = randn(2, 3, 8, 8, seed=1, dtype=dtype).requires_grad_()
    assert not scheduler.timesteps.is_inference()
    for t in (500, scheduler.timesteps[:2]):
        scheduler.step(output, t, x).prev_sample.sum().backward()
    scheduler.add_noise(output, x, torch.tensor([3, 5])).sum().backward()
    assert output.grad.isfinite().all()
    assert not scheduler.alphas_cumprod.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_sample_and_arithmetic_is_float32(dtype):
    scheduler, output, x = prepared()
    step = scheduler.step(output.bfloat16(), 500, x.to(dtype))
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
    assert scheduler.add_noise(x.to(dtype), x, 5).dtype == dtype
    assert scheduler.get_velocity(x.to(dtype), x, 5).dtype == dtype
    assert scheduler.diffuse_one_step(x.to(dtype), 980, x).dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    inputs = (output.bfloat16(), 500, x.to(dtype))
    step = scheduler.step(*inputs, variance_noise=x)
    inside = scheduler.step(*inputs[:2], inputs[2].to(wide), variance_noise=x)
    assert torch.equal(step.prev_sample, inside.prev_sample.to(dtype))
    assert torch.equal(step.pred_original_sample, inside.pred_original_sample.to(dtype))
    assert scheduler.p_mean_variance(output, 500, x.to(dtype)).mean.dtype == wide
    assert scheduler.q_mean_variance(x.to(dtype), 5).variance.dtype == wide


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_samples_can_have_any_number_of_dimensions(shape):
    scheduler, x = GaussianDDPMScheduler(), randn(*shape)
    t = torch.tensor([900, 3])
    for form in (7, t):
        assert scheduler.step(x, form, x).prev_sample.shape == shape
        q = scheduler.q_mean_variance(x, form)
        assert (q.mean + q.variance + q.log_variance).shape == shape
        p = scheduler.p_mean_variance(x, form, x)
        assert (p.mean + p.variance + p.log_variance).shape == shape
        assert scheduler.add_noise(x, x, form).shape == shape
    assert scheduler.snr(t).shape == (2,)
    assert scheduler.snr(7).shape == scheduler.log_snr(torch.tensor(7)).shape == ()


def test_methods_do_not_modify_their_arguments():
    scheduler, output, x = prepared()
    noise = randn(2, 3, 8, 8, seed=5).float()
    copies = [tensor.clone() for tensor in (output, x, noise)]
    scheduler.step(output, 500, x, variance_noise=noise)
    scheduler.add_noise(x, noise, 5)
    scheduler.get_velocity(x, noise, 5)
    scheduler.diffuse_one_step(x, 500, noise)
    for tensor, before in zip((output, x, noise), copies, strict=True):
        assert torch.equal(tensor, before)


def test_step_is_stateless():
    scheduler, output, x = prepared()
    forward = [scheduler.step(output, t, x, eta=0.0).prev_sample for t in (980, 500, 0)]
    backward = [scheduler.step(output, t, x, eta=0.0).prev_sample for t in (0, 500, 980)]
    for a, b in zip(forward, reversed(backward), strict=True):
        assert torch.equal(a, b)


def test_copies_are_independent():
    scheduler, output, x = prepared()
    scheduler.step(output, 500, x)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        twin.set_timesteps(10)
        assert len(scheduler.timesteps) == 50
        want = scheduler.step(output, 500, x, torch.Generator().manual_seed(1)).prev_sample
        twin.set_timesteps(50)
        got = twin.step(output, 500, x, torch.Generator().manual_seed(1)).prev_sample
        assert torch.equal(got, want)


def test_a_used_scheduler_pickles_without_cached_rows():
    scheduler, output, x = prepared()
    new = len(pickle.dumps(scheduler))
    scheduler.step(output, 500, x)
    scheduler.add_noise(x, x, 5)
    # The float32 tables of the marginal, 1000 timesteps of six values, and of the trajectory.
    assert len(pickle.dumps(scheduler)) < new + 2 * 1000 * 6 * 4 + 1000


def test_a_step_without_noise_does_not_advance_the_generator():
    scheduler, output, x = prepared()
    states = []
    for t in (500, torch.tensor([500, 500])):
        generator = torch.Generator().manual_seed(0)
        scheduler.step(output, t, x, generator, eta=0.0)
        states.append(generator.get_state())
    assert torch.equal(states[0], torch.Generator().manual_seed(0).get_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("thresholding", [{}, {"thresholding": True, "sample_max_value": 2.0}])
def test_an_empty_batch_gives_an_empty_result(thresholding):
    scheduler, x, t = (
        GaussianDDPMScheduler(**thresholding),
        torch.zeros(0, 3, 4),
        torch.zeros(0, dtype=torch.int64),
    )
    for form in (500, t):
        assert scheduler.step(x, form, x).prev_sample.shape == x.shape
        assert scheduler.add_noise(x, x, form).shape == x.shape
        assert scheduler.p_mean_variance(x, form, x).mean.shape == x.shape


def test_the_variance_of_the_last_step_is_a_positive_zero():
    x = torch.zeros(1, 1, dtype=F64)
    assert 1 / GaussianDDPMScheduler().q_posterior_mean_variance(x, x, 0).variance == torch.inf


def test_snr_is_float32_with_any_default_dtype():
    scheduler = GaussianDDPMScheduler()
    torch.set_default_dtype(F64)
    try:
        assert scheduler.snr(5).dtype == scheduler.log_snr(torch.tensor([5])).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_end": 0.5},
        {"num_train_timesteps": 20_000},
        {"beta_schedule": "const", "beta_end": 0.2},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_epsilon_is_an_error_where_the_signal_underflows_float32(config):
    with pytest.raises(ValueError, match=r"`prediction_type` must be .*, got 'epsilon'"):
        GaussianDDPMScheduler(**config)
    scheduler = GaussianDDPMScheduler(**config, prediction_type="v_prediction")
    x, t = torch.ones(1, 1), len(scheduler) - 1
    assert scheduler.step(x, t, x).prev_sample.isfinite().all()


def test_a_warning_names_a_script_whose_path_starts_like_the_package(tmp_path):
    """The warning names the first line outside of the package, here the outermost frame."""
    import ddpm_hf.diffusion.checks as checks

    script = f"{Path(checks.__file__).parent}_train.py"
    code = compile("GaussianDDPMScheduler(100)", script, "exec")
    with pytest.warns(UserWarning, match="signal amplitude .* is 60%") as caught:
        exec(code, {"GaussianDDPMScheduler": GaussianDDPMScheduler})
    assert caught[0].filename == script


def test_returned_variances_are_copies():
    scheduler, output, x = prepared()
    for get in (
        lambda: scheduler.q_mean_variance(x, 500),
        lambda: scheduler.q_posterior_mean_variance(x, x, 500),
        lambda: scheduler.p_mean_variance(output, 500, x),
    ):
        q = get()
        before = q.variance.clone()
        q.variance.zero_()
        assert q.variance.shape == q.log_variance.shape == (1, 1, 1, 1)
        assert torch.equal(get().variance, before)
    scheduler.snr(500).zero_()
    assert scheduler.snr(500) > 0


def test_the_output_is_a_ddpm_scheduler_output():
    scheduler, output, x = prepared()
    step = scheduler.step(output, 0, x)
    assert isinstance(step, DDPMSchedulerOutput)
    assert step["prev_sample"] is step.prev_sample is step[0]
    pair = scheduler.step(output, 0, x, return_dict=False)
    assert isinstance(pair, tuple)
    for a, b in zip(pair, step.to_tuple(), strict=True):
        assert torch.equal(a, b)


def test_a_new_scheduler_visits_the_training_chain():
    scheduler = GaussianDDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    assert scheduler.timesteps.tolist() == list(range(99, -1, -1))
    assert len(scheduler) == 100
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(scheduler.betas, 5) is scheduler.betas
    assert [scheduler.previous_timestep(t) for t in (99, 1, torch.tensor(0))] == [98, 0, -1]
    with pytest.raises(ValueError, match=r"`timestep` must be in .*99 to 0.*got 100"):
        scheduler.previous_timestep(100)


def test_eta_can_change_at_every_step():
    scheduler, output, x = prepared()
    steps = scheduler.timesteps[:20].tolist()
    first = [
        scheduler.step(output, t, x, eta=i / 20, variance_noise=x) for i, t in enumerate(steps)
    ]
    again = [
        scheduler.step(output, t, x, eta=i / 20, variance_noise=x) for i, t in enumerate(steps)
    ]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.prev_sample, b.prev_sample)
