"""The variational bound: terms, decoders and bits/dim, against independent derivations."""

import functools
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from mpmath import mpf
from oracles import (
    GAP_OF_BOUND,
    alpha_bars,
    bin_nll,
    iddpm_sections,
    kl_of_step,
    linear_betas,
    mean_of_mixture,
    papers_nll,
    posterior_by_conditioning,
    randn,
    target,
    to_float64,
)
from torch.testing import assert_close

from ddpm_hf import GaussianDDPMScheduler, bits_per_dim, calibrate
from ddpm_hf.decoders import decoder_of
from ddpm_hf.diffusion.tensor_ops import expm1_minus
from ddpm_hf.losses import vlb_term

VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned", "learned_range"]


def kl_of_normals(mean_q, log_var_q, mean_p, log_var_p):
    """The textbook formula, from means and log-variances."""
    ratio, distance = (log_var_q - log_var_p).exp(), (mean_q - mean_p).square()
    return (log_var_p - log_var_q - 1 + ratio + distance / log_var_p.exp()) / 2


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("num_inference_steps", [1000, 10])
def test_step_kl_equals_the_kl_of_posterior_and_reverse_process(
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


def test_step_kl_without_clipping_uses_the_unclipped_estimate():
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


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_step_kl_at_smaller_eta_is_the_kl_of_the_ddim_processes(variance_type):
    """Below 1 the variance of every type is that of eq. 16; the decoder keeps its own."""
    scheduler = GaussianDDPMScheduler(
        prediction_type="sample", clip_sample=False, variance_type=variance_type
    )
    scheduler.set_timesteps(20)
    x_0, x_t, x_0_hat, v = (randn(2, 3, seed=seed) for seed in range(4))
    t, eta = scheduler.timesteps[7].item(), 0.3
    output = torch.cat([x_0_hat, v], 1) if scheduler.learns_variance else x_0_hat
    mean_q, log_var = normal_posterior_of_ddim(scheduler, x_0, x_t, t, eta)
    mean_p, _ = normal_posterior_of_ddim(scheduler, x_0_hat, x_t, t, eta)
    want = kl_of_normals(mean_q, log_var, mean_p, log_var)
    step = scheduler.step_kl(output, x_0, x_t, t, eta=eta)
    assert_close(step.kl, want, rtol=1e-10, atol=0)
    assert_close(step.log_variance, log_var.expand_as(step.log_variance), rtol=1e-12, atol=0)
    decoder, of_ddpm = (scheduler.step_kl(output, x_0, x_t, 0, eta=eta) for eta in (0.3, 1.0))
    assert torch.equal(decoder.log_variance, of_ddpm.log_variance)
    with pytest.raises(ValueError, match=r"`eta` must be .*0 has no bound.*, got 0"):
        scheduler.step_kl(output, x_0, x_t, t, eta=0)


# The bound -------------------------------------------------------------------------------------


@functools.cache
def chain(num_inference_steps):
    """Timesteps spaced as in Improved DDPM's code, with 40-digit coefficients.

    Returns descending timesteps and (alpha_bar, posterior) at each.
    """
    steps = iddpm_sections(1000, str(num_inference_steps))
    bars = alpha_bars(linear_betas(1000))
    previous = [mpf(1), *(bars[t] for t in steps)]
    rows = [
        (bars[t], posterior_by_conditioning(bars[t], prev))
        for t, prev in zip(steps, previous, strict=False)
    ]
    return steps[::-1], rows[::-1]


def reverse_variances(rows, variance_type):
    """Reverse variance of each step; the last has the posterior variance of the step before."""
    betas = [
        1 - bar / prev
        for (bar, _), (prev, _) in zip(rows, [*rows[1:], (mpf(1), None)], strict=True)
    ]
    small = [q.variance for _, q in rows]
    return [*(betas if variance_type == "fixed_large" else small)[:-1], small[-2]]


class ExactDenoiser:
    """The optimal network for a given E[x_0 | x_t]; records the x_t of its calls."""

    def __init__(self, mean_of_x_0, prediction_type="epsilon", log_variances=None):
        self.mean_of_x_0, self.prediction_type = mean_of_x_0, prediction_type
        self.log_variances, self.recorded = log_variances, {}
        self.alpha_bar = to_float64(alpha_bars(linear_betas(1000)))

    def __call__(self, x_t, t):
        outputs = []
        for x, step in zip(x_t, t.tolist(), strict=True):
            self.recorded.setdefault(step, []).append(x)
            a = float(self.alpha_bar[step])
            x_0 = self.mean_of_x_0(x, a)
            output = target(self.prediction_type, x_0, (x - a**0.5 * x_0) / (1 - a) ** 0.5, a)
            if self.log_variances:
                log_variance = torch.full_like(x, self.log_variances[step])
                output = torch.cat([output, log_variance])
            outputs.append(output)
        return torch.stack(outputs)


def normal_mean(data_var):
    return lambda x_t, a: a**0.5 * data_var / (a * data_var + 1 - a) * x_t


DATA = {
    "normal": (lambda n: randn(n, 1, 2, 4) / 2, normal_mean(0.25)),
    "mixture": (
        lambda n: randn(n, 1, 2, 4) / 10 + torch.where(randn(n, 1, 2, 4, seed=9) > 0, 0.5, -0.3),
        lambda x_t, a: mean_of_mixture(x_t, a, [0.5, -0.3], 0.1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("num_inference_steps", [1000, 10])
def test_the_bound_of_an_exact_network_equals_its_closed_form(
    num_inference_steps, data, variance_type
):
    """Terms from 40-digit coefficients and the network's errors on the recorded x_t."""
    make_images, mean_of_x_0 = DATA[data]
    images = make_images(3)
    steps, rows = chain(num_inference_steps)
    scheduler = GaussianDDPMScheduler(clip_sample=False, variance_type=variance_type)
    denoiser = ExactDenoiser(mean_of_x_0)
    errors = lambda t, a: torch.stack(  # noqa: E731
        [
            (x_0 - mean_of_x_0(x, a)).square().mean()
            for x_0, x in zip(images, denoiser.recorded[t], strict=True)
        ]
    )

    result = bits_per_dim(denoiser, scheduler, images, timesteps=steps, decoder="continuous")

    variances = reverse_variances(rows, variance_type)
    want = torch.zeros(3, len(steps), dtype=torch.float64)
    mse = torch.zeros(len(steps), dtype=torch.float64)
    for k, (t, (bar, q), variance) in enumerate(zip(steps, rows, variances, strict=True)):
        error = errors(t, float(bar))
        mse[k] = error.mean()
        for i, e in enumerate(error.tolist()):
            kl = (
                kl_of_step(q, variance, mpf(e))
                if k < len(steps) - 1
                else (mpmath.log(2 * mpmath.pi * variance) + mpf(e) / variance) / 2
            )
            want[i, k] = float(kl / mpmath.log(2))
    bar = rows[0][0]
    square = images.square().flatten(1).mean(1)
    prior = (float(bar) * square + float(-bar - mpmath.log1p(-bar))) / (2 * math.log(2))
    assert_close(result.terms, want, rtol=1e-10, atol=0)
    # The constant part of the prior is 1e-9, computed as a difference from 1.
    assert_close(result.prior, prior, rtol=1e-10, atol=1e-16)
    assert_close(result.total, prior + want.sum(1), rtol=1e-10, atol=0)
    assert_close(result.x_0_mse, mse, rtol=1e-10, atol=0)
    snr = torch.tensor([float(bar / (1 - bar)) for bar, _ in rows], dtype=torch.float64)
    assert_close(result.eps_mse, mse * snr, rtol=1e-10, atol=0)
    assert result.timesteps.tolist() == steps
    assert result.mean == pytest.approx(result.total.mean().item())
    assert result.standard_error == pytest.approx(result.total.std().item() / 3**0.5)


def best_variances(rows, data_var):
    """Optimal reverse variance of an exact network: the posterior's plus the uncertainty of x_0."""
    uncertainty = [data_var * (1 - bar) / (bar * data_var + 1 - bar) for bar, _ in rows]
    return [q.variance + q.coef_x_0**2 * m for (_, q), m in zip(rows, uncertainty, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "best"])
@pytest.mark.parametrize("num_inference_steps", sorted(GAP_OF_BOUND))
def test_the_gap_of_the_bound_on_normal_data_equals_the_table(num_inference_steps, kind):
    """x_0 and noise whose squares and products average to their expectations."""
    steps, rows = chain(num_inference_steps)
    best = best_variances(rows, mpf("0.25"))
    variances = best if kind == "best" else [*reverse_variances(rows, kind)[:-1], best[-1]]
    log_variances = {t: float(mpmath.log(v)) for t, v in zip(steps, variances, strict=True)}
    scheduler = GaussianDDPMScheduler(clip_sample=False, variance_type="learned")
    scheduler.set_timesteps(timesteps=steps)
    x_0 = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64).expand(len(steps), 1, 4)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).expand(len(steps), 1, 4)
    denoiser = ExactDenoiser(normal_mean(0.25), log_variances=log_variances)

    terms = vlb_term(denoiser, scheduler, x_0, torch.tensor(steps), noise, decoder="continuous")

    bar = float(rows[0][0])
    prior = (0.25 * bar - bar - math.log1p(-bar)) / (2 * math.log(2))
    gap = prior + terms.sum().item() - math.log2(2 * math.pi * math.e * 0.25) / 2
    if kind == "best":  # the only loss at any K is from x_T, whose variance is not exactly 1
        assert gap == pytest.approx(
            (-0.75 * bar - math.log1p(-0.75 * bar)) / math.log(4), abs=1e-10
        )
    else:
        small, large = GAP_OF_BOUND[num_inference_steps]
        digits, want = (2, small) if kind == "fixed_small" else (4, large)
        assert round(gap, digits) == want


def levels(*shape, bit_depth=8, seed=0, dtype=torch.float64):
    """Random pixels on the grid, in [-1, 1]."""
    top = 2**bit_depth - 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(top + 1, shape, generator=generator).to(dtype) * 2 / top - 1


def halve(x_t, t):
    return x_t * 0.5


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def scheduler():
    return GaussianDDPMScheduler(num_train_timesteps=20, beta_end=0.5, timestep_spacing="trailing")


def test_the_scheduler_is_not_modified_and_its_timesteps_are_ignored(scheduler):
    images, rows = levels(2, 1, 2, 2), torch.arange(20).flip(0)
    whole = bits_per_dim(halve, scheduler, images, generator=generators(1, 2))
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    again = bits_per_dim(halve, scheduler, images, generator=generators(1, 2))
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(again.timesteps, rows)
    assert torch.equal(again.total, whole.total)
    short = bits_per_dim(halve, scheduler, images, num_inference_steps=4)
    assert torch.equal(short.timesteps, before)
    assert short.terms.shape == (2, 4)
    custom = bits_per_dim(halve, scheduler, images, timesteps=[19, 3])
    assert custom.timesteps.tolist() == [19, 3]
    one = bits_per_dim(halve, scheduler, images, timesteps=[19])
    assert torch.equal(one.total, one.prior + one.terms[:, 0])


@pytest.mark.parametrize("num_generators", [2, 4])
def test_a_list_of_generators_has_one_for_each_image(scheduler, num_generators):
    images, calls = levels(3, 1, 2, 2), []
    own = generators(*range(num_generators))
    for source in (images, [images]):
        with pytest.raises(ValueError, match=f"of 3, one per image, got .* {num_generators}"):
            bits_per_dim(halve, scheduler, source, generator=own)

    def counted(x_t, t):
        calls.append(t)
        return halve(x_t, t)

    with pytest.raises(ValueError, match="one per image"):
        bits_per_dim(counted, scheduler, images, generator=own)
    assert calls == []


@pytest.mark.parametrize("num_timesteps", [None, 5])
def test_the_bound_of_an_image_with_its_own_generator_does_not_depend_on_the_batch(
    scheduler, num_timesteps
):
    images = levels(5, 1, 2, 2)
    options = {"num_timesteps": num_timesteps}
    whole = bits_per_dim(halve, scheduler, images, generator=generators(*range(5)), **options)
    split = bits_per_dim(
        halve, scheduler, images, generator=generators(*range(5)), batch_size=2, **options
    )
    loader = (batch for batch in images.split([1, 4]))
    streamed = bits_per_dim(halve, scheduler, loader, generator=generators(*range(5)), **options)
    for other in (split, streamed):
        for name in ("total", "prior", "terms", "num_measured"):
            assert torch.equal(getattr(other, name), getattr(whole, name))
        # The order of summation differs.
        assert_close(other.x_0_mse, whole.x_0_mse, rtol=1e-14, atol=0, equal_nan=True)


def test_importance_sampled_terms_are_unbiased():
    scheduler = GaussianDDPMScheduler(clip_sample=False)
    images, denoiser = levels(200, 1, 4, 4), ExactDenoiser(normal_mean(1 / 3))
    draw = torch.Generator().manual_seed(1)  # differs from the seed of the images
    whole = bits_per_dim(denoiser, scheduler, images, num_inference_steps=100, generator=draw)
    few = bits_per_dim(
        denoiser, scheduler, images, num_inference_steps=100, num_timesteps=6, generator=draw
    )
    assert few.num_measured.sum() == 6 * 200
    assert few.num_measured[-1] == 200
    # Counts of 200 draws, within 5 standard errors of independent draws.
    excess = few.num_measured - 200 * few.num_expected
    assert (excess.abs() < 5 * (200 * few.num_expected).sqrt() + 1).all()
    assert_close(few.total, few.prior + few.terms.sum(1))
    distance = few.total - whole.total  # paired: the images are the same
    assert abs(distance.mean().item()) < 3 * (distance.std() / 200**0.5).item()
    # 6 importance-sampled calls are nearly as accurate as 100.
    assert few.standard_error < 2 * whole.standard_error


def test_the_standard_error_of_sampled_terms_matches_the_spread_of_estimates(scheduler):
    images, draw = levels(50, 1, 2, 2), torch.Generator().manual_seed(1)
    runs = [
        bits_per_dim(halve, scheduler, images, num_timesteps=3, generator=draw) for _ in range(60)
    ]
    scatter = torch.tensor([run.mean for run in runs]).std().item()
    # The images are the same in all runs and do not contribute to the spread.
    per_image = torch.stack([run.total for run in runs])
    within = per_image.var(0).mean().sqrt().item() / 50**0.5
    assert scatter == pytest.approx(within, rel=0.3)  # 60 runs: 9 % standard error
    assert torch.tensor([run.standard_error for run in runs]).mean() > 0.9 * within


def test_sampling_all_timesteps_gives_the_full_bound(scheduler):
    images = levels(2, 1, 2, 2)
    whole = bits_per_dim(halve, scheduler, images, generator=generators(1, 2))
    every = bits_per_dim(halve, scheduler, images, generator=generators(1, 2), num_timesteps=20)
    assert torch.equal(every.terms, whole.terms)


def test_float32_terms_are_accurate_to_1e_4_and_their_sum_to_2e_5():
    """Differences of means would lose all digits: linear schedule, T = 1000."""
    scheduler = GaussianDDPMScheduler(clip_sample=False, variance_type="learned_range")
    t = torch.arange(1000)
    x_0 = levels(1, 3, 8, 8, dtype=torch.float32).expand(1000, 3, 8, 8)
    noise = randn(1000, 3, 8, 8, dtype=torch.float32)
    wrong, v = randn(1000, 3, 8, 8, seed=1) / 3, randn(1000, 3, 8, 8, seed=2).clamp(-1, 1)

    def terms(dtype):
        output = torch.cat([noise.to(dtype) + wrong.float().to(dtype), v.float().to(dtype)], dim=1)
        return vlb_term(lambda x_t, t: output, scheduler, x_0.to(dtype), t, noise.to(dtype))

    want, got = terms(torch.float64), terms(torch.float32)
    assert got.dtype == torch.float32
    assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert_close(got.double().sum(), want.sum(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expm1_minus_and_its_gradient_are_accurate_at_any_ratio(dtype):
    ratios = [s * 10.0**n for n in range(-7, 2) for s in (-1, -0.49, 0.51, 1)]
    r = torch.tensor(ratios, dtype=dtype, requires_grad=True)
    value = expm1_minus(r)
    value.sum().backward()
    exact = [mpf(x) for x in r.tolist()]
    digits = 1e-5 if dtype == torch.float32 else 1e-12  # worst where the series ends
    want = [float(mpmath.expm1(x) - x) for x in exact]
    assert_close(value, torch.tensor(want, dtype=dtype), rtol=digits, atol=0)
    want = [float(mpmath.expm1(x)) for x in exact]
    assert_close(r.grad, torch.tensor(want, dtype=dtype), rtol=digits, atol=0)


def test_the_ddpm_scheduler_of_diffusers_is_accepted_and_ddim_is_rejected(scheduler):
    images = levels(2, 1, 2, 2)
    stock = DDPMScheduler.from_config(scheduler.config)
    want = bits_per_dim(halve, scheduler, images, generator=generators(1, 2))
    got = bits_per_dim(halve, stock, images, generator=generators(1, 2))
    assert torch.equal(got.total, want.total)
    ddim = DDIMScheduler.from_config(scheduler.config)
    with pytest.raises(TypeError, match=r"scheduler.*got DDIMScheduler"):
        bits_per_dim(halve, ddim, images)
    with pytest.raises(ValueError, match=r"`eta` must be .*0 has no bound.*, got 0"):
        bits_per_dim(halve, scheduler, images, eta=0.0)


def small_unet(**config):
    defaults = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.5,
        **defaults | config,
    )


def test_a_model_is_evaluated_in_its_dtype_and_not_modified(scheduler):
    unet, images = small_unet(), levels(3, 1, 8, 8, dtype=torch.float32)
    unet.train()
    first = bits_per_dim(unet, scheduler, images, generator=generators(1, 2, 3))
    again = bits_per_dim(unet, scheduler, images, generator=generators(1, 2, 3))
    assert torch.equal(first.total, again.total)  # without dropout
    assert unet.training
    assert all(p.requires_grad for p in unet.parameters())
    assert first.total.dtype == torch.float64
    half = bits_per_dim(unet.to(torch.bfloat16), scheduler, images, generator=generators(1, 2, 3))
    assert_close(half.total, first.total, rtol=0.05, atol=0)  # bfloat16 has 3 digits
    scheduler.step(images, 3, images)  # tensors cached during the call support autograd


def test_the_bit_depth_defaults_to_that_of_the_model(scheduler):
    unet, images = small_unet(), levels(3, 1, 8, 8, bit_depth=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="on the 8-bit grid"):
        bits_per_dim(unet, scheduler, images)
    image = {"mode": "L", "height": 8, "width": 8, "bit_depth": 16}
    unet.register_to_config(_ddpm_hf={"format_version": 1, "image": image})
    recorded = bits_per_dim(unet, scheduler, images, generator=generators(1, 2, 3))
    function = unet.eval().forward
    explicit = bits_per_dim(
        function, scheduler, images, generator=generators(1, 2, 3), bit_depth=16
    )
    assert torch.equal(recorded.total, explicit.total)


images = levels(2, 1, 2, 2)
BAD_ARGUMENTS = {
    "no images": ({"images": images[:0]}, "`images` must contain at least one image"),
    "no batches": ({"images": iter([])}, "`images` must contain at least one image"),
    "bytes": ({"images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)}, "images.* floating-point"),
    "pixels": ({"images": images * 127.5 + 127.5}, r"`images` must be in \[-1, 1\], got 47..251"),
    "off the grid": ({"images": images * 0.9}, "`images` .* must be on the 8-bit grid"),
    "infinite": ({"images": images / images.round().clamp(0, 0)}, "`images` must be finite, got"),
    "pairs": ({"images": [[images, 0]]}, "`images` must be a tensor .* got an iterable of list"),
    "one number per image": (
        {"images": images[:, 0, 0, 0]},
        r"`images` must have shape \(N, C, ...\), got \(2,\)",
    ),
    "one output too many": (
        {"denoiser": lambda x, t: x.repeat(1, 2, 1, 1)},
        r"`denoiser` must return .* shape \(2, 1, 2, 2\) .* got \(2, 2, 2, 2\)",
    ),
    "no tensor": ({"denoiser": lambda x, t: (x,)}, "`denoiser` must return .* got tuple"),
    "a damaged network": ({"denoiser": lambda x, t: x * math.nan}, "not finite at timestep 19"),
    "more steps than T": ({"num_inference_steps": 21}, "num_inference_steps.* must be .* got 21"),
    "a timestep beyond T": ({"timesteps": [20, 3]}, "timesteps.* got .20, 3"),
    "two trajectories": (
        {"timesteps": [3], "num_inference_steps": 1},
        "timesteps.*pass|pass.*timesteps",
    ),
    "one sampled timestep": ({"num_timesteps": 1}, "num_timesteps.* must be .* got 1"),
    "unknown decoder": ({"decoder": "erf"}, "decoder.* must be .*'exact', 'tanh'.* got 'erf'"),
    "unknown depth": ({"bit_depth": 12}, "`bit_depth` must be 8 or 16, got 12"),
    "no batch size": ({"batch_size": 0}, "batch_size.* must be .* got 0"),
    "too few generators": (
        {"generator": generators(1)},
        "`generator` must be .* list of 2, .* got a list of 1",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_invalid_arguments_are_reported_with_value_and_fix(scheduler, case):
    arguments, message = BAD_ARGUMENTS[case]
    call = {"denoiser": halve, "scheduler": scheduler, "images": images, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        bits_per_dim(**call)


SHAPE = r"`images` must have shape \(N, 3, H, W\) with H and W multiples of 4 .*, got shape "
BAD_SHAPES = {
    "grey": (lambda x: x[:, :1], r"\(2, 1, 8, 8\)"),
    "RGBA": (lambda x: torch.cat([x, x[:, :1]], 1), r"\(2, 4, 8, 8\)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), r"\(2, 8, 8, 3\); .*permute\(0, 3, 1, 2\)"),
    "one image": (lambda x: x[0], r"\(3, 8, 8\); .*images\[None\]"),
    "a list of images": (list, r"\(3, 8, 8\)"),
    "odd height": (lambda x: x[:, :, :7], r"\(2, 3, 7, 8\)"),
    "width not a multiple of 4": (lambda x: x[..., :6], r"\(2, 3, 8, 6\)"),
    "a later batch": (lambda x: [x, x[..., :5]], r"\(2, 3, 8, 5\)"),
    "five dimensions": (lambda x: x[None], r"\(1, 2, 3, 8, 8\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_SHAPES)
@pytest.mark.parametrize("wrap", [lambda unet: unet, torch.nn.DataParallel, functools.partial])
@pytest.mark.parametrize("measure", [bits_per_dim, calibrate])
def test_images_of_another_shape_than_the_models_are_a_value_error(scheduler, measure, wrap, case):
    make, got = BAD_SHAPES[case]
    unet = small_unet(
        in_channels=3, out_channels=3, block_out_channels=(8,) * 3,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=SHAPE + got):
        measure(wrap(unet), scheduler, make(levels(2, 3, 8, 8, dtype=torch.float32)))


# The decoder -----------------------------------------------------------------------------------

LOG_STDS = [-9.0, -5.0, -3.0, -2.54, -1.0, 0.0]
MEANS = [-1.3, -1.0, -0.31, -0.18, 0.0, 0.4, 0.998, 1.0, 2.0]


def grid_of_cases(bit_depth):
    """x_0, mean and log-variance: edge and middle bins, near and far means."""
    top = 2**bit_depth - 1
    pixels = [k * 2 / top - 1 for k in (0, 1, top // 3, top // 2, top - 1, top)]
    cases = itertools.product(pixels, MEANS, [2 * s for s in LOG_STDS])
    return torch.tensor(list(cases), dtype=torch.float64).unbind(1)


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_the_exact_decoder_is_accurate_to_12_digits(bit_depth):
    x_0, mean, log_variance = grid_of_cases(bit_depth)
    want = [
        bin_nll(*case, bit_depth) for case in torch.stack([x_0, mean, log_variance], 1).tolist()
    ]
    got = decoder_of("exact", bit_depth)(x_0, mean, log_variance)
    assert_close(
        got, torch.tensor([float(w) for w in want], dtype=torch.float64), rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_the_probabilities_of_all_bins_sum_to_1(bit_depth):
    top = 2**bit_depth - 1
    x_0 = torch.arange(top + 1, dtype=torch.float64) * 2 / top - 1
    for mean, log_std in itertools.product(MEANS, LOG_STDS):
        nll = decoder_of("exact", bit_depth)(
            x_0, torch.full_like(x_0, mean), torch.full_like(x_0, 2 * log_std)
        )
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_tanh_decoder_equals_that_of_the_papers():
    x_0, mean, log_variance = grid_of_cases(8)
    want = papers_nll(x_0.numpy(), mean.numpy(), log_variance.numpy())
    got = decoder_of("tanh")(x_0, mean, log_variance)
    # Compared as probabilities: at 1e-12 their difference of numbers near 1 has 4 digits.
    assert_close((-got).exp(), torch.from_numpy(np.exp(-want)), rtol=1e-12, atol=1e-15)
    assert got.max().item() == pytest.approx(-math.log(1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_decoder_has_a_gradient_below_the_floor_of_the_tanh_decoder(dtype):
    x_0, log_variance = torch.ones(1, dtype=dtype), torch.full((1,), -9.8, dtype=dtype)
    gradients = {}
    for name in ("exact", "tanh"):
        mean = torch.tensor([-0.5], dtype=dtype, requires_grad=True)
        decoder_of(name)(x_0, mean, log_variance).backward()
        gradients[name] = mean.grad.item()
    assert gradients["tanh"] == 0
    variance = math.exp(-9.8)
    assert gradients["exact"] == pytest.approx((-0.5 - 1 + 1 / 255) / variance, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_gradients_of_the_decoder_are_finite_for_any_mean_and_variance(bit_depth, dtype):
    x_0, mean, log_variance = (x.to(dtype) for x in grid_of_cases(bit_depth))
    mean = torch.cat([mean, mean * 300]).requires_grad_()
    log_variance = log_variance.repeat(2).requires_grad_()
    nll = decoder_of("exact", bit_depth)(x_0.repeat(2), mean, log_variance)
    nll.sum().backward()
    assert nll.isfinite().all()
    assert mean.grad.isfinite().all()
    assert log_variance.grad.isfinite().all()


def test_gradients_of_the_decoder_match_finite_differences():
    x_0, mean, log_variance = grid_of_cases(8)
    # Finite differences fail where the value is 1e9 or its curvature 1e8.
    near = ((x_0 - mean).abs() * (-log_variance / 2).exp() < 100) & (log_variance > -11)
    args = (x_0[near], mean[near].requires_grad_(), log_variance[near].requires_grad_())
    assert near.sum() > 50
    for name in ("exact", "continuous"):
        assert torch.autograd.gradcheck(decoder_of(name), args, rtol=1e-5, atol=1e-4)
