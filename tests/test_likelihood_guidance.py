"""Guidance by log p(y | x_t): the law of guided samples against Bayes' rule in closed form."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpm_hf import GaussianDDPMScheduler
from ddpm_hf.diffusion.likelihood_guidance import (
    ClassifierGuidance,
    MeasurementGuidance,
    guided_denoiser,
)

T, NUM_SAMPLES = 1000, 20_000
ALPHA_BAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
IDENTITY = torch.eye(2, dtype=torch.float64)
A, Y, NOISE_STD = torch.tensor([[1.0, 0.0]], dtype=torch.float64), 1.2, 0.3


def scheduler(prediction_type: str = "sample") -> GaussianDDPMScheduler:
    return GaussianDDPMScheduler(clip_sample=False, prediction_type=prediction_type)


def sample(denoiser, ours, num_steps: int, eta: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(NUM_SAMPLES, 2, dtype=torch.float64, generator=generator)
    ours.set_timesteps(num_steps, timestep_spacing="linspace")
    for t in ours.timesteps:
        x_t = ours.step(denoiser(x_t, t), t, x_t, generator, eta=eta).prev_sample
    return x_t


def in_terms_of(prediction_type: str, x_0: Tensor, x_t: Tensor, bar: Tensor) -> Tensor:
    eps = (x_t - bar.sqrt() * x_0) / (1 - bar).sqrt()
    v = bar.sqrt() * eps - (1 - bar).sqrt() * x_0
    return {"epsilon": eps, "sample": x_0, "v_prediction": v}[prediction_type]


def exact_denoiser(prediction_type: str):
    def denoiser(x_t, t):
        bar = ALPHA_BAR[t]
        wiener = bar.sqrt() * COVARIANCE @ torch.linalg.inv(bar * COVARIANCE + (1 - bar) * IDENTITY)
        return in_terms_of(prediction_type, x_t @ wiener.mT, x_t, bar)

    return denoiser


def log_p_of_measurement(x_t: Tensor, x_0_hat: Tensor, t: Tensor) -> Tensor:
    """log N(y; A E[x_0 | x_t], A Cov[x_0 | x_t] A' + s^2), exact for Gaussian data."""
    bar = ALPHA_BAR[t]
    noisy = torch.linalg.inv(bar * COVARIANCE + (1 - bar) * IDENTITY)
    posterior = COVARIANCE - bar * COVARIANCE @ noisy @ COVARIANCE
    variance = (A @ posterior @ A.mT).squeeze() + NOISE_STD**2
    return -((x_0_hat @ A.mT)[:, 0] - Y).square() / (2 * variance)


def posterior() -> tuple[Tensor, Tensor]:
    gain = COVARIANCE @ A.mT / (A @ COVARIANCE @ A.mT + NOISE_STD**2)
    return gain[:, 0] * Y, COVARIANCE - gain @ A @ COVARIANCE


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_the_likelihood_of_a_measurement_turns_the_prior_into_the_posterior(prediction_type, eta):
    ours = scheduler(prediction_type)
    denoiser = guided_denoiser(exact_denoiser(prediction_type), ours, log_p_of_measurement)
    samples = sample(denoiser, ours, 250, eta)
    mean, covariance = posterior()
    # 250 steps: the discretisation moves the moments by up to 0.02, sampling by 0.01.
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(samples.mT), covariance, rtol=0, atol=0.03)


MEANS, STD, WEIGHT = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64), 0.3, 0.25


def log_joint(x_t: Tensor, t: Tensor) -> Tensor:
    """log p(x_t, class) of a mixture of two Gaussians, (B, 2)."""
    bar = ALPHA_BAR[t].reshape(-1, 1)
    variance = bar * STD**2 + 1 - bar
    distances = (x_t[:, None] - bar[..., None].sqrt() * MEANS).square().sum(-1)
    prior = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=torch.float64).log()
    return prior - distances / (2 * variance) - variance.log()


def mixture_denoiser(x_t: Tensor, t: Tensor) -> Tensor:
    bar = ALPHA_BAR[t]
    shrinkage = bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar)
    each = MEANS + shrinkage * (x_t[:, None] - bar.sqrt() * MEANS)  # (B, 2, 2)
    return (log_joint(x_t, t).softmax(1)[..., None] * each).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_the_class_posterior_of_a_mixture_gives_the_law_of_the_class(label):
    ours = scheduler()
    guidance = ClassifierGuidance(log_joint, [label])
    samples = sample(guided_denoiser(mixture_denoiser, ours, guidance), ours, 250, 1.0)
    torch.testing.assert_close(samples.mean(0), MEANS[label], rtol=0, atol=0.02)
    torch.testing.assert_close(
        torch.cov(samples.mT), STD**2 * IDENTITY, rtol=0, atol=0.01
    )  # sampling error 0.001, discretisation 0.005


def test_a_measurement_uses_the_calibrated_error_of_x_0():
    ours = GaussianDDPMScheduler(
        clip_sample=False, prediction_type="sample", x_0_mse=torch.linspace(0.1, 1, T)
    )
    guidance = MeasurementGuidance(lambda x: x[:, :1], torch.zeros(1, 1), ours, NOISE_STD)
    x_0_hat, t = torch.tensor([[2.0, 5.0]]), torch.tensor(999)
    assert guidance(x_0_hat, x_0_hat, t).item() == pytest.approx(-4 / (2 * (1 + NOISE_STD**2)))
    plain = MeasurementGuidance(lambda x: x[:, :1], torch.zeros(1, 1), scheduler(), NOISE_STD)
    variance = 1 - ALPHA_BAR[999].item() + NOISE_STD**2
    assert plain(x_0_hat, x_0_hat, t).item() == pytest.approx(-4 / (2 * variance))


def test_a_stock_scheduler_is_guided_alike():
    x_t, t = torch.randn(3, 2), torch.tensor(700)
    stock = DDIMScheduler(prediction_type="sample", clip_sample=False)
    outputs = [
        guided_denoiser(lambda x, t: 0.5 * x, s, lambda x, x_0, t: -x.square().sum(1))(x_t, t)
        for s in (stock, scheduler())
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)  # stock's float32 alpha_bar


@pytest.mark.parametrize("kind", [DDIMScheduler, GaussianDDPMScheduler])
@pytest.mark.parametrize("t", [1, 10, 500])
def test_guidance_in_half_precision_uses_noise_levels_of_float32(kind, t):
    """In float16 alpha_bar rounds to 1 at t = 1, where the change would be 0."""
    x_t, guidance = torch.ones(1, 2), lambda x, x_0, t: x_0.sum(1)
    of_float32, of_float16 = (
        guided_denoiser(lambda x, t: 0 * x, kind(), guidance)(x.clone(), torch.tensor([t]))
        for x in (x_t, x_t.half())
    )
    assert of_float16.dtype == torch.float16
    torch.testing.assert_close(of_float16.float(), of_float32, rtol=2e-3, atol=0)


def test_a_fractional_timestep_is_guided_by_the_noise_between_its_neighbours():
    x_t, stock = torch.randn(3, 2), DDIMScheduler(prediction_type="sample", clip_sample=False)
    guidance = MeasurementGuidance(lambda x: x, torch.zeros(1), stock)
    guided = guided_denoiser(lambda x, t: 0.5 * x, stock, guidance)
    low, between, high = (guided(x_t, torch.tensor(t)).norm() for t in (700, 700.5, 701.0))
    assert min(low, high) < between < max(low, high)
    torch.testing.assert_close(guided(x_t, torch.tensor(701)).norm(), high)


def test_the_learned_variance_is_not_changed():
    ours = GaussianDDPMScheduler(variance_type="learned_range", clip_sample=False)
    network = lambda x, t: torch.cat([x, 7 * torch.ones_like(x)], dim=1)  # noqa: E731
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor(500)
    output = guided_denoiser(network, ours, lambda x, x_0, t: x.sum((1, 2, 3)))(x_t, t)
    assert (output[:, 3:] == 7).all()
    sigma = (1 - ALPHA_BAR[500]).sqrt().float()
    torch.testing.assert_close(output[:, :3], x_t - sigma)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (lambda x_t, x_0, t: torch.zeros(len(x_t)), "without gradient with respect to x_t"),
        (lambda x_t, x_0, t: x_t.detach().sum(1).requires_grad_(), "without gradient"),
        (lambda x_t, x_0, t: x_t.sum(), r"shape \(4,\), got \(\)"),
        (lambda x_t, x_0, t: 3.0, r"shape \(4,\), got float"),
    ],
)
def test_guidance_without_shape_or_gradient_is_refused(guidance, message):
    denoiser = guided_denoiser(lambda x, t: 0.5 * x, scheduler(), guidance)
    with pytest.raises(ValueError, match=f"`guidance` .*{message}"):
        denoiser(torch.randn(4, 2), torch.tensor(3))
