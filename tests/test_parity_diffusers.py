"""Parity with `diffusers.DDPMScheduler`, and the intended differences.

Each intended difference has a test that stock diffusers fails:
- fixed_large_log: stock takes the root of a log and samples NaN (huggingface/diffusers#14569).
- learned: stock takes the root of the network output, which the papers define as a log-variance.
- an unknown variance_type: stock samples as with fixed_small.
- trailing: at 62 numbers of steps stock visits t = -1, which wraps to the noisiest alpha_bar.
- last step: stock adds noise if the last timestep is not 0.
- leading with an offset: stock exceeds the range (huggingface/diffusers#10003).
- half precision: stock rounds alpha_bar to the dtype of the sample, and keeps x_t in that dtype.
- zero terminal SNR with epsilon: stock divides by zero.
- tables: stock computes 1 - alpha_bar and beta in float32, with relative errors of up to 1e-3.
- one generator per image: equal results, but stock accepts a list of any length.
"""

import itertools
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from oracles import (
    alpha_bars,
    betas_of_alpha_bar,
    cosine_betas,
    geodiff_sigmoid_betas,
    linear_betas,
    randn,
    relative_error,
    scaled_linear_betas,
    to_float64,
)
from processes import run_forked
from torch.testing import assert_close

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

T = 1000
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
SPACINGS = ["leading", "linspace", "trailing"]
CLIPS = [
    {"clip_sample": True},
    {"clip_sample": False},
    {"thresholding": True, "sample_max_value": 1.5},
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`timestep_spacing`",
    "ignore:.*signal amplitude at the last",
    "ignore:__array",  # diffusers with NumPy 2
)


def stock_laplace_betas(T):
    """Formula of diffusers, with its square root, in 40 digits."""
    from mpmath import exp, log, mpf, sqrt

    def alpha_bar(t):
        half = mpf(1) / 2
        sign = 1 if t <= half else -1
        snr = exp(-half * sign * log(1 - 2 * abs(half - t) + mpf(1e-6)))
        return sqrt(snr / (1 + snr))

    return betas_of_alpha_bar(alpha_bar, T)


EXACT_BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": geodiff_sigmoid_betas,
    "laplace": stock_laplace_betas,
}


def relative(ours, stock):
    """Largest difference relative to the largest value, because single pixels may cancel."""
    return ((ours - stock).abs().max() / stock.abs().max()).item()


def worst_step(ours, stock, steps=(0, 1, 3, 8)):
    """Largest error along ten steps with equal generators; the last only if stock adds no noise."""
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    assert torch.equal(ours.timesteps, stock.timesteps)
    channels = 4 if ours.config.variance_type == "learned_range" else 2
    last = [9] if stock.timesteps[-1] == 0 else []
    errors = []
    for i in (*steps, *last):
        t, x = stock.timesteps[i], randn(2, 2, 8, 8, seed=i, dtype=torch.float32)
        output = randn(2, channels, 8, 8, seed=99, dtype=torch.float32)
        a, b = (s.step(output, t, x, torch.Generator().manual_seed(i)) for s in (ours, stock))
        errors.append(relative(a.prev_sample, b.prev_sample))
        # For epsilon, x_0 is a difference of terms of this size, before clipping.
        terms = (
            x / stock.alphas_cumprod[t] ** 0.5 if stock.config.prediction_type == "epsilon" else x
        )
        difference = (a.pred_original_sample - b.pred_original_sample).abs().max()
        errors.append((difference / terms.abs().max()).item())
    return max(errors)


MATRIX = list(itertools.product(PREDICTIONS, VARIANCES, SPACINGS, CLIPS))


def config_of(schedule, prediction, variance, spacing, clip):
    return {
        "beta_schedule": schedule,
        "prediction_type": prediction,
        "variance_type": variance,
        "timestep_spacing": spacing,
        **clip,
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_equal_stock_on_exact_tables_and_are_close_to_stock_on_its_tables(schedule):
    exact = torch.from_numpy(to_float64(alpha_bars(EXACT_BETAS[schedule](T))))
    for values in MATRIX:
        config = config_of(schedule, *values)
        ours, stock = GaussianDDPMScheduler(**config), DDPMScheduler(**config)
        assert worst_step(ours, stock) < 1e-3, config  # precision of its float32 tables
        stock.alphas_cumprod = exact
        # Both round about ten times; stock subtracts before dividing, ours after.
        assert worst_step(ours, stock) < 2e-6, config


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_equal_stock_on_exact_tables_in_a_sample_of_the_matrix(schedule, prediction):
    exact = torch.from_numpy(to_float64(alpha_bars(EXACT_BETAS[schedule](T))))
    for variance, spacing, clip in zip(
        VARIANCES, [*SPACINGS, "leading"], [*CLIPS, {}], strict=True
    ):
        config = config_of(schedule, prediction, variance, spacing, clip)
        stock = DDPMScheduler(**config)
        stock.alphas_cumprod = exact
        assert worst_step(GaussianDDPMScheduler(**config), stock) < 2e-6, config


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_and_velocity_equal_stock(schedule):
    ours = GaussianDDPMScheduler(beta_schedule=schedule)
    stock = DDPMScheduler(beta_schedule=schedule)
    stock.alphas_cumprod = torch.from_numpy(
        to_float64(alpha_bars(EXACT_BETAS[schedule](T)))
    ).float()
    x, noise = (randn(500, 2, 3, seed=s, dtype=torch.float32) for s in (0, 1))
    t = torch.arange(0, T, 2)
    for method in ("add_noise", "get_velocity"):
        got, want = getattr(ours, method)(x, noise, t), getattr(stock, method)(x, noise, t)
        # The root of 1 - alpha_bar with a float32 alpha_bar, an error of 6e-8 at 4e-5.
        assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_float32_tables_equal_stock(schedule, zero_snr):
    config = {
        "beta_schedule": schedule,
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    ours = GaussianDDPMScheduler(rescale_betas_zero_snr=zero_snr, **config)
    stock = DDPMScheduler(rescale_betas_zero_snr=zero_snr, **config)
    for table in ("betas", "alphas", "alphas_cumprod"):
        got, want = getattr(ours, table), getattr(stock, table)
        assert got.dtype == want.dtype == torch.float32
        assert_close(got, want, rtol=1e-4, atol=3e-6)  # stock subtracts float32 products


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_stock_except_at_its_errors(spacing):
    ours = GaussianDDPMScheduler(timestep_spacing=spacing, steps_offset=1)
    stock = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
    wrong = []
    for K in range(1, T + 1):
        ours.set_timesteps(K)
        stock.set_timesteps(K)
        if not torch.equal(ours.timesteps, stock.timesteps):
            wrong.append(
                (K, len(stock.timesteps), int(stock.timesteps.min()), int(stock.timesteps.max()))
            )
    if spacing == "trailing":
        assert len(wrong) == 62
        assert all(length == K + 1 and low == -1 for K, length, low, _ in wrong)
    elif spacing == "leading":
        assert wrong == [(T, T, 1, T)]
    else:
        assert wrong == []


def test_samples_equal_stock_with_the_same_generator():
    ours, stock = GaussianDDPMScheduler(), DDPMScheduler()
    stock.alphas_cumprod = torch.from_numpy(to_float64(alpha_bars(linear_betas(T))))
    samples = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
        generator, x = torch.Generator().manual_seed(3), randn(2, 1, 8, 8, dtype=torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.9, t, x, generator).prev_sample
        samples.append(x)
    assert relative(*samples) < 1e-5  # fifty steps of 2e-7


def test_fixed_large_log_is_not_nan():
    x, results = randn(1, 1, 8, 8, dtype=torch.float32), {}
    for name, kind in (("ours", GaussianDDPMScheduler), ("stock", DDPMScheduler)):
        scheduler = kind(variance_type="fixed_large_log")
        results[name] = scheduler.step(x, 500, x, torch.Generator().manual_seed(0)).prev_sample
    same = GaussianDDPMScheduler(variance_type="fixed_large")
    want = same.step(x, 500, x, torch.Generator().manual_seed(0)).prev_sample
    assert torch.equal(results["ours"], want)
    assert results["stock"].isnan().all()


def test_learned_reads_a_log_variance():
    x, log_var = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), -6.0)
    noise = randn(1, 1, 4, 4, dtype=torch.float32)
    ours = GaussianDDPMScheduler(variance_type="learned")
    got = ours.step(torch.cat([x, log_var], 1), 500, x, variance_noise=noise).prev_sample
    assert_close(got, np.exp(-3.0) * noise, rtol=1e-6, atol=1e-9)
    stock = DDPMScheduler(variance_type="learned")
    assert stock.step(torch.cat([x, log_var], 1), 500, x).prev_sample.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_noise_reaches_half_precision_images_at_every_timestep(dtype, schedule):
    ours = GaussianDDPMScheduler(beta_schedule=schedule)
    t, ones = torch.arange(T), torch.ones(T, 1, dtype=dtype)
    zeros = torch.zeros(T, 1, dtype=dtype)
    sigma = ours.add_noise(zeros, ones, t)
    assert sigma.dtype == dtype
    exact = torch.from_numpy(1 - to_float64(alpha_bars(EXACT_BETAS[schedule](T)))).sqrt()
    # A single rounding to the dtype.
    assert_close(sigma[:, 0].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=0)
    stock = DDPMScheduler(beta_schedule=schedule).add_noise(zeros, ones, t)
    assert (stock == 0).any()


def test_a_step_rounds_to_half_precision_once_at_the_end():
    x = randn(1, 1, 8, 8, dtype=torch.float32).bfloat16()
    output = randn(1, 1, 8, 8, seed=1, dtype=torch.float32).bfloat16()
    noise = randn(1, 1, 8, 8, seed=2, dtype=torch.float32)
    ours = GaussianDDPMScheduler()
    in_half = ours.step(output, 3, x, variance_noise=noise)
    in_float = ours.step(output, 3, x.float(), variance_noise=noise)
    assert in_half.prev_sample.dtype == in_half.pred_original_sample.dtype == torch.bfloat16
    assert torch.equal(in_half.prev_sample, in_float.prev_sample.bfloat16())
    stock = DDPMScheduler()
    (half, _), (full, _) = (
        stock.step(output, 0, form, return_dict=False) for form in (x, x.float())
    )
    assert not torch.equal(half, full.bfloat16())


def test_a_last_step_above_zero_adds_noise_only_in_stock():
    x = torch.zeros(1, 1, 8, 8)
    for kind, has_noise in ((GaussianDDPMScheduler, False), (DDPMScheduler, True)):
        scheduler = kind(timestep_spacing="trailing", variance_type="fixed_large")
        scheduler.set_timesteps(10)
        assert bool(scheduler.step(x, 99, x).prev_sample.any()) == has_noise


def test_tables_are_more_precise_than_in_stock():
    exact = [1 - bar for bar in alpha_bars(linear_betas(T))]
    ours = GaussianDDPMScheduler().q_mean_variance(torch.ones(T, 1), torch.arange(T)).variance
    assert relative_error(ours.reshape(-1).numpy(), exact) < 1e-7
    assert relative_error(1 - DDPMScheduler().alphas_cumprod.numpy(), exact) > 1e-4


def test_a_float16_output_without_clipping_does_not_overflow():
    ours = GaussianDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    x = randn(1, 1, 32, 32, dtype=torch.float32)
    step = ours.step(torch.zeros(1, 1, 32, 32, dtype=torch.float16), 999, x)
    assert step.pred_original_sample.isfinite().all()
    assert step.pred_original_sample.abs().max() > 65504  # beyond fp16


# DPMSolverSDEScheduler needs a library that is not a dependency.
COMPATIBLE = sorted(
    {kind.__name__ for kind in GaussianDDPMScheduler().compatibles}
    - {"DDPMScheduler", "DPMSolverSDEScheduler"}
)
ODD_VALUES = {
    "num_train_timesteps": 50,
    "beta_start": 0.001,
    "beta_end": 0.3,
    "beta_schedule": "scaled_linear",
    "variance_type": "fixed_large",
    "clip_sample": False,
    "prediction_type": "sample",
    "dynamic_thresholding_ratio": 0.9,
    "clip_sample_range": 2.0,
    "sample_max_value": 3.0,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
STOCK_KEYS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "variance_type", "clip_sample", "prediction_type", "thresholding",
    "dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value", "timestep_spacing",
    "steps_offset", "rescale_betas_zero_snr",
}  # fmt: skip


def of_stock(config):
    return {key: config[key] for key in STOCK_KEYS}


def test_the_compatible_schedulers_are_those_of_stock():
    assert len(COMPATIBLE) >= 10
    stocks = {kind.__name__ for kind in DDPMScheduler().compatibles}
    assert {*COMPATIBLE, "DDPMScheduler"} == stocks - {"DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", COMPATIBLE)
@pytest.mark.parametrize("values", [ODD_VALUES, {}], ids=["odd", "default"])
@pytest.mark.parametrize(
    "through_disk", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["memory", "disk"]
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_conversion_to_another_scheduler_and_back_keeps_all_values(
    name, values, through_disk, tmp_path, capfd
):
    kind = getattr(diffusers, name)

    def carry(scheduler, target, folder):
        if not through_disk:
            return target.from_config(scheduler.config)
        scheduler.save_pretrained(tmp_path / folder)
        return target.from_pretrained(tmp_path / folder)

    ours = GaussianDDPMScheduler(**values)
    other = carry(ours, kind, "ours")
    shared = STOCK_KEYS & set(kind().config)
    assert {k: other.config[k] for k in shared} == {k: ours.config[k] for k in shared}
    back = carry(other, GaussianDDPMScheduler, "other")
    assert of_stock(back.config) == of_stock(ours.config)
    assert "not expected" not in capfd.readouterr().err
    stock = carry(other, DDPMScheduler, "stock")
    assert of_stock(stock.config) == of_stock(ours.config)


def test_positional_arguments_are_kept_in_a_conversion():
    """Stock treats a positional argument as a default and drops it."""
    ours = GaussianDDPMScheduler(50, 1e-3, 0.2, "squaredcos_cap_v2")
    assert DDIMScheduler.from_config(ours.config).config.beta_schedule == "squaredcos_cap_v2"
    stock = DDPMScheduler(50, 1e-3, 0.2, "squaredcos_cap_v2")
    assert DDIMScheduler.from_config(stock.config).config.beta_schedule == "linear"
    assert of_stock(GaussianDDPMScheduler.from_config(stock.config).config) == of_stock(ours.config)


def test_keys_and_defaults_equal_stock():
    stock, ours = DDPMScheduler(), GaussianDDPMScheduler()
    assert set(of_stock(stock.config)) == STOCK_KEYS
    assert of_stock(ours.config) == of_stock(stock.config)
    assert {k for k in ours.config if not k.startswith("_")} == STOCK_KEYS


def test_a_legacy_configuration_with_missing_keys_gets_the_defaults_of_stock():
    legacy = {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True,
        "num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_large",
    }  # fmt: skip
    ours, stock = GaussianDDPMScheduler.from_config(legacy), DDPMScheduler.from_config(legacy)
    assert of_stock(ours.config) == of_stock(stock.config)


OWN = [
    ("quad", None),
    ("const", None),
    ("warmup10", None),
    ("warmup50", None),
    ("jsd", None),
    ("iddpm_linear", None),
    ("chen_sigmoid", {"tau": 0.7}),
    ("laplace_log_snr", None),
    ("cosine", {"offset": 0.02}),
]


@pytest.mark.parametrize(("name", "params"), OWN)
@pytest.mark.filterwarnings("error::UserWarning")
def test_stock_loads_schedules_that_it_lacks(name, params, tmp_path, capfd):
    ours = GaussianDDPMScheduler(
        100, beta_schedule=name, beta_schedule_params=params, prediction_type="v_prediction"
    )
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDPMScheduler"
    assert saved["_ddpm_hf"]["beta_schedule"] == name
    assert saved["_ddpm_hf"]["format_version"] == 1
    assert params is None or params.items() <= saved["_ddpm_hf"]["beta_schedule_params"].items()
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(stock.betas, ours.betas)
    assert capfd.readouterr().err == ""
    stock.save_pretrained(tmp_path / "again")
    again = GaussianDDPMScheduler.from_pretrained(tmp_path / "again")
    assert torch.equal(again.betas, ours.betas)
    assert again.config["_ddpm_hf"] == saved["_ddpm_hf"]
    swapped = DDIMScheduler.from_config(again.config)
    assert swapped.config["_ddpm_hf"] == saved["_ddpm_hf"]


@pytest.mark.parametrize("name", COMPATIBLE)
@pytest.mark.filterwarnings("error::UserWarning")
def test_conversion_to_another_scheduler_and_back_keeps_the_extension(name, capfd):
    ours = GaussianDDPMScheduler(100, beta_schedule="chen_sigmoid")
    other = getattr(diffusers, name).from_config(ours.config)
    back = GaussianDDPMScheduler.from_config(other.config)
    assert back.config["_ddpm_hf"] == ours.config["_ddpm_hf"]
    assert torch.equal(back.betas, ours.betas)
    assert "not expected" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        {"prediction_type": "sample"},
        {"trained_betas": None, "beta_schedule": "linear"},
        {"trained_betas": [0.5] * 100},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_an_override_of_the_diffusion_drops_the_extension(override):
    ours = GaussianDDPMScheduler(100, beta_schedule="const", prediction_type="v_prediction")
    with pytest.warns(UserWarning, match=r"`_ddpm_hf` was made for other betas .* ignored"):
        changed = GaussianDDPMScheduler.from_config(ours.config, **override)
    assert "_ddpm_hf" not in changed.config
    for key, value in override.items():
        assert changed.config[key] == value


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("const", {"beta_schedule": "squaredcos_cap_v2"}),
        ("const", {"beta_schedule": "chen_sigmoid"}),
        ("const", {"beta_end": 0.05}),
        ("const", {"num_train_timesteps": 50}),
        ("chen_sigmoid", {"beta_schedule_params": {"tau": 0.3}}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*_ddpm_hf")
def test_an_override_of_an_extension_schedule_takes_effect(name, override):
    ours = GaussianDDPMScheduler(100, beta_schedule=name, prediction_type="v_prediction")
    changed = GaussianDDPMScheduler.from_config(ours.config, **override)
    given = {"num_train_timesteps": 100, "beta_schedule": name, "prediction_type": "v_prediction"}
    want = GaussianDDPMScheduler(**(given | override))
    assert torch.equal(changed.betas, want.betas)
    assert changed.config.get("_ddpm_hf") == want.config.get("_ddpm_hf")
    assert dict(ours.config) == dict(GaussianDDPMScheduler(**given).config)  # untouched


@pytest.mark.parametrize("name", COMPATIBLE)
def test_the_configuration_of_another_scheduler_is_used(name, tmp_path):
    other = getattr(diffusers, name)()
    other.save_pretrained(tmp_path)
    for ours in (
        GaussianDDPMScheduler.from_config(other.config),
        GaussianDDPMScheduler.from_pretrained(tmp_path),
    ):
        for key in STOCK_KEYS & other.config.keys() - {"variance_type", "trained_betas"}:
            assert ours.config[key] == other.config[key], key
        # None means "not learned" in DPMSolverMultistepScheduler.
        assert ours.config.variance_type == (other.config.get("variance_type") or "fixed_small")


@pytest.mark.filterwarnings("ignore:.*_ddpm_hf")
def test_an_override_by_another_extension_schedule_replaces_the_extension():
    ours = GaussianDDPMScheduler(100, beta_schedule="const")
    changed = GaussianDDPMScheduler.from_config(
        ours.config,
        trained_betas=None,
        beta_schedule="chen_sigmoid",
        beta_schedule_params={"tau": 0.5},
    )
    assert changed.config["_ddpm_hf"]["beta_schedule"] == "chen_sigmoid"
    assert changed.config["_ddpm_hf"]["beta_schedule_params"]["tau"] == 0.5


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_override_of_another_key_keeps_the_extension_and_its_unknown_keys():
    ours = GaussianDDPMScheduler(100, beta_schedule="const")
    newer = dict(ours.config, _ddpm_hf={**ours.config["_ddpm_hf"], "format_version": 2, "new": [1]})
    changed = GaussianDDPMScheduler.from_config(newer, variance_type="fixed_large")
    assert changed.config["_ddpm_hf"] == newer["_ddpm_hf"]


@pytest.mark.parametrize(
    ("key", "hint"), [("num_train_timestep", "num_train_timesteps"), ("betas_start", "beta_start")]
)
def test_a_misspelt_key_causes_a_warning_with_a_suggestion(key, hint):
    with pytest.warns(
        UserWarning, match=f"'{key}' is not a configuration key.*did you mean '{hint}'"
    ):
        GaussianDDPMScheduler.from_config({key: 50})
    with pytest.warns(UserWarning, match=hint):
        GaussianDDPMScheduler.from_config({}, **{key: 50})


@pytest.mark.slow
def test_a_saved_scheduler_loads_in_stock_without_this_package(tmp_path):
    ours = GaussianDDPMScheduler(50, beta_schedule="chen_sigmoid", variance_type="fixed_large")
    ours.save_pretrained(tmp_path)
    script = (
        "import sys; sys.modules['ddpm_hf'] = None\n"
        "from diffusers import DDPMScheduler\n"
        "print(DDPMScheduler.from_pretrained(sys.argv[1]).betas.tolist())"
    )
    done = run_forked(["-c", script, tmp_path])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ours.betas.tolist()
