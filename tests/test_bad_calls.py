"""Invalid arguments of the scheduler: one error names the argument, its value and valid values.

Stock diffusers accepts most of these calls without an error, or fails later in another place.
"""

import re

import numpy as np
import pytest
import torch

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

nan, inf = float("nan"), float("inf")
T3 = {"num_train_timesteps": 3}
CHEN = {"beta_schedule": "chen_sigmoid"}
VARIANCES = "'fixed_small', 'fixed_small_log', 'fixed_large', 'fixed_large_log', 'learned', "


def message(argument, expected, got):
    """Pattern of a message that has the argument in backticks, its valid values and its value."""
    parts = (f"`{argument}", expected, f"got {got}")
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


# Argument of the constructor: its valid values, and invalid ones.
INVALID_VALUES = {
    "num_train_timesteps": ("an int in [1, 100000]", [0, -5, 1.5, "1000", True, None, 10**9]),
    "beta_start": ("a number in (0, 1)", [-0.1, 0.0, nan, "0.1"]),
    "beta_end": ("a number in (0, 1)", [1.5, 1.0, 0, nan, inf, "0.02", None]),
    "beta_schedule": ("'squaredcos_cap_v2', 'warmup10'", ["cos", None, ["linear"]]),
    "trained_betas": ("a list of numbers", ["abc", {"a": 1}]),
    "variance_type": (VARIANCES + "'learned_range'", ["fixed_smal", None]),
    "prediction_type": ("one of 'epsilon', 'sample', 'v_prediction'", ["eps", "v"]),
    "timestep_spacing": ("one of 'leading', 'linspace', 'trailing'", ["lead", "quadratic"]),
    "clip_sample": ("True or False", ["yes", None]),
    "clip_sample_range": ("a number above 0", [-1, 0.0, nan, inf]),
    "thresholding": ("True or False", [1]),
    "dynamic_thresholding_ratio": ("a number in (0, 1]", [1.5, 0.0]),
    "sample_max_value": ("a number at least 1", [0.5, nan]),
    "steps_offset": ("an int in [0, 999]", [-5, 5000, 1.0]),
    "rescale_betas_zero_snr": ("True or False", ["no"]),
}
# Configuration, and argument, valid values and value in the message.
CONSTRUCTOR = [
    ({argument: value}, argument, expected, repr(value))
    for argument, (expected, values) in INVALID_VALUES.items()
    for value in values
] + [
    ({"beta_schedule_params": {"tau": 1}}, "beta_schedule_params", "keys in []", "{'tau': 1}"),
    (
        CHEN | {"beta_schedule_params": {"tao": 1}},
        "beta_schedule_params",
        "keys in ['start', 'end', 'tau']",
        "{'tao': 1}",
    ),
    (CHEN | {"beta_schedule_params": 7}, "beta_schedule_params", "must be a dict", "7"),
    (
        CHEN | {"beta_schedule_params": {"tau": "1"}},
        "beta_schedule_params['tau']",
        "a number that is finite",
        "'1'",
    ),
    (
        CHEN | {"beta_schedule_params": {"tau": inf}},
        "beta_schedule_params['tau']",
        "a number that is finite",
        "inf",
    ),
    (
        {"num_train_timesteps": 10, "beta_schedule": "iddpm_linear"},
        "beta_schedule",
        "'iddpm_linear' with T = 10 and parameters {} must be in (0, 1)",
        "1.1155555555555556 at t=5",
    ),
    (
        CHEN | {"beta_schedule_params": {"tau": 0}},
        "beta_schedule",
        "'tau': 0} must be in (0, 1)",
        "nan at t=0",
    ),
    (
        CHEN | {"beta_schedule_params": {"start": 3.0, "end": 3.0}},
        "beta_schedule",
        "'start': 3.0, 'end': 3.0, 'tau': 1.0} must be in (0, 1)",
        "nan at t=0",
    ),
    (
        {"beta_schedule": "cosine", "beta_schedule_params": {"cap": -0.5}},
        "beta_schedule",
        "'cap': -0.5} must be in (0, 1)",
        "-0.5 at t=0",
    ),
    (
        {"beta_schedule": "cosine", "beta_schedule_params": {"offset": -1.0}},
        "beta_schedule",
        "'offset': -1.0, 'cap': 0.999} must be in (0, 1)",
        "nan at t=0",
    ),
    (
        {"beta_schedule": "laplace_log_snr", "beta_schedule_params": {"b": -0.5}},
        "beta_schedule",
        "'b': -0.5} must be in (0, 1)",
        "",
    ),
    (T3 | {"trained_betas": [0.1, 2, -3]}, "trained_betas", "in (0, 1)", "2.0 at t=1"),
    (T3 | {"trained_betas": [0.1, nan, 0.3]}, "trained_betas", "in (0, 1)", "nan at t=1"),
    (T3 | {"trained_betas": [0.1, 1.0, 0.3]}, "trained_betas", "in (0, 1)", "1.0 at t=1"),
    (T3 | {"trained_betas": [0.0, 0.2, 0.3]}, "trained_betas", "in (0, 1)", "0.0 at t=0"),
    (T3 | {"trained_betas": [[0.1, 0.2, 0.3]]}, "trained_betas", "(3,)", "shape (1, 3)"),
    ({"trained_betas": []}, "trained_betas", "(1000,)", "shape (0,)"),
    ({"trained_betas": [0.1] * 500}, "trained_betas", "(1000,)", "shape (500,)"),
    ({"trained_betas": np.full(999, 0.1)}, "trained_betas", "(1000,)", "shape (999,)"),
    ({"trained_betas": torch.full((5,), 0.1)}, "trained_betas", "(1000,)", "shape (5,)"),
    ({"trained_betas": 0.1}, "trained_betas", "(1000,)", "shape ()"),
    (T3 | {"trained_betas": ["0.1", "0.2", "0.3"]}, "trained_betas", "numbers", "['0.1', '0.2'"),
    (T3 | {"trained_betas": [0.1, 0.2j, 0.3]}, "trained_betas", "numbers", "[0.1, 0.2j, 0.3]"),
    (T3 | {"trained_betas": [[0.1], [0.2, 0.3]]}, "trained_betas", "numbers", "[[0.1], [0.2, 0.3"),
    (T3 | {"trained_betas": [0.1, 0.2, "x"]}, "trained_betas", "numbers", "[0.1, 0.2, 'x']"),
    (
        T3 | {"trained_betas": [0.1] * 3, "beta_schedule": "quad"},
        "beta_schedule",
        "left out if `trained_betas` are passed",
        "'quad'",
    ),
    (
        {"thresholding": True, "clip_sample_range": 4.0},
        "clip_sample_range",
        "must be 1 with `thresholding`",
        "4.0; disable `thresholding`",
    ),
    (
        {"rescale_betas_zero_snr": True},
        "prediction_type",
        "must be 'v_prediction' or 'sample'",
        "'epsilon'",
    ),
    ({"beta_schedule": "jsd"}, "prediction_type", "'v_prediction' or 'sample'", "'epsilon'"),
    (
        T3 | {"trained_betas": [0.1, 0.2, 1.0]},
        "prediction_type",
        "'v_prediction' or 'sample'",
        "'epsilon'",
    ),
    (
        {"rescale_betas_zero_snr": True, "num_train_timesteps": 1, "prediction_type": "sample"},
        "num_train_timesteps",
        "at least 2 with `rescale_betas_zero_snr`",
        "1",
    ),
]

IN_T = "an int in [1, 1000]"
DESCENDING = "strictly descending integers in [0, 999], at least one"
INTEGER = "an integer or a tensor of integers"
SPACINGS = "one of 'leading', 'linspace', 'trailing', 'quadratic', 'likelihood', 'calibrated', "
# Options of set_timesteps, and argument, valid values and value in the message.
SET_TIMESTEPS = [
    ({"num_inference_steps": value}, "num_inference_steps", IN_T, repr(value))
    for value in (None, 0, -3, 1001, 2.5, True, "10")
] + [
    (
        {"num_inference_steps": 11, "timestep_spacing": "10"},
        "num_inference_steps",
        "must be 10, the number of timesteps of `timestep_spacing` '10'",
        "11; leave it out",
    ),
    (
        {"num_inference_steps": 10, "timesteps": [5, 3]},
        "timesteps",
        "excludes `num_inference_steps` and `timestep_spacing`; pass one",
        "[5, 3], 10 and None",
    ),
    (
        {"timesteps": [5, 3], "timestep_spacing": "leading"},
        "timesteps",
        "excludes `num_inference_steps` and `timestep_spacing`; pass one",
        "[5, 3], None and 'leading'",
    ),
    *(
        ({"timesteps": value}, "timesteps", DESCENDING, repr(value))
        for value in ([], [5, -3], [1000, 3], [3, 5], [5, 5])
    ),
    *(({"timesteps": v}, "timesteps", "a sequence of integers", repr(v)) for v in ("53", 5)),
    ({"timesteps": [5.7, 1.2]}, "timestep", INTEGER, "5.7"),
    ({"timesteps": [True, False]}, "timestep", INTEGER, "True"),
    ({"timesteps": ["5", "3"]}, "timestep", INTEGER, "'5'"),
    ({"timesteps": torch.tensor([5.0, 3.0])}, "timestep", INTEGER, "5.0"),
    ({"timesteps": [[5, 3]]}, "timestep", INTEGER, "[5, 3]"),
    *(
        ({"num_inference_steps": 10, "timestep_spacing": v}, "timestep_spacing", SPACINGS, repr(v))
        for v in ("lead", 3, "10,,10")
    ),
    *(
        ({"num_inference_steps": 10, "device": v}, "device", "available torch device", repr(v))
        for v in ("gpu", 1.5)
    ),
]
# Sections that are not possible: the name of the argument, and the reason.
SECTIONS = {
    "500,501": "takes 501 timesteps from a section of 500; each count must be in [1, 500]",
    "0,5": "takes 0 timesteps from a section of 500; each count must be in [1, 500]",
    "ddim999": "no integer stride takes 999 of 1000 timesteps; use 'leading' or 'linspace'",
    "ddim0": "no integer stride takes 0 of 1000 timesteps; use 'leading' or 'linspace'",
}

x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
ON_TRAJECTORY = (
    "in scheduler.timesteps (10 values from 900 to 0; call set_timesteps(1000) on a copy"
)
PER_IMAGE = "one integer or have shape (2,), one per image"
SHAPE = "must have shape (2, 3, 4, 4) for a sample of shape (2, 3, 4, 4)"
FLOATING = "a floating-point tensor"
GENERATORS = "a torch.Generator or a list with one per image"
# Arguments of step, and argument, valid values and value in the message.
STEP = [
    ((y, 5, x), {}, "timestep", ON_TRAJECTORY, "[5]"),
    ((y, -1, x), {}, "timestep", ON_TRAJECTORY, "[-1]"),
    ((y, 1000, x), {}, "timestep", ON_TRAJECTORY, "[1000]"),
    ((y, torch.tensor(5), x), {}, "timestep", ON_TRAJECTORY, "[5]"),
    ((y, torch.tensor([900, 5]), x), {}, "timestep", ON_TRAJECTORY, "[5]"),
    ((y, torch.tensor([900, -1]), x), {}, "timestep", ON_TRAJECTORY, "[-1]"),
    *(((y, t, x), {}, "timestep", INTEGER, repr(t)) for t in (5.5, 900.0, "900", None, True)),
    ((y, torch.tensor(900.0), x), {}, "timestep", INTEGER, "tensor(900.)"),
    ((y, torch.tensor([900, 800, 700]), x), {}, "timestep", PER_IMAGE, "shape (3,)"),
    ((y, torch.tensor([[900, 800]]), x), {}, "timestep", PER_IMAGE, "shape (1, 2)"),
    ((y, torch.tensor([900.0, 800.0]), x), {}, "timestep", "int64 or int32", "torch.float32"),
    ((y[:1], 900, x), {}, "model_output", SHAPE, "(1, 3, 4, 4)"),
    ((y[:, :1], 900, x), {}, "model_output", SHAPE, "(2, 1, 4, 4)"),
    ((torch.zeros(2, 6, 4, 4), 900, x), {}, "model_output", SHAPE, "(2, 6, 4, 4)"),
    ((None, 900, x), {}, "model_output", FLOATING, "NoneType"),
    ((y.long(), 900, x), {}, "model_output", FLOATING, "torch.int64"),
    ((np.zeros((2, 3, 4, 4)), 900, x), {}, "model_output", FLOATING, "ndarray"),
    ((y.to("meta"), 900, x), {}, "model_output", "on cpu like the sample", "meta"),
    ((y, 900, None), {}, "sample", FLOATING, "NoneType"),
    ((y, 900, x.byte()), {}, "sample", FLOATING, "torch.uint8"),
    ((y, 900, [1.0]), {}, "sample", FLOATING, "list"),
    ((y, 900, x, "g"), {}, "generator", GENERATORS, "'g'; create one with"),
    ((y, 900, x, 42), {}, "generator", GENERATORS, "42; create one with"),
    ((y, 900, x, [torch.Generator(), 3]), {}, "generator", GENERATORS, "[<torch"),
    ((y, 900, x, [torch.Generator()] * 5), {}, "generator", "a list of 2", "a list of 5"),
    ((y, 900, x, [torch.Generator()]), {}, "generator", "a list of 2", "a list of 1"),
    ((y, 900, x), {"variance_noise": y[:1]}, "variance_noise", SHAPE, "(1, 3, 4, 4)"),
    ((y, 900, x), {"variance_noise": 0.5}, "variance_noise", FLOATING, "float"),
    ((y, 900, x), {"variance_noise": y.int()}, "variance_noise", FLOATING, "torch.int32"),
    *(
        ((y, 900, x), {"eta": eta}, "eta", "a number in [0, 1]", repr(eta))
        for eta in (-0.1, 1.5, nan, "1", None)
    ),
]
TWICE = "must have shape (2, 6, 4, 4) for a sample of shape (2, 3, 4, 4) and this `variance_type`"
LEARNED = [
    ((y, 900, x), "model_output", TWICE, "(2, 3, 4, 4)"),
    ((torch.zeros(2, 9, 4, 4), 900, x), "model_output", TWICE, "(2, 9, 4, 4)"),
    ((torch.zeros(2), 900, torch.zeros(2)), "sample", "(B, C, ...) for a learned variance", "(2,)"),
]
IN_CHAIN = "in [0, 999]"
# Arguments of add_noise and get_velocity, and argument, valid values and value in the message.
NOISING = [
    ((x, y, -1), "timestep", IN_CHAIN, "[-1]"),
    ((x, y, 1000), "timestep", IN_CHAIN, "[1000]"),
    ((x, y, torch.tensor([0, -1])), "timestep", IN_CHAIN, "[-1]"),
    ((x, y, torch.tensor([0, 1000])), "timestep", IN_CHAIN, "[1000]"),
    ((x, y, torch.tensor([0.0, 1.0])), "timestep", "int64 or int32", "torch.float32"),
    ((x, y, torch.tensor([True, False])), "timestep", "int64 or int32", "torch.bool"),
    ((x, y, torch.tensor([0, 1, 2])), "timestep", PER_IMAGE, "shape (3,)"),
    ((x, y, torch.tensor([[0], [1]])), "timestep", PER_IMAGE, "shape (2, 1)"),
    *(((x, y, t), "timestep", INTEGER, repr(t)) for t in (1.5, [0, 1], None)),
    ((x, y[:, :1], 5), "noise", f"{SHAPE}, got", "(2, 1, 4, 4)"),
    ((x, y[:1], 5), "noise", f"{SHAPE}, got", "(1, 3, 4, 4)"),
    ((x, None, 5), "noise", FLOATING, "NoneType"),
    ((x, y.long(), 5), "noise", FLOATING, "torch.int64"),
]


@pytest.mark.parametrize(("config", "argument", "expected", "got"), CONSTRUCTOR)
def test_the_constructor_names_an_invalid_argument(config, argument, expected, got):
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        GaussianDDPMScheduler(**config)


@pytest.mark.parametrize(("config", "argument", "expected", "got"), CONSTRUCTOR[:20])
def test_from_config_names_an_invalid_argument(config, argument, expected, got):
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        GaussianDDPMScheduler.from_config(dict(GaussianDDPMScheduler().config) | config)


@pytest.mark.parametrize(("options", "argument", "expected", "got"), SET_TIMESTEPS)
def test_an_error_in_set_timesteps_leaves_the_trajectory_unchanged(
    options, argument, expected, got
):
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.clone()
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        scheduler.set_timesteps(**options)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 10
    scheduler.step(y, 900, x)


@pytest.mark.parametrize("sections", SECTIONS)
def test_impossible_sections_are_rejected_with_the_reason(sections):
    pattern = re.escape(f"`timestep_spacing` '{sections}' ") + ".*" + re.escape(SECTIONS[sections])
    with pytest.raises(ValueError, match=pattern):
        GaussianDDPMScheduler().set_timesteps(timestep_spacing=sections)


@pytest.mark.parametrize(("positional", "options", "argument", "expected", "got"), STEP)
def test_step_names_an_invalid_argument(positional, options, argument, expected, got):
    scheduler = GaussianDDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        scheduler.step(*positional, **options)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize(("positional", "argument", "expected", "got"), LEARNED)
def test_step_with_a_learned_variance_checks_the_channels(
    variance_type, positional, argument, expected, got
):
    scheduler = GaussianDDPMScheduler(variance_type=variance_type)
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        scheduler.step(*positional)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize(("positional", "argument", "expected", "got"), NOISING)
def test_noising_names_an_invalid_argument(method, positional, argument, expected, got):
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        getattr(GaussianDDPMScheduler(), method)(*positional)


@pytest.mark.parametrize(
    ("method", "positional", "argument", "expected", "got"),
    [
        ("add_noise", (x.byte(), y, 5), "original_samples", FLOATING, "torch.uint8"),
        ("get_velocity", ("x", y, 5), "sample", FLOATING, "str"),
        ("q_mean_variance", (x.int(), 5), "x_0", FLOATING, "torch.int32"),
        ("q_mean_variance", (x, 1000), "timestep", IN_CHAIN, "[1000]"),
        ("q_posterior_mean_variance", (x, y[:1], 5), "x_t", SHAPE, "(1, 3, 4, 4)"),
        ("q_posterior_mean_variance", (x, y, -1), "timestep", "scheduler.timesteps", "[-1]"),
        ("diffuse_one_step", (x, 5, y[:1]), "noise", SHAPE, "(1, 3, 4, 4)"),
        ("diffuse_one_step", (x, 1000, y), "timestep", "scheduler.timesteps", "[1000]"),
        ("p_mean_variance", (y[:1], 5, x), "model_output", SHAPE, "(1, 3, 4, 4)"),
        ("p_mean_variance", (y, 5.0, x), "timestep", INTEGER, "5.0"),
        ("inverse_step", (y, 999, x), "timestep", "scheduler.timesteps[1:]", "[999]"),
        ("inverse_step", (y, 5, None), "sample", FLOATING, "NoneType"),
        ("snr", (1000,), "timestep", IN_CHAIN, "[1000]"),
        ("log_snr", (torch.tensor([-1]),), "timestep", IN_CHAIN, "[-1]"),
        ("snr", ("5",), "timestep", INTEGER, "'5'"),
    ],
)
def test_methods_name_an_invalid_argument(method, positional, argument, expected, got):
    with pytest.raises((TypeError, ValueError), match=message(argument, expected, got)):
        getattr(GaussianDDPMScheduler(), method)(*positional)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_start": 0.02, "beta_end": 0.02},
        {"num_train_timesteps": 1, "beta_start": 0.5, "beta_end": 0.5},
        pytest.param(
            {"num_train_timesteps": 100_000, "beta_schedule": "iddpm_linear"},
            marks=pytest.mark.slow,
        ),
        T3 | {"trained_betas": [0.1, 0.2, 1.0], "prediction_type": "sample"},
        T3 | {"trained_betas": (0.1, 0.2, 0.3)},
        T3 | {"trained_betas": np.array([0.1, 0.2, 0.3], dtype=np.float32)},
        {"steps_offset": 999},
        {"dynamic_thresholding_ratio": 1, "thresholding": True, "sample_max_value": 2},
    ],
)
def test_valid_arguments_at_the_limits_are_accepted(config):
    scheduler = GaussianDDPMScheduler(**config)
    t = scheduler.timesteps[0]
    for step in (
        scheduler.step(x, t, x),
        scheduler.step(x, int(t), x, [torch.Generator(), torch.Generator()], eta=1),
        scheduler.step(x, np.int64(t), x, variance_noise=y),
        scheduler.step(x, t.expand(2).int(), x),
    ):
        assert step.prev_sample.isfinite().all()
        assert step.pred_original_sample.isfinite().all()
    scheduler.set_timesteps(np.int64(1), device="cpu")


@pytest.mark.parametrize("T", [10**9, 10**12, -(10**9)])
def test_huge_numbers_of_timesteps_are_rejected_before_any_allocation(T):
    with pytest.raises(ValueError, match=message("num_train_timesteps", "[1, 100000]", T)):
        GaussianDDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
