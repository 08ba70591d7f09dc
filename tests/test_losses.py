"""Losses, weightings and timestep samplers, against formulas written out in float64."""

import functools
import math

import pytest
import torch
from oracles import randn
from torch.testing import assert_close

from ddpm_hf import GaussianDDPMScheduler, bits_per_dim
from ddpm_hf.decoders import DECODERS
from ddpm_hf.losses import hybrid_loss, simple_loss, vlb_loss, vlb_term
from ddpm_hf.randomness import seed_of, timestep_generator
from ddpm_hf.timestep_samplers import (
    TIMESTEP_SAMPLERS,
    AsymmetricTimesteps,
    LossSecondMomentTimesteps,
    LowDiscrepancyTimesteps,
    UniformTimesteps,
)
from ddpm_hf.weightings import P2, WEIGHTINGS, MinSNR, TruncatedSNR

STEPS = torch.tensor([0, 3, 500, 999])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    return x_0, noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_simple_loss_is_the_unweighted_mean_squared_error_of_the_prediction(batch, prediction_type):
    x_0, noise = batch
    scheduler = GaussianDDPMScheduler(prediction_type=prediction_type)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[STEPS].view(-1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    target = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
    }[prediction_type]
    want = (x_t * 0.7 - target).square().mean(dim=(1, 2))

    got = simple_loss(lambda x, t: x * 0.7, scheduler, x_0, STEPS, noise)

    assert got.shape == (4,)
    # float64 throughout; the two routes to alpha_bar differ by rounding of a 1000-term product.
    assert_close(got, want, rtol=1e-10, atol=0)


def test_a_denoiser_may_return_an_object_with_a_sample_attribute(batch):
    x_0, noise = batch

    class Output:
        def __init__(self, sample):
            self.sample = sample

    scheduler = GaussianDDPMScheduler()
    plain = simple_loss(lambda x, t: x, scheduler, x_0, STEPS, noise)
    wrapped = simple_loss(lambda x, t: Output(x), scheduler, x_0, STEPS, noise)
    assert torch.equal(plain, wrapped)


def test_a_half_precision_prediction_is_compared_in_float32(batch):
    x_0, noise = (x.float() for x in batch)
    scheduler = GaussianDDPMScheduler()
    prediction = noise.half() + 2**-10
    want = (prediction.float() - noise).square().mean(dim=(1, 2))
    got = simple_loss(lambda x, t: prediction, scheduler, x_0, STEPS, noise)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("loss", [simple_loss, vlb_loss, hybrid_loss])
def test_an_empty_batch_has_no_losses(loss):
    x_0, t = torch.zeros(0, 1, 2), torch.zeros(0, dtype=torch.int64)
    assert loss(lambda x, t: x, GaussianDDPMScheduler(), x_0, t, x_0).shape == (0,)


def test_a_prediction_of_another_shape_is_rejected_instead_of_broadcast(batch):
    x_0, noise = batch
    with pytest.raises(ValueError, match=r"must return .* \(4, 2, 3\).* got \(4, 1, 3\)"):
        simple_loss(lambda x, t: x[:, :1], GaussianDDPMScheduler(), x_0, STEPS, noise)


PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned", "learned_range"]


def make_scheduler(prediction_type="epsilon", variance_type="learned_range", **config):
    config = {"clip_sample": False, "num_train_timesteps": 50, "beta_end": 0.2, **config}
    return GaussianDDPMScheduler(
        prediction_type=prediction_type, variance_type=variance_type, **config
    )


def levels(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator).double() / 127.5 - 1


def make_output(scheduler, x_0, seed=3):
    """An output with the right number of channels and a realistic log-variance."""
    prediction = randn(*x_0.shape, seed=seed)
    if not scheduler.config.variance_type.startswith("learned"):
        return prediction
    extra = randn(*x_0.shape, seed=seed + 1) / 2
    return torch.cat([prediction, extra - 5 * (scheduler.config.variance_type == "learned")], 1)


@pytest.mark.parametrize("loss", [vlb_term, vlb_loss, hybrid_loss])
def test_a_bound_names_its_argument_in_errors_of_samples(loss, batch):
    x_0, noise = batch
    with pytest.raises(ValueError, match=r"^`x_0` .* must be on the 8-bit grid"):
        loss(lambda x, t: x, GaussianDDPMScheduler(), x_0, STEPS, noise)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_simple_loss_with_learned_variance_uses_the_first_half_of_the_channels(variance_type):
    x_0, noise, t = levels(2, 3, 2), randn(2, 3, 2), torch.tensor([4, 40])
    scheduler = make_scheduler(variance_type=variance_type)
    output = make_output(scheduler, x_0)
    got = simple_loss(lambda x_t, t: output, scheduler, x_0, t, noise)
    assert_close(got, (output[:, :3] - noise).square().mean(dim=(1, 2)))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 2\) .* 'learned.*', got \(2, 3, 2\)"):
        simple_loss(lambda x_t, t: noise, scheduler, x_0, t, noise)


LOSSES = {
    "simple": simple_loss,
    **{name: functools.partial(vlb_loss, decoder=name) for name in DECODERS},
}


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_losses_match_finite_differences(loss, prediction_type, variance_type):
    scheduler = make_scheduler(prediction_type, variance_type)
    x_0, noise, t = levels(3, 2, 2), randn(3, 2, 2), torch.tensor([0, 1, 49])
    output = make_output(scheduler, x_0)

    def of_output(output):
        return LOSSES[loss](lambda x_t, t: output, scheduler, x_0, t, noise)

    assert torch.autograd.gradcheck(of_output, output.requires_grad_(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_hybrid_loss_trains_the_mean_with_l_simple_and_the_variance_with_the_bound(
    variance_type, prediction_type
):
    scheduler = make_scheduler(prediction_type, variance_type)
    x_0, noise, t = levels(3, 2, 2), randn(3, 2, 2), torch.tensor([0, 1, 49])
    output = make_output(scheduler, x_0).requires_grad_()
    calls = []

    def denoiser(x_t, t):
        calls.append(t)
        return output

    def gradient(loss, **options):
        values = loss(denoiser, scheduler, x_0, t, noise, **options)
        return values.detach(), torch.autograd.grad(values.sum(), output)[0]

    simple, of_simple = gradient(simple_loss, weighting=MinSNR())
    vlb, of_vlb = gradient(vlb_loss)
    calls.clear()
    hybrid, of_hybrid = gradient(hybrid_loss, vlb_weight=0.01, weighting=MinSNR())
    assert len(calls) == 1
    assert_close(hybrid, simple + 0.01 * vlb, rtol=1e-14, atol=0)
    assert_close(of_hybrid[:, :2], of_simple[:, :2], rtol=1e-14, atol=0)
    assert_close(of_hybrid[:, 2:], 0.01 * of_vlb[:, 2:], rtol=1e-14, atol=0)
    if variance_type.startswith("learned"):
        assert (of_hybrid[:, 2:] != 0).all()


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_vlb_terms_equal_the_terms_of_bits_per_dim(variance_type):
    scheduler = make_scheduler(variance_type=variance_type, clip_sample=True)
    scheduler.set_timesteps(timesteps=[49, 30, 12, 3])
    x_0 = levels(1, 2, 2)
    output = make_output(scheduler, x_0)
    bound = bits_per_dim(
        lambda x_t, t: output,
        scheduler,
        x_0,
        timesteps=[49, 30, 12, 3],
        generator=torch.Generator().manual_seed(1),
    )
    draw = torch.Generator().manual_seed(1)
    noise = torch.cat([torch.randn(1, 2, 2, generator=draw, dtype=torch.float64) for _ in range(4)])
    call = lambda x_t, t: output.expand(4, -1, 2)  # noqa: E731
    args = (call, scheduler, x_0.expand(4, 2, 2), scheduler.timesteps, noise)
    assert_close(vlb_term(*args), bound.terms[0], rtol=1e-12, atol=0)
    assert_close(vlb_loss(*args).mean(), bound.terms.sum(), rtol=1e-12, atol=0)
    # Clipping is active at large t and stops the gradient of the mean there.
    free = vlb_term(*args, clip=False)
    assert (free[:2] > bound.terms[0, :2]).all()
    reaches = {}
    for clip in (True, False):
        leaf = output.clone().requires_grad_()
        call = lambda x_t, t, leaf=leaf: leaf.expand(4, -1, 2)  # noqa: E731
        term = vlb_term(call, *args[1:], clip=clip)[0]
        reaches[clip] = torch.autograd.grad(term, leaf)[0][:, :2].count_nonzero().item()
    assert reaches[True] < reaches[False] == 4


def test_gradients_are_finite_at_every_t():
    """The decoder is computed for all rows, also those where its result is not used."""
    scheduler = GaussianDDPMScheduler(variance_type="learned", clip_sample=False)
    x_0 = levels(1000, 1, 2).float()
    output = torch.cat([x_0 * 1e3, torch.full_like(x_0, -40.0)], 1).requires_grad_()
    t, noise = torch.arange(1000), torch.zeros_like(x_0)
    losses = vlb_loss(lambda x_t, t: output, scheduler, x_0, t, noise)
    losses.clamp(max=1e30).sum().backward()
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_terms_of_unclipped_estimates_are_finite_where_the_square_of_x_0_overflows(variance_type):
    """x_0_hat is up to 1e26 here; (SNR_s - SNR_t) (x_0 - x_0_hat)^2 is written in terms of eps."""
    scheduler = GaussianDDPMScheduler(num_train_timesteps=12_000, variance_type=variance_type)
    log_alpha = torch.log1p(-torch.linspace(1e-4, 0.02, 12_000, dtype=torch.float64))
    t = torch.tensor([11_999, 11_000, 9_000])
    log_snr = log_alpha.cumsum(0) - (-log_alpha.cumsum(0).expm1()).log()
    want = (log_snr[t - 1] - log_snr[t]).expm1() * 0.5**2 / 2 / math.log(2)
    x_0, noise = levels(3, 1, 2).float(), randn(3, 1, 2).float()
    channels = (
        [noise + 0.5] if variance_type == "fixed_small" else [noise + 0.5, -torch.ones(3, 1, 2)]
    )
    output = torch.cat(channels, 1).requires_grad_()

    got = vlb_term(lambda x_t, t: output, scheduler, x_0, t, noise, clip=False)
    got.sum().backward()

    # x_0_hat has an error of a few units in the last place, next to a difference of 0.5.
    assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert output.grad.isfinite().all()


# Weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [MinSNR(5), MinSNR(0.5), P2(0.7, 2), TruncatedSNR()])
def test_a_weighted_loss_does_not_depend_on_the_prediction_type(weighting):
    """The same wrong x_0, expressed as eps, x_0 and v."""
    x_0, noise, t = levels(4, 2, 2), randn(4, 2, 2), torch.tensor([0, 10, 30, 49])
    x_0_hat = x_0 + randn(4, 2, 2, seed=5) / 3
    losses = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = make_scheduler(prediction_type, "fixed_small")
        betas = torch.linspace(1e-4, 0.2, 50, dtype=torch.float64)
        a = (1 - betas).cumprod(0)[t].view(-1, 1, 1)
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        eps_hat = (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt()
        output = {
            "epsilon": eps_hat,
            "sample": x_0_hat,
            "v_prediction": a.sqrt() * eps_hat - (1 - a).sqrt() * x_0_hat,
        }[prediction_type]
        losses.append(
            simple_loss(lambda x, t, o=output: o, scheduler, x_0, t, noise, weighting=weighting)
        )
    snr = (a / (1 - a)).flatten()
    want = weighting.of_x_0(snr) * (x_0_hat - x_0).square().mean(dim=(1, 2))
    for loss in losses:
        # Differences of nearly equal predictions lose a few of the 16 digits.
        assert_close(loss, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("weighting", "of_eps"),
    [
        (MinSNR(5), lambda snr: min(snr, 5) / snr),  # 2303.09556
        (P2(1, 1), lambda snr: 1 / (1 + snr)),  # 2204.00227
        (TruncatedSNR(), lambda snr: max(1, snr) / snr),  # 2202.00512
    ],
)
def test_weights_for_eps_equal_those_of_the_papers(weighting, of_eps):
    t = torch.arange(0, 1000, 111)
    got = weighting(GaussianDDPMScheduler(), t, torch.float64)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t]
    want = [of_eps(snr) for snr in (alpha_bar / (1 - alpha_bar)).tolist()]
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", [MinSNR(), P2(), TruncatedSNR()])
def test_weights_for_eps_are_finite_where_the_snr_underflows(weighting):
    """alpha_bar ends at 3e-53; the limits of the weights are 1, 1 and 1 / SNR."""
    scheduler = GaussianDDPMScheduler(num_train_timesteps=12_000)
    weight = weighting(scheduler, torch.tensor([11_999]))
    assert weight.isfinite().all()
    assert weight >= 1


def test_weights_are_finite_at_zero_snr():
    scheduler = make_scheduler(
        "v_prediction", "fixed_small", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    t = torch.tensor([0, 49])
    for weighting in filter(None, WEIGHTINGS.values()):
        assert weighting(scheduler, t).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0), "`gamma` must be positive, got 0"),
        (lambda: P2(k=0), "`k` must be positive, got 0"),
        (lambda: P2(gamma=-1), "`gamma` must be at least 0, got -1"),
    ],
)
def test_invalid_parameters_of_weightings_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Timesteps -------------------------------------------------------------------------------------


def test_uniform_timesteps_equal_those_of_earlier_releases():
    generator = timestep_generator(3, 7, torch.device("cpu"))
    t, weights = UniformTimesteps(1000).sample(8, generator)
    before = torch.Generator().manual_seed(seed_of(3, "timesteps", 7))
    assert torch.equal(t, torch.randint(1000, (8,), generator=before))
    assert torch.equal(weights, torch.ones(8))


@pytest.mark.parametrize("num_train_timesteps", [7, 1000])
def test_low_discrepancy_timesteps_are_evenly_spaced_and_uniform(num_train_timesteps):
    T, generator = num_train_timesteps, torch.Generator().manual_seed(0)
    sampler = LowDiscrepancyTimesteps(T)
    drawn = torch.stack([sampler.sample(16, generator)[0] for _ in range(1000)])
    # One timestep in each sixteenth of [0, T), with rounding at the edges.
    gaps = drawn.sort(1).values.diff(dim=1)
    assert (gaps - T / 16).abs().max() <= 1
    # Row by row: mean of 1,000 uniform numbers, 4 standard errors.
    assert (drawn.double().mean(0) - (T - 1) / 2).abs().max() < 4 * T / 12**0.5 / 1000**0.5
    counts = drawn.flatten().bincount(minlength=T)
    assert len(counts) == T
    assert drawn.min() == 0


@pytest.mark.parametrize("num_train_timesteps", [1, 10, 1000])
def test_asymmetric_timesteps_are_five_times_as_frequent_in_the_first_seven_tenths(
    num_train_timesteps,
):
    T, N, generator = num_train_timesteps, 500_000, torch.Generator().manual_seed(0)
    t, weights = AsymmetricTimesteps(T).sample(N, generator)
    assert (weights == 1).all()
    counts = t.bincount(minlength=T)
    assert len(counts) == T
    tau = round(0.7 * T)
    expected = torch.tensor([5.0] * tau + [1.0] * (T - tau), dtype=torch.float64)
    expected *= N / expected.sum()
    # Each count is Poisson distributed; 5 standard deviations.
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def importance_sampler(T=20, history_size=3):
    """An importance sampler with a history of losses 1, 2, ..., T for t = 0, 1, ..."""
    sampler = LossSecondMomentTimesteps(T, history_size=history_size, uniform_probability=0.1)
    for _ in range(history_size):
        sampler.update(torch.arange(T), torch.arange(T) + 1.0)
    return sampler


def test_importance_sampling_is_uniform_until_every_t_has_a_history():
    sampler = LossSecondMomentTimesteps(4, history_size=2)
    sampler.update(torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.ones(7))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    sampler.update(torch.tensor([3]), torch.tensor([8.0]))
    assert sampler.probabilities()[3] > 0.25


def test_importance_sampling_uses_the_second_moment_of_the_latest_losses():
    sampler = LossSecondMomentTimesteps(2, history_size=2, uniform_probability=0.1)
    # The first of three losses at t = 0 is dropped, and NaN is ignored.
    sampler.update(
        torch.tensor([0, 0, 1, 0, 1, 1]), torch.tensor([99.0, 3.0, 1.0, 4.0, math.nan, 1.0])
    )
    root = math.sqrt((9 + 16) / 2)
    want = 0.9 * root / (root + 1) + 0.05
    assert sampler.probabilities().tolist() == pytest.approx([want, 1 - want])


def test_importance_sampling_with_its_weights_is_unbiased():
    sampler, generator = importance_sampler(), torch.Generator().manual_seed(0)
    p = sampler.probabilities()
    assert_close(p, 0.9 * (torch.arange(20) + 1).double() / 210 + 0.005)
    t, weights = sampler.sample(20_000, generator)
    counts = t.bincount(minlength=20)
    assert ((counts - 20_000 * p).abs() < 4 * (20_000 * p).sqrt()).all()
    assert torch.equal(weights, (1 / (20 * p[t])).float())
    # Estimates the mean of any function over uniform t, here of t itself.
    estimate = weights.double() * t
    assert abs(estimate.mean() - 9.5) < 4 * estimate.std() / 20_000**0.5


def test_a_sampler_resumes_from_its_state():
    sampler, other = importance_sampler(), LossSecondMomentTimesteps(20, 3, 0.1)
    other.load_state_dict({name: x.clone() for name, x in sampler.state_dict().items()})
    draws = [s.sample(50, torch.Generator().manual_seed(1))[0] for s in (sampler, other)]
    assert torch.equal(*draws)
    assert UniformTimesteps(20).state_dict() == {}
    with pytest.raises(ValueError, match="must be a state of LossSecondMomentTimesteps"):
        LossSecondMomentTimesteps(21, 3).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="must be a state of UniformTimesteps"):
        UniformTimesteps(20).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_samplers_stay_in_range_and_declare_whether_they_need_losses(name):
    sampler = TIMESTEP_SAMPLERS[name](3)
    t, weights = sampler.sample(500, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert sorted(set(t.tolist())) == [0, 1, 2]
    assert weights.shape == (500,)
    assert weights.dtype == torch.float32
    assert sampler.needs_losses == bool(sampler.state_dict())
    with pytest.raises(ValueError, match="`num_train_timesteps` must be at least 1, got 0"):
        TIMESTEP_SAMPLERS[name](0)


@pytest.mark.parametrize("arguments", [(20, 0), (20, 10, 0.0)])
def test_importance_sampling_needs_a_history_and_a_uniform_share(arguments):
    with pytest.raises(ValueError, match="`history_size` must be at least 1"):
        LossSecondMomentTimesteps(*arguments)
