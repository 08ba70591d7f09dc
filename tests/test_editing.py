"""Editing functions: for Gaussian data and its exact denoiser, the law of each is a closed form."""

import math
import re

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpm_hf import GaussianDDPMScheduler
from ddpm_hf.diffusion.image_to_image import start_index
from ddpm_hf.diffusion.inpainting import conditioned, repaint_positions
from ddpm_hf.diffusion.krylov import KrylovSpace
from ddpm_hf.editing import (
    combine,
    expected_gain,
    image_to_image,
    inpaint,
    interpolate,
    invert,
    slerp,
)

T = 1000
ALPHA_BAR = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
NUM_VALUES, NUM_SAMPLES = 8, 20_000
# An AR(1) vector of 8 values; the outer pairs are known.
COVARIANCE = 0.9 ** (torch.arange(8)[:, None] - torch.arange(8)).abs().double()
KNOWN, DRAWN = [0, 1, 6, 7], [2, 3, 4, 5]
OBSERVED = torch.tensor([1.5, 1.0, -1.2, -0.5], dtype=torch.float64)


def scheduler(**config) -> GaussianDDPMScheduler:
    defaults = {"clip_sample": False, "timestep_spacing": "linspace", "prediction_type": "sample"}
    return GaussianDDPMScheduler(**defaults | config)


def wiener(covariance: Tensor) -> Tensor:
    """The matrices W_t of the exact denoiser E[x_0 | x_t] = W_t x_t, (T, d, d)."""
    identity = torch.eye(len(covariance), dtype=torch.float64)
    alpha_bar = ALPHA_BAR[:, None, None]
    noisy = alpha_bar * covariance + (1 - alpha_bar) * identity
    return alpha_bar.sqrt() * covariance @ torch.linalg.inv(noisy)


def exact_denoiser(covariance: Tensor):
    matrices = wiener(covariance)
    return lambda x_t, t: x_t @ matrices[int(t[0])].mT


def conditional() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the drawn values given the known ones."""
    cross = COVARIANCE[DRAWN][:, KNOWN] @ torch.linalg.inv(COVARIANCE[KNOWN][:, KNOWN])
    return cross @ OBSERVED, COVARIANCE[DRAWN][:, DRAWN] - cross @ COVARIANCE[KNOWN][:, DRAWN]


def kl_from_conditional(mean: Tensor, covariance: Tensor) -> float:
    target_mean, target = conditional()
    precision, gap = torch.linalg.inv(target), target_mean - mean
    log_ratio = torch.logdet(target) - torch.logdet(covariance)
    return ((precision @ covariance).trace() + gap @ precision @ gap - 4 + log_ratio).item() / 2


def repaint_law(
    num_steps: int, jump_length: int, jump_n_sample: int, eta: float, x_0_mse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of RePaint's result, by recursion over its visiting order.

    The visiting order is restated from 2201.09865, appendix B: after its first visit a position
    that is a multiple of `jump_length` is left upwards `jump_n_sample` - 1 times.
    """
    t = torch.linspace(0, T - 1, num_steps).round().long()
    matrices, identity = wiener(COVARIANCE), torch.eye(NUM_VALUES, dtype=torch.float64)
    known = torch.zeros(NUM_VALUES, dtype=torch.float64)
    known[KNOWN] = 1
    x_0 = torch.zeros(NUM_VALUES, dtype=torch.float64)
    x_0[KNOWN] = OBSERVED
    mean, covariance = torch.zeros(NUM_VALUES, dtype=torch.float64), identity
    repeats = {p: jump_n_sample - 1 for p in range(0, num_steps - jump_length, jump_length)}
    level = num_steps  # x is at position `level` - 1; 0 is the clean image
    while level > 0:
        position = level - 1
        bar = ALPHA_BAR[t[position]]
        prev = ALPHA_BAR[t[position - 1]] if position else torch.ones((), dtype=torch.float64)
        beta = 1 - bar / prev
        var = eta**2 * (1 - prev) / (1 - bar) * beta
        coef_x_t = ((1 - prev - var) / (1 - bar)).clamp(min=0).sqrt()
        coef_x_0 = prev.sqrt() - coef_x_t * bar.sqrt()
        if x_0_mse is not None:
            var = var + coef_x_0**2 * x_0_mse[t[position]]
        step = coef_x_0 * matrices[t[position]] + coef_x_t * identity
        var = var * (position > 0)
        mean, covariance = step @ mean, step @ covariance @ step.mT + var * identity
        mean = (1 - known) * mean + known * prev.sqrt() * x_0
        hide = torch.diag(1 - known)
        covariance = hide @ covariance @ hide + torch.diag(known) * (1 - prev)
        level = position
        if repeats.get(position, 0):
            repeats[position] -= 1
            for up in range(position, position + jump_length):
                before = ALPHA_BAR[t[up - 1]] if up else torch.ones((), dtype=torch.float64)
                alpha = ALPHA_BAR[t[up]] / before
                mean, covariance = alpha.sqrt() * mean, alpha * covariance + (1 - alpha) * identity
            level = position + jump_length
    return mean[DRAWN], covariance[DRAWN][:, DRAWN]


def drawn_law(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples[:, DRAWN].mean(0), torch.cov(samples[:, DRAWN].mT)


def problem(num_samples: int = NUM_SAMPLES) -> tuple[Tensor, Tensor]:
    x_0 = torch.zeros(num_samples, NUM_VALUES, dtype=torch.float64)
    x_0[:, KNOWN] = OBSERVED
    mask = torch.ones(NUM_VALUES)
    mask[KNOWN] = 0
    return x_0, mask


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def exact_x_0_mse() -> Tensor:
    """m_t of the exact denoiser: the mean variance of x_0 given x_t."""
    alpha_bar = ALPHA_BAR[:, None, None]
    posterior = COVARIANCE - alpha_bar.sqrt() * wiener(COVARIANCE) @ COVARIANCE
    return posterior.diagonal(dim1=1, dim2=2).mean(1)


@pytest.mark.parametrize(
    ("is_calibrated", "want"),
    [(False, {1: 0.648, 5: 0.283, 10: 0.305}), (True, {1: 0.648, 5: 0.103, 10: 0.049})],
)
def test_the_recursion_gives_the_known_divergences_of_repaint(is_calibrated, want):
    mse = exact_x_0_mse() if is_calibrated else None
    found = {r: kl_from_conditional(*repaint_law(50, 1, r, 1.0, mse)) for r in want}
    assert found == pytest.approx(want, abs=5e-4)


@pytest.mark.slow
def test_a_jump_longer_than_the_chain_repeats_nothing():
    """The default of 10 also fits chains of fewer timesteps."""
    short = GaussianDDPMScheduler(num_train_timesteps=5, beta_start=0.3, beta_end=0.99)
    x_0, mask = torch.ones(1, 2), torch.tensor([0, 1])
    by_default, without = (
        inpaint(
            lambda x, t: x, short, x_0, mask, progress=False,
            generator=torch.Generator().manual_seed(0), **options
        )
        for options in ({}, {"jump_n_sample": 1})
    )  # fmt: skip
    assert torch.equal(by_default, without)


@pytest.mark.parametrize(
    ("num_steps", "jump_length", "jump_n_sample", "eta", "is_calibrated"),
    [(50, 1, 1, 1.0, False), (20, 1, 5, 1.0, True), (20, 5, 3, 1.0, False), (20, 3, 2, 0.5, False)],
)
def test_repaint_samples_the_law_of_its_recursion(
    num_steps, jump_length, jump_n_sample, eta, is_calibrated, generator
):
    mse = exact_x_0_mse() if is_calibrated else None
    x_0, mask = problem()
    samples = inpaint(
        exact_denoiser(COVARIANCE), scheduler(x_0_mse=mse), x_0, mask, method="repaint",
        num_inference_steps=num_steps, jump_length=jump_length, jump_n_sample=jump_n_sample,
        eta=eta, generator=generator, progress=False,
    )  # fmt: skip
    mean, covariance = drawn_law(samples)
    want_mean, want = repaint_law(num_steps, jump_length, jump_n_sample, eta, mse)
    # z bound of 5 for 4 means and 16 covariances of Gaussian samples
    torch.testing.assert_close(
        mean, want_mean, rtol=0, atol=5 * (want.diagonal().max() / NUM_SAMPLES).sqrt().item()
    )
    scale = (want.diagonal()[:, None] * want.diagonal()).sqrt().max().item()
    torch.testing.assert_close(covariance, want, rtol=0, atol=5 * scale * (2 / NUM_SAMPLES) ** 0.5)


@pytest.mark.slow
def test_the_covariance_method_samples_the_true_conditional_in_ten_steps(generator):
    x_0, mask = problem(5000)
    samples = inpaint(
        exact_denoiser(COVARIANCE), scheduler(), x_0, mask, method="covariance",
        num_inference_steps=10, generator=generator, progress=False,
    )  # fmt: skip
    # The KL of sample moments is chi-square/2N with 14 parameters; beta~ alone gives 0.904.
    assert kl_from_conditional(*drawn_law(samples)) < 3 * 14 / 2 / 5000


@pytest.mark.slow
def test_a_clipping_scheduler_keeps_the_variance_of_draws(generator):
    """Of values -1 and 1 with equal odds, x_t has variance 1 at every t."""
    x_0 = torch.ones(8000, 2, dtype=torch.float64)
    x_0[::2] = -1

    def denoiser(x_t, t):
        bar = ALPHA_BAR[int(t[0])]
        return torch.tanh(bar.sqrt() / (1 - bar) * x_t)

    ours = scheduler(clip_sample=True)
    ours.set_timesteps(timesteps=[600, 300, 0])
    denoisers, posterior = conditioned(
        denoiser, ours, x_0, torch.tensor([True, False]).expand_as(x_0), method="covariance",
        jump_length=1, jump_n_sample=1, generator=generator,
    )  # fmt: skip
    x_t = ours.add_noise(x_0, torch.randn(x_0.shape, dtype=x_0.dtype, generator=generator), 600)
    output = denoisers[0](x_t, torch.full((len(x_t),), 600))
    x_prev = posterior.step(output, 600, x_t, generator).prev_sample
    variance = x_prev[:, 1].square().mean().item()
    assert variance == pytest.approx(1, abs=4 * (2 / 8000) ** 0.5)  # z bound of 4


@pytest.mark.parametrize("method", ["covariance", "repaint"])
def test_known_values_come_back_bit_by_bit_in_the_dtype_of_the_image(method, generator):
    x_0, mask = problem(3)
    x_0 = x_0.float()
    samples = inpaint(
        lambda x_t, t: 0.5 * x_t, scheduler(), x_0, mask, method=method, num_inference_steps=5,
        jump_length=2, jump_n_sample=2, generator=generator, progress=False,
    )  # fmt: skip
    assert samples.dtype == torch.float32
    assert torch.equal(samples[:, KNOWN], x_0[:, KNOWN])
    assert not torch.equal(samples[:, DRAWN], x_0[:, DRAWN])


def test_the_covariance_method_starts_from_pure_noise(generator):
    x_0, mask = problem(3)
    ours = scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    samples = inpaint(
        lambda x_t, t: 0.5 * x_t, ours, x_0, mask, method="covariance", num_inference_steps=5,
        generator=generator, progress=False,
    )  # fmt: skip
    assert samples.isfinite().all()


@pytest.mark.parametrize("method", ["covariance", "repaint"])
def test_values_without_a_shape_are_inpainted(method, generator):
    x_0, mask = torch.linspace(-1, 1, 5), torch.tensor([0, 1, 0, 1, 0])
    samples = inpaint(
        lambda x_t, t: 0.5 * x_t, scheduler(), x_0, mask, method=method, num_inference_steps=3,
        generator=generator, progress=False,
    )  # fmt: skip
    assert torch.equal(samples[::2], x_0[::2])
    assert samples.isfinite().all()


@pytest.mark.parametrize("method", ["covariance", "repaint"])
def test_a_sample_depends_on_its_generator_and_not_on_its_batch(method):
    x_0, mask = problem(4)

    def sample(rows: slice) -> Tensor:
        seeds = range(4)[rows]
        return inpaint(
            exact_denoiser(COVARIANCE), scheduler(), x_0[rows], mask, method=method,
            num_inference_steps=6, jump_length=2, jump_n_sample=2, progress=False,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )  # fmt: skip

    torch.testing.assert_close(sample(slice(2, 3)), sample(slice(4))[2:3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_inpaints_alike(prediction_type):
    matrices = wiener(COVARIANCE)

    def denoiser(x_t, t):
        x_0, bar = x_t @ matrices[int(t[0])].mT, ALPHA_BAR[int(t[0])]
        eps = (x_t - bar.sqrt() * x_0) / (1 - bar).sqrt()
        v = bar.sqrt() * eps - (1 - bar).sqrt() * x_0
        return {"epsilon": eps, "sample": x_0, "v_prediction": v}[prediction_type]

    def sample(denoiser, kind):
        x_0, mask = problem(2)
        return inpaint(
            denoiser, scheduler(prediction_type=kind), x_0, mask, method="covariance",
            num_inference_steps=6, generator=torch.Generator().manual_seed(1), progress=False,
        )  # fmt: skip

    want = sample(exact_denoiser(COVARIANCE), "sample")
    torch.testing.assert_close(sample(denoiser, prediction_type), want, rtol=1e-6, atol=1e-6)


def test_the_visiting_order_of_repaint_repeats_every_part():
    assert repaint_positions(4, 2, 2) == [3, 2, 1, 0, 1, 0]
    assert repaint_positions(5, 10, 10) == [4, 3, 2, 1, 0]
    assert repaint_positions(3, 1, 3) == [2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(8), r"`mask` is empty.*where values are drawn"),
        (torch.ones(8), r"`mask` is full"),
        (torch.full((8,), 0.5), r"`mask` must hold 0 \(known\) and 1 \(drawn\) only"),
        (torch.ones(7), r"`mask` of shape \(7,\) does not broadcast to `x_0`, \(3, 8\)"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        inpaint(lambda x_t, t: x_t, scheduler(), torch.zeros(3, 8), mask, progress=False)


def test_other_bad_arguments_are_refused_with_the_choices():
    x_0, mask = problem(2)
    with pytest.raises(ValueError, match=r"repaint.*covariance.*'patch'"):
        inpaint(lambda x_t, t: x_t, scheduler(), x_0, mask, method="patch")
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler"):
        inpaint(lambda x_t, t: x_t, FlowMatchEulerDiscreteScheduler(), x_0, mask)
    with pytest.raises(ValueError, match=r"`denoiser` returned a tensor without gradient"):
        inpaint(
            lambda x_t, t: x_t.detach(), scheduler(), x_0, mask, method="covariance",
            num_inference_steps=3,
        )  # fmt: skip


# Krylov methods -------------------------------------------------------------------------------


def positive_matrices(batch: int, dim: int) -> Tensor:
    roots = torch.randn(batch, dim, dim, dtype=torch.float64, generator=torch.manual_seed(2))
    return roots @ roots.mT + 0.1 * torch.eye(dim, dtype=torch.float64)


def product_by(matrices: Tensor):
    return lambda x: (matrices @ x[..., None])[..., 0]


def test_the_regression_of_an_exact_covariance_is_that_of_gaussian_conditioning():
    matrices, gap = positive_matrices(3, 6), torch.randn(3, 6, dtype=torch.float64)
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)
    gap[1] = 0
    found = KrylovSpace.of(product_by(matrices), gap * mask, 6, mask).regression()
    want = matrices[:, :, :4] @ torch.linalg.solve(matrices[:, :4, :4], gap[:, :4, None])
    torch.testing.assert_close(found, want[..., 0], rtol=1e-6, atol=1e-8)


def test_the_square_root_is_that_of_the_eigenvalues():
    matrices, noise = positive_matrices(3, 6), torch.randn(3, 6, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrices)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    found = KrylovSpace.of(product_by(matrices), noise, 6).square_root()
    torch.testing.assert_close(found, (root @ noise[..., None])[..., 0], rtol=1e-6, atol=1e-8)


def test_a_krylov_space_ends_where_the_covariance_does_not_leave_it():
    noise = torch.randn(2, 5, dtype=torch.float64)
    space = KrylovSpace.of(lambda x: 4 * x, noise, 5)
    torch.testing.assert_close(space.square_root(), 2 * noise)
    torch.testing.assert_close(space.regression(), noise)


def test_the_error_of_a_covariance_is_its_antisymmetric_part_or_its_negative_eigenvalue():
    generator = torch.manual_seed(3)
    skew = torch.randn(2, 6, 6, dtype=torch.float64, generator=generator)
    skew = skew - skew.mT
    start = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    space = KrylovSpace.of(product_by(positive_matrices(2, 6) + skew), start, 6)
    pairs = torch.linalg.eigvals(skew).imag.sort(descending=True).values[:, :3]
    torch.testing.assert_close(space.error, pairs.square().sum(1).sqrt())
    matrices = torch.diag_embed(torch.tensor([[-3.0, 1, 2, 3, 4, 5]], dtype=torch.float64))
    space = KrylovSpace.of(product_by(matrices), start[:1], 6)
    assert space.error.item() == pytest.approx(3)
    want = start[:1] * matrices.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(space.regression(), want / (matrices.diagonal(dim1=1, dim2=2) + 6))


# Image to image, inversion, interpolation -----------------------------------------------------


def gaussian_denoiser(std: float):
    def denoiser(x_t, t):
        bar = ALPHA_BAR[int(t[0])]
        return bar.sqrt() * std**2 / (bar * std**2 + 1 - bar) * x_t

    return denoiser


@pytest.mark.parametrize(
    ("strength", "eta", "gain"),
    [(0.25, 1.0, 0.216), (0.5, 1.0, 0.021), (0.25, 0.0, 0.463), (0.5, 0.0, 0.144)],
)
def test_image_to_image_keeps_the_expected_share_of_the_guide(strength, eta, gain, generator):
    assert expected_gain(scheduler(), strength=strength, eta=eta) == pytest.approx(gain, abs=5e-4)
    guide = torch.ones(2000, 1, dtype=torch.float64)
    images = image_to_image(
        gaussian_denoiser(0.5), scheduler(), guide, strength=strength, eta=eta,
        generator=generator, progress=False,
    )  # fmt: skip
    assert images.mean().item() == pytest.approx(gain, abs=4 * 0.5 / math.sqrt(2000))


def test_log_snr_and_strength_name_the_same_start():
    ours = scheduler()
    log_snr = ours.log_snr(500, torch.float64).item()
    by_log_snr = expected_gain(ours, log_snr=log_snr)
    assert by_log_snr == expected_gain(ours, strength=0.501)
    with pytest.raises(ValueError, match="`strength` or `log_snr`, not both"):
        expected_gain(ours, strength=0.5, log_snr=0.0)


@pytest.mark.parametrize("strength", [0.0, 1.5, -0.1, float("nan")])
def test_a_strength_out_of_range_is_refused_with_the_value(strength):
    with pytest.raises(ValueError, match=rf"strength.*\(0, 1\].*{strength:g}"):
        image_to_image(gaussian_denoiser(0.5), scheduler(), torch.zeros(1, 1), strength=strength)


def test_a_strength_below_one_step_is_refused_with_the_least_strength():
    with pytest.raises(ValueError, match=r"`strength` 0.05 of 10 steps.*at least 0.1"):
        image_to_image(
            gaussian_denoiser(0.5), scheduler(), torch.zeros(1, 1), strength=0.05,
            num_inference_steps=10,
        )  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 3, 30, 999])
def test_the_least_strength_in_the_error_takes_one_step(num_steps):
    ours = scheduler()
    ours.set_timesteps(num_steps)
    with pytest.raises(ValueError, match="less than one step") as error:
        start_index(ours, 1e-4, None)
    least = float(re.search(r"at least ([0-9.]+),", str(error.value))[1])
    assert start_index(ours, least, None) == num_steps - 1


def test_inversion_and_ddim_reconstruct_the_image_and_the_noise_is_standard_normal(generator):
    x_0 = 0.5 * torch.randn(4000, 1, dtype=torch.float64, generator=generator)
    noise = invert(gaussian_denoiser(0.5), scheduler(), x_0, progress=False)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    x_t, ours = noise, scheduler()
    ours.set_timesteps(T)
    for t in ours.timesteps:
        x_t = ours.step(gaussian_denoiser(0.5)(x_t, t[None]), t, x_t, eta=0.0).prev_sample
    # A solver of first order: the error is proportional to 1/K and to the image.
    torch.testing.assert_close(x_t, x_0, rtol=7e-3, atol=0)


def test_the_midpoint_of_independent_noise_has_standard_deviation_one(generator):
    a, b = (torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2))
    middle = slerp(a, b, 0.5)
    assert middle.std(dim=(1, 2, 3)) == pytest.approx([1.0] * 16, abs=0.05)
    assert ((a + b) / 2).std().item() == pytest.approx(0.707, abs=0.01)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(16)), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_slerp_of_large_half_precision_images_and_of_zeros_is_finite():
    a = torch.randn(1, 3, 256, 256, generator=torch.manual_seed(0)).half()  # a . a exceeds 65,504
    b = torch.randn(1, 3, 256, 256, generator=torch.manual_seed(1)).half()
    middle = slerp(a, b, 0.5)
    assert middle.dtype == torch.float16
    assert middle.float().std().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(slerp(torch.zeros_like(a), b, 0.5), b / 2)
    with pytest.raises(ValueError, match=r"`weight` must be a number or have shape \(1,\), got 3"):
        slerp(a, b, torch.ones(3))


def test_slerp_turns_each_image_by_its_own_angle():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [-1.0, 1.0]])
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close(middle[:1], slerp(a[:1], b[:1], 0.5))
    torch.testing.assert_close(middle[1:], slerp(a[1:], b[1:], 0.5))


def test_interpolation_ends_at_both_images(generator):
    a, b = 0.5 * torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=generator)
    images = interpolate(
        gaussian_denoiser(0.5), scheduler(), a, b, 5, num_inference_steps=200, progress=False
    )
    assert images.shape == (5, 1, 4, 4)
    torch.testing.assert_close(images[0], a, rtol=0.035, atol=0)  # five times that of 1,000 steps
    torch.testing.assert_close(images[-1], b, rtol=0.035, atol=0)


def test_a_scheduler_of_diffusers_gives_its_betas():
    stock = DPMSolverMultistepScheduler(prediction_type="sample", beta_end=0.01)
    x_0 = torch.zeros(2, 1, dtype=torch.float64)
    ours = scheduler(beta_end=0.01)
    images = [
        image_to_image(
            gaussian_denoiser(0.5), s, x_0, num_inference_steps=10, progress=False,
            generator=torch.Generator().manual_seed(0),
        )
        for s in (stock, ours)
    ]  # fmt: skip
    assert torch.equal(*images)


def test_combinations_of_noise_are_standard_normal(generator):
    noise = torch.randn(3, 50_000, generator=generator)
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, -1.0, 0.5], [0.0, 3.0, 0.0]])
    combined = combine(noise, weights)
    assert combined.std(1) == pytest.approx([1.0] * 3, abs=0.02)
    torch.testing.assert_close(combined[2], noise[1])
    torch.testing.assert_close(combined[0], noise.sum(0) / 3**0.5)
    with pytest.raises(ValueError, match=r"`weights` must have shape \(M, 3\)"):
        combine(noise, weights[:, :2])
    with pytest.raises(ValueError, match="must not all be 0"):
        combine(noise, torch.zeros(1, 3))


@pytest.mark.filterwarnings("error")
def test_a_schedule_that_diffusers_lacks_is_edited_without_warnings(generator):
    """Its name is saved for one prediction type; editing also computes with another one."""
    own = scheduler(beta_schedule="chen_sigmoid", prediction_type="epsilon")
    assert 0 < expected_gain(own, strength=0.5, num_inference_steps=4) < 1
    x_0, mask = torch.zeros(2, 4), torch.tensor([1, 0, 0, 1])
    inpaint(
        lambda x_t, t: x_t / 2, own, x_0, mask, num_inference_steps=3, method="covariance",
        generator=generator, progress=False,
    )  # fmt: skip
