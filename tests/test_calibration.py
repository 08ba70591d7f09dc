"""Calibration: variances, bounds and timesteps from a measured error curve m_t."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from oracles import alpha_bars, exact_output, linear_betas, mean_of_mixture, randn, to_float64
from torch.testing import assert_close

from ddpm_hf import (
    GaussianDDPMPipeline,
    GaussianDDPMScheduler,
    bits_per_dim,
    calibrate,
    calibration,
)
from ddpm_hf.diffusion.timestep_spacings import trailing
from ddpm_hf.losses import vlb_term
from ddpm_hf.trajectory_timesteps import SAMPLERS, trajectory_matching_timesteps

T, DATA_VAR = 1000, 0.25
ALPHA_BAR = to_float64(alpha_bars(linear_betas(T)))
# m_t of the exact network on N(0, DATA_VAR I): the variance of x_0 given x_t.
EXACT_MSE = DATA_VAR * (1 - ALPHA_BAR) / (ALPHA_BAR * DATA_VAR + 1 - ALPHA_BAR)


def calibrated(x_0_mse=EXACT_MSE, **config):
    return GaussianDDPMScheduler(x_0_mse=x_0_mse, clip_sample=False, **config)


def outputs_for(prediction_type, x_t, timesteps):
    rows = zip(x_t, timesteps.tolist(), strict=True)
    return torch.stack(
        [exact_output(prediction_type, x, float(ALPHA_BAR[t]), DATA_VAR) for x, t in rows]
    )


# Variances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.5, 1e-6])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 25, 100, 1000])
def test_samples_of_normal_data_have_the_standard_deviation_of_the_data(num_steps, eta):
    """The gain of a step from x_t = 1 without noise, its std from x_t = 0 with unit noise."""
    scheduler = calibrated()
    scheduler.set_timesteps(num_steps, timestep_spacing="linspace")
    variance = 1.0
    for t in scheduler.timesteps.tolist():
        x_t = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        output = exact_output("epsilon", x_t, float(ALPHA_BAR[t]), DATA_VAR)
        noise = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        gain, std = scheduler.step(output, t, x_t, variance_noise=noise, eta=eta).prev_sample
        variance = (gain**2 * variance + std**2).item()
    # The last step returns the mean, without the variance m_0; x_T is not exactly N(0, I).
    assert math.sqrt(variance) == pytest.approx(0.49990, abs=2e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 25, 100, 1000])
def test_the_bound_of_normal_data_is_tight_at_any_number_of_steps(num_steps):
    scheduler = calibrated()
    scheduler.set_timesteps(num_steps, timestep_spacing="trailing")
    t = scheduler.timesteps
    # Squares and products average to their expectations.
    x_0 = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64).expand(len(t), 1, 4)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).expand(len(t), 1, 4)
    x_t = scheduler.add_noise(x_0, noise, t)
    step = scheduler.step_kl(outputs_for("epsilon", x_t, t), x_0, x_t, t)
    last = (x_0 - step.pred_original_sample)[-1].square().mean() / step.log_variance[-1].exp()
    decoder = (last + step.log_variance[-1] + math.log(2 * math.pi)) / 2
    bar = ALPHA_BAR[-1]
    prior = (DATA_VAR * bar - bar - math.log1p(-bar)) / 2
    total = prior + step.kl[:-1].mean((1, 2)).sum() + decoder.mean()
    entropy = math.log(2 * math.pi * math.e * DATA_VAR) / 2
    # KL(q(x_T) || N(0, I)) remains.
    remains = (DATA_VAR * bar - bar - math.log1p(DATA_VAR * bar - bar)) / 2
    assert total.item() - entropy == pytest.approx(remains, abs=1e-9)


MIXTURE = {"means": [0.5, -0.3], "data_std": 0.1}


def density_of_mixture(x, alpha_bar):
    """Density of x_t, also an even mixture of normals."""
    std = (alpha_bar * MIXTURE["data_std"] ** 2 + 1 - alpha_bar) ** 0.5
    each = [(x - alpha_bar**0.5 * mean) / std for mean in MIXTURE["means"]]
    return sum(np.exp(-(z**2) / 2) for z in each) / (2 * std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("prev", "t"), [(199, 399), (39, 79), (0, 999), (499, 500)])
def test_the_variance_of_a_mixture_equals_quadrature(prev, t):
    """E (x_prev - mean(x_t))^2 over q(x_prev, x_t), without x_0."""
    a_prev, a_t = ALPHA_BAR[prev], ALPHA_BAR[t]
    # m_t by quadrature: E x_0^2 - E x_0_hat^2.
    x = np.linspace(-9, 9, 20001)
    x_0_hat = mean_of_mixture(torch.from_numpy(x), a_t, **MIXTURE).numpy()
    second = MIXTURE["data_std"] ** 2 + np.mean(np.square(MIXTURE["means"]))
    mse = second - np.sum(density_of_mixture(x, a_t) * x_0_hat**2) * (x[1] - x[0])
    curve = np.ones(T)
    curve[t] = mse
    scheduler = calibrated(curve, prediction_type="sample")
    scheduler.set_timesteps(timesteps=[t, prev])
    got = scheduler.p_mean_variance(torch.zeros(1, 1).double(), t, torch.zeros(1, 1).double())

    # Trapezoids: exact to the last digits for smooth functions that vanish at both ends.
    u = np.linspace(-7, 7, 3001)[:, None]  # x_prev
    alpha = a_t / a_prev
    z = np.linspace(-8, 8, 201)[None]  # the noise of x_t given x_prev
    x_t = np.sqrt(alpha) * u + np.sqrt(1 - alpha) * z
    weight = density_of_mixture(u, a_prev) * np.exp(-(z**2) / 2)
    estimate = mean_of_mixture(torch.from_numpy(x_t), a_t, **MIXTURE)
    p = scheduler.p_mean_variance(
        estimate.reshape(-1, 1), t, torch.from_numpy(x_t).reshape(-1, 1)
    ).mean.reshape(x_t.shape)
    want = np.sum(weight * (u - p.numpy()) ** 2) / weight.sum()
    assert got.variance.item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.4, 1e-5])
def test_the_variance_of_an_exact_network_equals_analytic_dpm(eta):
    """2201.06503, eq. 7, from the second moment of eps."""
    scheduler = calibrated()
    scheduler.set_timesteps(20)
    steps = scheduler.timesteps.tolist()
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    for t, prev in itertools.pairwise(steps):
        a_t, a_prev = ALPHA_BAR[t], ALPHA_BAR[prev]
        eps_second_moment = (1 - a_t) / (a_t * DATA_VAR + 1 - a_t)
        lam2 = eta**2 * (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
        factor = np.sqrt((1 - a_t) * a_prev / a_t) - np.sqrt(1 - a_prev - lam2)
        want = lam2 + factor**2 * (1 - eps_second_moment)
        std = scheduler.step(zero, t, zero, variance_noise=one, eta=eta).prev_sample
        # The paper's factor is a difference of close numbers, accurate to 1e-11.
        assert std.item() ** 2 == pytest.approx(want, rel=1e-11)
        # If the variance equals the squared error, the KL is the difference of the entropies.
        error = torch.full((1, 1), EXACT_MSE[t] ** 0.5, dtype=torch.float64)
        output = -error * (a_t / (1 - a_t)) ** 0.5  # x_0_hat = error at x_t = 0
        kl = scheduler.step_kl(output, zero, zero, t, eta=eta).kl.item()
        assert kl == pytest.approx(math.log(want / lam2) / 2, rel=1e-10)


def test_eta_0_is_deterministic_and_the_last_step_returns_the_mean():
    scheduler, plain = calibrated(), GaussianDDPMScheduler(clip_sample=False)
    output, x_t = randn(2, 3), randn(2, 3, seed=1)
    for s in (scheduler, plain):
        s.set_timesteps(10)
    for t in (900, torch.tensor([900, 0])):
        got = scheduler.step(output, t, x_t, eta=0.0).prev_sample
        assert torch.equal(got, plain.step(output, t, x_t, eta=0.0).prev_sample)
    for t in (0, torch.tensor([0, 0])):
        got = scheduler.step(output, t, x_t, variance_noise=x_t).prev_sample
        assert torch.equal(got, plain.step(output, t, x_t).prev_sample)
    p = scheduler.p_mean_variance(output, 0, x_t)
    assert p.variance.item() == pytest.approx(EXACT_MSE[0], rel=1e-12)
    assert p.log_variance.item() == pytest.approx(math.log(EXACT_MSE[0]), rel=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
def test_a_network_without_error_has_a_finite_bound(variance_type):
    scheduler = calibrated(np.zeros(T), prediction_type="sample", variance_type=variance_type)
    x_0 = randn(2, 1, 3, dtype=torch.float32)
    output = x_0 if variance_type == "fixed_small" else torch.cat([x_0, -x_0.abs()], 1)
    for t in (0, 1, 500, 999):
        term = vlb_term(
            lambda x, t: output, scheduler, x_0, torch.tensor([t, t]), x_0, decoder="continuous"
        )
        assert term.isfinite().all()


# A learned variance --------------------------------------------------------------------------


def log_sigma_of(cov, t, variance_type):
    """Network output for a variance at the training spacing, from DDPM's eq. 7."""
    a_t, a_prev = ALPHA_BAR[t], ALPHA_BAR[t - 1]
    beta = 1 - a_t / a_prev
    small = (1 - a_prev) / (1 - a_t) * beta
    log_sigma = torch.log(small + (a_prev**0.5 * beta / (1 - a_t)) ** 2 * cov)
    if variance_type == "learned":
        return log_sigma
    return 2 * (log_sigma - math.log(small)) / math.log(beta / small) - 1


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_is_scaled_to_the_measured_level(variance_type):
    t, prev, mse = 400, 200, 0.03
    curve = np.full(T, mse)
    scheduler = calibrated(curve, prediction_type="sample", variance_type=variance_type)
    scheduler.set_timesteps(timesteps=[t, prev, 0])
    cov = torch.tensor([[[0.01, 0.02, 0.03, 0.0]], [[0.04, 0.04, 0.04, 0.04]]]).double()
    v, x_t = log_sigma_of(cov, t, variance_type), randn(2, 1, 4)
    output = torch.cat([x_t, v], 1)
    share = torch.tensor([[[2 / 3, 4 / 3, 2, 0]], [[1, 1, 1, 1]]]).double()
    a_t, a_prev = ALPHA_BAR[t], ALPHA_BAR[prev]
    beta = 1 - a_t / a_prev
    small, coef = (1 - a_prev) / (1 - a_t) * beta, a_prev**0.5 * beta / (1 - a_t)
    want = small + coef**2 * mse * (0.9 * share + 0.1)
    p = scheduler.p_mean_variance(output, t, x_t)
    # sigma^2 is dominated by beta~, 1 - a_t / a_prev, which leaves 9 digits of cov.
    assert_close(p.variance, want, rtol=1e-8, atol=0)
    noise = torch.ones_like(x_t)
    for where in (t, torch.tensor([t, t])):
        noisy = scheduler.step(output, where, x_t, variance_noise=noise).prev_sample
        assert_close(noisy - p.mean, want.sqrt(), rtol=1e-8, atol=0)
    # At t = 0 sigma^2 is cov itself, whatever the trajectory.
    plain = GaussianDDPMScheduler(
        prediction_type="sample", variance_type=variance_type, clip_sample=False
    )
    at_0 = torch.cat([x_t, -torch.rand_like(x_t)], 1)
    got, published = (s.p_mean_variance(at_0, 0, x_t) for s in (scheduler, plain))
    assert_close(got.variance, published.variance, rtol=1e-12, atol=0)


# The curve in a configuration ----------------------------------------------------------------


def test_the_curve_is_saved_and_loaded_bit_for_bit(tmp_path):
    scheduler = calibrated(np.random.default_rng(0).random(T), timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path / "ours")
    stock = DDPMScheduler.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    ddim = DDIMScheduler.from_config(stock.config)
    copies = [
        GaussianDDPMScheduler.from_pretrained(tmp_path / "ours"),
        GaussianDDPMScheduler.from_pretrained(tmp_path / "stock"),
        GaussianDDPMScheduler.from_config(ddim.config),
        copy.deepcopy(scheduler),
    ]
    x_t = randn(2, 3)
    for other in copies:
        assert torch.equal(other.x_0_mse, scheduler.x_0_mse)
        for s in (other, scheduler):
            s.set_timesteps(7)
        t = scheduler.timesteps[3]
        step = scheduler.step(x_t, t, x_t, variance_noise=x_t).prev_sample
        assert torch.equal(other.step(x_t, t, x_t, variance_noise=x_t).prev_sample, step)
    saved = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    own = saved.pop("_ddpm_hf")
    assert own["x_0_mse"] == scheduler.x_0_mse.tolist()
    plain = GaussianDDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    assert saved == json.loads(plain.to_json_string())


@pytest.mark.parametrize(
    "change", [{"beta_end": 0.03}, {"prediction_type": "sample"}, {"num_train_timesteps": 500}]
)
@pytest.mark.parametrize("schedule", ["linear", "iddpm_linear"])
def test_changing_betas_or_prediction_type_drops_the_curve_with_a_warning(schedule, change):
    config = calibrated(beta_schedule=schedule).config
    with pytest.warns(UserWarning, match="made for other betas or another prediction type"):
        assert GaussianDDPMScheduler.from_config(config, **change).x_0_mse is None


def test_an_explicit_curve_overrides_that_of_the_configuration():
    config = calibrated(beta_schedule="iddpm_linear").config
    other = GaussianDDPMScheduler.from_config(config, x_0_mse=np.ones(T))
    assert torch.equal(other.x_0_mse, torch.ones(T).double())
    without = GaussianDDPMScheduler.from_config(config, x_0_mse=None)
    assert without.x_0_mse is None
    assert "iddpm_linear" in repr(without)
    kept = GaussianDDPMScheduler.from_config(config, variance_type="fixed_large")
    assert torch.equal(kept.x_0_mse, torch.from_numpy(EXACT_MSE))


BAD_CURVES = {
    "wrong number": (np.ones(3), ValueError, r"have shape \(1000,\), .* got shape \(3,\)"),
    "negative": (np.where(np.arange(T) == 7, -1, 1.0), ValueError, r"got -1.0 at t=7"),
    "NaN": (np.where(np.arange(T) == 5, np.nan, 1.0), ValueError, r"finite .* got nan at t=5"),
    "text": ("0.1", TypeError, "list of numbers, got '0.1'"),
}


@pytest.mark.parametrize("case", BAD_CURVES)
def test_an_invalid_curve_is_rejected_and_in_a_file_ignored_with_a_warning(case):
    curve, error, message = BAD_CURVES[case]
    with pytest.raises(error, match=f"`x_0_mse` must .*{message}"):
        GaussianDDPMScheduler(x_0_mse=curve)
    config = dict(calibrated(beta_schedule="iddpm_linear").config)
    curve = curve.tolist() if hasattr(curve, "tolist") else curve
    config["_ddpm_hf"] = {**config["_ddpm_hf"], "x_0_mse": curve}
    with pytest.warns(
        UserWarning, match=f"x_0_mse in `_ddpm_hf` .* is ignored: `x_0_mse` must .*{message}"
    ):
        scheduler = GaussianDDPMScheduler.from_config(config)
    assert scheduler.x_0_mse is None
    assert "iddpm_linear" in repr(scheduler)


# Measuring -----------------------------------------------------------------------------------


def levels(number, seed=0):
    """8-bit images of 2x2."""
    pixels = torch.randint(0, 256, (number, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
    return pixels.double() / 127.5 - 1


def halve(x_t, t):
    """A network for fixed variances."""
    return x_t / 2


def halve_and_guess(x_t, t):
    return torch.cat([x_t / 2, x_t.tanh()], 1)


def generators(number):
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def short_chain(**config):
    return GaussianDDPMScheduler(20, beta_end=0.5, timestep_spacing="linspace", **config)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_curve_predicts_the_bound_exactly_for_the_same_noise(variance_type):
    scheduler, images = short_chain(variance_type=variance_type), levels(30)
    result = calibrate(halve, scheduler, images, generator=generators(30))
    assert scheduler.x_0_mse is None
    # Published variances: the bound measured for the curve.
    chain, predicted = result.measured, result.bits_per_dim(published=True)
    assert torch.equal(predicted.timesteps, chain.timesteps)
    assert_close(predicted.terms[:-1], chain.terms[:, :-1].mean(0), rtol=1e-12, atol=0)
    assert predicted.prior == pytest.approx(chain.prior.mean().item(), rel=1e-12)
    each = chain.prior + chain.terms[:, :-1].sum(1) + result.decoder
    constant = predicted.terms.sum() + predicted.prior - each.mean()
    assert constant.item() == pytest.approx(0, abs=1e-12)
    # The standard error is over the bounds of the images.
    assert predicted.standard_error == pytest.approx(each.std().item() / 30**0.5, rel=1e-12)
    # Calibrated variances: the bound of all steps with the same noise.
    again = bits_per_dim(halve, result.scheduler, images, generator=generators(30))
    predicted = result.bits_per_dim()
    assert_close(predicted.terms[:-1], again.terms[:, :-1].mean(0), rtol=1e-12, atol=0)
    gain = again.snr[1:] - again.snr[:-1]
    expected = (gain * again.x_0_mse[:-1]).log1p() / 2 / math.log(2)
    assert_close(predicted.terms[:-1], expected, rtol=1e-12, atol=0)
    assert predicted.value < result.bits_per_dim(published=True).value


def test_one_image_gives_a_curve_without_standard_errors():
    result = calibrate(halve, short_chain(), levels(1))
    assert result.standard_error.isnan().all()
    assert result.x_0_mse.isfinite().all()
    with pytest.raises(ValueError, match="at least 2 images"):
        result.num_images_for()


def test_the_standard_error_of_the_curve_is_that_of_a_mean_over_images():
    """By the jackknife: the spread of the means that leave out one image."""
    result = calibrate(halve, short_chain(), levels(30), generator=generators(30))
    without_one = (result.errors.sum(0) - result.errors) / 29
    variance = (without_one - without_one.mean(0)).square().sum(0) * 29 / 30
    assert_close(result.standard_error, variance.sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("num_errors", "is_significant"), [(3, False), (5, True)])
def test_an_error_that_falls_is_a_sign_of_a_mismatch_only_beyond_chance(num_errors, is_significant):
    """The error at t = 10 is below the smallest one without a mismatch by some standard errors."""
    result = calibrate(halve, short_chain(), levels(2), generator=generators(2))
    errors = torch.ones(100, 20, dtype=torch.float64)
    spread = torch.tensor([0.1, -0.1], dtype=torch.float64).repeat(50)
    errors[:, 10] = calibration._SMALLEST_ERROR_RATIO + spread - num_errors * 0.1 / math.sqrt(99)
    doubted = dataclasses.replace(
        result, errors=errors, x_0_mse=errors.mean(0), x_0_square=torch.full((100,), 1e6)
    )
    assert any("falls" in doubt for doubt in doubted.mismatch_warnings()) == is_significant


def test_the_curve_predicts_the_bound_of_other_noise_within_standard_errors():
    images = levels(400)
    result = calibrate(halve, short_chain(), images, generator=torch.Generator().manual_seed(1))
    other = bits_per_dim(
        halve, result.scheduler, images, num_inference_steps=5, generator=generators(400)
    )
    predicted = result.bits_per_dim(5)
    assert predicted.timesteps.tolist() == other.timesteps.tolist() == [19, 14, 10, 5, 0]
    # 3 standard errors; conservative, because the images are the same.
    error = math.hypot(predicted.standard_error, other.standard_error)
    assert abs(predicted.value - other.mean) < 3 * error
    # The curve of half of the images differs as its standard error predicts, at every t.
    part = calibrate(halve, short_chain(), images[:200], generator=generators(200))
    z = (part.x_0_mse - result.x_0_mse) / part.standard_error
    assert z.abs().max() < 4


@pytest.mark.parametrize("network", [halve, halve_and_guess])
def test_calibration_does_not_depend_on_batches(network):
    kind = "fixed_small" if network is halve else "learned_range"
    scheduler, images = short_chain(variance_type=kind), levels(5)
    whole = calibrate(network, scheduler, images, generator=generators(5))
    for other in (
        calibrate(network, scheduler, images, generator=generators(5), batch_size=2),
        calibrate(network, scheduler, list(images.split([1, 4])), generator=generators(5)),
        calibrate(network, whole.scheduler, images, generator=generators(5)),
    ):
        for name in ("x_0_mse", "standard_error", "errors", "decoder"):
            assert torch.equal(getattr(other, name), getattr(whole, name))
        assert torch.equal(other.scheduler.x_0_mse, other.x_0_mse)


def test_bounds_that_the_curve_does_not_determine_are_rejected():
    images = levels(3)
    with pytest.raises(TypeError, match=r"`images` must be .* read twice, .* got generator"):
        calibrate(halve, short_chain(), (batch for batch in images.split(1)))
    result = calibrate(halve_and_guess, short_chain(variance_type="learned"), images)
    with pytest.raises(ValueError, match=r"`published` must be False .*'learned'"):
        result.bits_per_dim(5, published=True)
    with pytest.raises(ValueError, match=r"`timesteps` must end at 0, .* got 3"):
        result.bits_per_dim(timesteps=[19, 3])


def test_apply_gives_a_pipeline_the_calibrated_scheduler():
    result = calibrate(halve, short_chain(), levels(5), generator=generators(5))
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = GaussianDDPMPipeline(unet=unet, scheduler=short_chain())
    assert result.apply(pipeline) is pipeline
    assert torch.equal(pipeline.scheduler.x_0_mse, result.x_0_mse)
    pipeline.scheduler.set_timesteps(3)
    assert len(result.scheduler.timesteps) == 20


# Timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [2, 3, 4, 6, 9])
def test_the_timesteps_with_the_lowest_bound_equal_brute_force(num_steps, seed):
    rng = np.random.default_rng(seed)
    mse = np.sort(rng.random(9)) if seed else np.zeros(9)  # with mse 0 all paths are equal
    scheduler = GaussianDDPMScheduler(9, beta_end=0.8, x_0_mse=mse, clip_sample=False)
    bar = (1 - np.linspace(1e-4, 0.8, 9)).cumprod()
    snr = bar / (1 - bar)
    cost = lambda path: sum(  # noqa: E731
        math.log1p((snr[s] - snr[t]) * mse[t]) for s, t in itertools.pairwise(path)
    )
    paths = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), num_steps - 2)]
    scheduler.set_timesteps(num_steps, timestep_spacing="likelihood")
    assert scheduler.timesteps.flip(0).tolist() == list(min(paths, key=cost))


def test_the_timesteps_with_the_lowest_bound_need_a_curve_and_two_steps():
    plain = GaussianDDPMScheduler()
    scheduler = GaussianDDPMScheduler(50, beta_schedule="iddpm_linear", x_0_mse=np.ones(50))
    with pytest.raises(ValueError, match="'likelihood' needs a calibrated scheduler"):
        plain.set_timesteps(10, timestep_spacing="likelihood")
    with pytest.raises(
        ValueError, match=r"`num_inference_steps` must be an int in \[2, 50\], got 1"
    ):
        scheduler.set_timesteps(1, timestep_spacing="likelihood")
    scheduler.set_timesteps(50, timestep_spacing="likelihood")
    assert torch.equal(scheduler.timesteps, torch.arange(49, -1, -1))


def mixture_network(scheduler):
    """The exact eps network for an even mixture of two normals."""

    def predict(x_t, t):
        a = scheduler.snr(int(t[0]), torch.float64)
        a = float(a / (1 + a))
        x_0 = mean_of_mixture(x_t, a, **MIXTURE)
        return (x_t - a**0.5 * x_0) / (1 - a) ** 0.5

    return predict


def sampled(network, sampler, noise):
    """Sample from this noise with a sampler of diffusers or ours."""
    x = noise
    options = {"eta": 0.0} if isinstance(sampler, GaussianDDPMScheduler) else {}
    for t in sampler.timesteps:
        x = sampler.step(network(x, t[None]), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_matching_timesteps_end_nearer_to_the_fine_trajectory_than_even_ones(sampler):
    ours = GaussianDDPMScheduler(100, beta_schedule="iddpm_linear", clip_sample=False)
    network, noise = mixture_network(ours), randn(64, 1, 2, 2)
    timesteps = trajectory_matching_timesteps(
        network, ours, noise, sampler=sampler, max_num_steps=20, num_fine_steps=20
    )
    assert list(timesteps) == list(range(5, 21))
    assert timesteps[20] == list(range(99, 0, -5))
    assert all(steps[0] == 99 and len(steps) == K for K, steps in timesteps.items())
    if sampler == "DDIM":
        other = GaussianDDPMScheduler.from_config(ours.config)
    else:
        other = DPMSolverMultistepScheduler.from_config(ours.config)

    def ends_at(steps):
        other.set_timesteps(timesteps=steps)
        return sampled(network, other, randn(64, 1, 2, 2, seed=1))

    fine = ends_at(timesteps[20])
    for K in (5, 7, 10):
        even = trailing(K, 100)[::-1].tolist()
        errors = [(ends_at(steps) - fine).square().mean() for steps in (timesteps[K], even)]
        assert errors[0] < 0.8 * errors[1]


RECOMMENDED = {"scheduler": "DDIM:timestep_spacing=trailing", "num_inference_steps": 25}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"scheduler": "DDIM", "num_inference_steps": 101}, ValueError),
        ({"scheduler": "DDIM", "num_inference_steps": "25"}, TypeError),
        ({"scheduler": 3, "num_inference_steps": 25}, TypeError),
        ({"num_inference_steps": 25}, TypeError),
        ("DDIM", TypeError),
    ],
)
def test_an_invalid_recommendation_is_rejected(given, error):
    with pytest.raises(error, match=r"recommended|num_inference_steps"):
        GaussianDDPMScheduler(100, beta_schedule="iddpm_linear", recommended=given)


def test_calibrated_timesteps_are_saved_with_the_scheduler(tmp_path):
    found = {"DDIM": {5: [99, 60, 30, 10, 2]}, "DPM-Solver++ 2M": {6: [99, 60, 30, 10, 5, 2]}}
    scheduler = GaussianDDPMScheduler(
        100,
        beta_schedule="iddpm_linear",
        calibrated_timesteps=found,
        x_0_mse=np.ones(100),
        recommended=RECOMMENDED,
    )
    scheduler.save_pretrained(tmp_path)
    DDPMScheduler.from_pretrained(tmp_path).save_pretrained(tmp_path)
    other = GaussianDDPMScheduler.from_pretrained(tmp_path)
    assert other.calibrated_timesteps == found
    assert other.recommended == RECOMMENDED
    other.set_timesteps(5, timestep_spacing="calibrated")
    assert other.timesteps.tolist() == found["DDIM"][5]
    with pytest.raises(
        ValueError,
        match=r"`num_inference_steps` must be an int in \[5, 5\] for .*calibrated.*, got 6",
    ):
        other.set_timesteps(6, timestep_spacing="calibrated")
    without = GaussianDDPMScheduler.from_config(other.config, calibrated_timesteps=None)
    assert without.calibrated_timesteps == {}
    assert torch.equal(without.x_0_mse, other.x_0_mse)
    assert without.recommended == RECOMMENDED
    with pytest.warns(UserWarning, match="made for other betas"):
        changed = GaussianDDPMScheduler.from_config(other.config, prediction_type="v_prediction")
    assert changed.recommended is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([9, 5], TypeError, "by sampler and number"),
        ({"DDIM": {2: [9, 20]}}, ValueError, "strictly descending"),
        ({"DDIM": {"3": [9, 5]}}, ValueError, "must have 3 timesteps"),
        ({"DDIM": {"2": [100, 5]}}, ValueError, r"\[0, 99\]"),
    ],
)
def test_invalid_calibrated_timesteps_are_rejected(given, error, message):
    with pytest.raises(error, match=message):
        GaussianDDPMScheduler(100, beta_schedule="iddpm_linear", calibrated_timesteps=given)
