"""Calls that cannot be meant: each gives one error that names the argument and the value.

Of these calls stock diffusers accepts most in silence or fails later, somewhere else.
"""

import re

import numpy as np
import pytest
import torch

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

nan, inf = float("nan"), float("inf")
T10 = {"num_train_timesteps": 3}


def new(**config):
    return GaussianDDPMScheduler(**config)


# argument, configuration, what the message must hold
CONSTRUCTOR = [
    ("num_train_timesteps", {"num_train_timesteps": 0}, "1..100000"),
    ("num_train_timesteps", {"num_train_timesteps": -5}, "-5"),
    ("num_train_timesteps", {"num_train_timesteps": 1.5}, "1.5"),
    ("num_train_timesteps", {"num_train_timesteps": "1000"}, "'1000'"),
    ("num_train_timesteps", {"num_train_timesteps": True}, "True"),
    ("num_train_timesteps", {"num_train_timesteps": None}, "None"),
    ("num_train_timesteps", {"num_train_timesteps": 10**9}, "1000000000"),
    ("beta_start", {"beta_start": -0.1}, "-0.1"),
    ("beta_start", {"beta_start": 0.0}, "in (0, 1)"),
    ("beta_start", {"beta_start": nan}, "nan"),
    ("beta_start", {"beta_start": "0.1"}, "'0.1'"),
    ("beta_end", {"beta_end": 1.5}, "1.5"),
    ("beta_end", {"beta_end": 1.0}, "in (0, 1)"),
    ("beta_end", {"beta_end": 0}, "in (0, 1)"),
    ("beta_end", {"beta_end": nan}, "nan"),
    ("beta_end", {"beta_end": inf}, "inf"),
    ("beta_end", {"beta_end": "0.02"}, "'0.02'"),
    ("beta_end", {"beta_end": None}, "None"),
    ("beta_schedule", {"beta_schedule": "cos"}, "squaredcos_cap_v2"),
    ("beta_schedule", {"beta_schedule": None}, "None"),
    ("beta_schedule", {"beta_schedule": ["linear"]}, "linear"),
    ("iddpm_linear", {"num_train_timesteps": 10, "beta_schedule": "iddpm_linear"}, "T=10"),
    ("beta_schedule_params", {"beta_schedule_params": {"tau": 1}}, "nothing"),
    (
        "beta_schedule_params",
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"tao": 1}},
        "'tau'",
    ),
    (
        "beta_schedule_params",
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"tau": "1"}},
        "'1'",
    ),
    (
        "beta_schedule_params",
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"tau": inf}},
        "inf",
    ),
    (
        "beta_schedule_params",
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": 7},
        "7",
    ),
    ("chen_sigmoid", {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"tau": 0}}, "tau"),
    (
        "chen_sigmoid",
        {"beta_schedule": "chen_sigmoid", "beta_schedule_params": {"start": 3.0, "end": 3.0}},
        "start",
    ),
    ("cosine", {"beta_schedule": "cosine", "beta_schedule_params": {"cap": -0.5}}, "cap"),
    ("cosine", {"beta_schedule": "cosine", "beta_schedule_params": {"offset": -1.0}}, "offset"),
    (
        "laplace_log_snr",
        {"beta_schedule": "laplace_log_snr", "beta_schedule_params": {"b": -0.5}},
        "'b'",
    ),
    ("trained_betas", {"trained_betas": []}, "(0,)"),
    ("trained_betas", {**T10, "trained_betas": [0.1, 2, -3]}, "2.0 at t=1"),
    ("trained_betas", {**T10, "trained_betas": [0.1, nan, 0.3]}, "nan"),
    ("trained_betas", {**T10, "trained_betas": [0.1, 1.0, 0.3]}, "1.0 at t=1"),
    ("trained_betas", {**T10, "trained_betas": [0.0, 0.2, 0.3]}, "0.0 at t=0"),
    ("trained_betas", {**T10, "trained_betas": [[0.1, 0.2, 0.3]]}, "(1, 3)"),
    ("trained_betas", {"trained_betas": [0.1] * 500}, "(500,)"),
    ("trained_betas", {"trained_betas": np.full(999, 0.1)}, "(999,)"),
    ("trained_betas", {"trained_betas": torch.full((5,), 0.1)}, "(5,)"),
    ("trained_betas", {"trained_betas": "abc"}, "'abc'"),
    ("trained_betas", {**T10, "trained_betas": ["0.1", "0.2", "0.3"]}, "'0.2'"),
    ("trained_betas", {**T10, "trained_betas": [0.1, 0.2j, 0.3]}, "0.2j"),
    ("trained_betas", {**T10, "trained_betas": [[0.1], [0.2, 0.3]]}, "0.2"),
    ("trained_betas", {"trained_betas": {"a": 1}}, "{'a': 1}"),
    ("trained_betas", {"trained_betas": 0.1}, "()"),
    ("trained_betas", {**T10, "trained_betas": [0.1, 0.2, "x"]}, "'x'"),
    ("trained_betas", {**T10, "trained_betas": [0.1] * 3, "beta_schedule": "quad"}, "'quad'"),
    ("variance_type", {"variance_type": "fixed_smal"}, "fixed_small"),
    ("variance_type", {"variance_type": None}, "None"),
    ("prediction_type", {"prediction_type": "eps"}, "epsilon"),
    ("prediction_type", {"prediction_type": "v"}, "v_prediction"),
    ("timestep_spacing", {"timestep_spacing": "lead"}, "leading"),
    ("timestep_spacing", {"timestep_spacing": "quadratic"}, "linspace"),
    ("clip_sample", {"clip_sample": "yes"}, "'yes'"),
    ("clip_sample", {"clip_sample": None}, "None"),
    ("clip_sample_range", {"clip_sample_range": -1}, "-1"),
    ("clip_sample_range", {"clip_sample_range": 0.0}, "above 0"),
    ("clip_sample_range", {"clip_sample_range": nan}, "nan"),
    ("clip_sample_range", {"clip_sample_range": inf}, "inf"),
    ("thresholding", {"thresholding": 1}, "1"),
    ("thresholding", {"thresholding": True, "clip_sample_range": 4.0}, "4.0"),
    ("dynamic_thresholding_ratio", {"dynamic_thresholding_ratio": 1.5}, "1.5"),
    ("dynamic_thresholding_ratio", {"dynamic_thresholding_ratio": 0.0}, "(0, 1]"),
    ("sample_max_value", {"sample_max_value": 0.5}, "0.5"),
    ("sample_max_value", {"sample_max_value": nan}, "nan"),
    ("steps_offset", {"steps_offset": -5}, "-5"),
    ("steps_offset", {"steps_offset": 5000}, "5000"),
    ("steps_offset", {"steps_offset": 1.0}, "1.0"),
    ("rescale_betas_zero_snr", {"rescale_betas_zero_snr": "no"}, "'no'"),
    ("prediction_type", {"rescale_betas_zero_snr": True}, "'v_prediction'"),
    ("prediction_type", {"beta_schedule": "jsd"}, "'v_prediction'"),
    ("prediction_type", {**T10, "trained_betas": [0.1, 0.2, 1.0]}, "'sample'"),
    (
        "rescale_betas_zero_snr",
        {"rescale_betas_zero_snr": True, "num_train_timesteps": 1, "prediction_type": "sample"},
        "at least 2",
    ),
]

SET_TIMESTEPS = [
    ("num_inference_steps", {}, "None"),
    ("num_inference_steps", {"num_inference_steps": 0}, "1..1000"),
    ("num_inference_steps", {"num_inference_steps": -3}, "-3"),
    ("num_inference_steps", {"num_inference_steps": 1001}, "1001"),
    ("num_inference_steps", {"num_inference_steps": 2.5}, "2.5"),
    ("num_inference_steps", {"num_inference_steps": True}, "True"),
    ("num_inference_steps", {"num_inference_steps": "10"}, "'10'"),
    ("num_inference_steps", {"num_inference_steps": 11, "timestep_spacing": "10"}, "11"),
    ("timesteps", {"num_inference_steps": 10, "timesteps": [5, 3]}, "10"),
    ("timesteps", {"timesteps": [5, 3], "timestep_spacing": "leading"}, "leading"),
    ("timesteps", {"timesteps": []}, "[]"),
    ("timesteps", {"timesteps": [5, -3]}, "-3"),
    ("timesteps", {"timesteps": [1000, 3]}, "0..999"),
    ("timesteps", {"timesteps": [3, 5]}, "descending"),
    ("timesteps", {"timesteps": [5, 5]}, "descending"),
    ("timestep", {"timesteps": [5.7, 1.2]}, "5.7"),
    ("timestep", {"timesteps": [True, False]}, "True"),
    ("timestep", {"timesteps": ["5", "3"]}, "'5'"),
    ("timesteps", {"timesteps": "53"}, "'53'"),
    ("timesteps", {"timesteps": 5}, "5"),
    ("timestep", {"timesteps": torch.tensor([5.0, 3.0])}, "5.0"),
    ("timestep", {"timesteps": [[5, 3]]}, "[5, 3]"),
    ("timestep_spacing", {"num_inference_steps": 10, "timestep_spacing": "lead"}, "leading"),
    ("timestep_spacing", {"num_inference_steps": 10, "timestep_spacing": 3}, "3"),
    ("timestep_spacing", {"timestep_spacing": "10,,10"}, "10,,10"),
    ("timestep_spacing", {"timestep_spacing": "500,501"}, "501"),
    ("timestep_spacing", {"timestep_spacing": "0,5"}, "0"),
    ("timestep_spacing", {"timestep_spacing": "ddim999"}, "ddim999"),
    ("timestep_spacing", {"timestep_spacing": "ddim0"}, "ddim0"),
    ("device", {"num_inference_steps": 10, "device": "gpu"}, "gpu"),
    ("device", {"num_inference_steps": 10, "device": 1.5}, "1.5"),
]

x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
long = torch.long
STEP = [
    ("timestep", (y, 5, x), {}, "(10 values, 900 to 0; set_timesteps(1000), best on"),
    ("timestep", (y, -1, x), {}, "-1"),
    ("timestep", (y, 1000, x), {}, "1000"),
    ("timestep", (y, 5.5, x), {}, "5.5"),
    ("timestep", (y, 900.0, x), {}, "900.0"),
    ("timestep", (y, "900", x), {}, "'900'"),
    ("timestep", (y, None, x), {}, "None"),
    ("timestep", (y, True, x), {}, "True"),
    ("timestep", (y, torch.tensor(5), x), {}, "5"),
    ("timestep", (y, torch.tensor(900.0), x), {}, "900."),
    ("timestep", (y, torch.tensor([900, 5]), x), {}, "[5]"),
    ("timestep", (y, torch.tensor([900, -1]), x), {}, "[-1]"),
    ("timestep", (y, torch.tensor([900, 800, 700]), x), {}, "(3,)"),
    ("timestep", (y, torch.tensor([[900, 800]]), x), {}, "(1, 2)"),
    ("timestep", (y, torch.tensor([900.0, 800.0]), x), {}, "float32"),
    ("model_output", (y[:1], 900, x), {}, "(1, 3, 4, 4)"),
    ("model_output", (y[:, :1], 900, x), {}, "(2, 1, 4, 4)"),
    ("model_output", (torch.zeros(2, 6, 4, 4), 900, x), {}, "(2, 6, 4, 4)"),
    ("model_output", (None, 900, x), {}, "NoneType"),
    ("model_output", (y.long(), 900, x), {}, "int64"),
    ("model_output", (np.zeros((2, 3, 4, 4)), 900, x), {}, "ndarray"),
    ("model_output", (y.to("meta"), 900, x), {}, "meta"),
    ("sample", (y, 900, None), {}, "NoneType"),
    ("sample", (y, 900, x.byte()), {}, "uint8"),
    ("sample", (y, 900, [1.0]), {}, "list"),
    ("generator", (y, 900, x, "g"), {}, "'g'"),
    ("generator", (y, 900, x, 42), {}, "42"),
    ("generator", (y, 900, x, [torch.Generator()] * 5), {}, "5"),
    ("generator", (y, 900, x, [torch.Generator()]), {}, "1"),
    ("generator", (y, 900, x, [torch.Generator(), 3]), {}, "3"),
    ("variance_noise", (y, 900, x), {"variance_noise": y[:1]}, "(1, 3, 4, 4)"),
    ("variance_noise", (y, 900, x), {"variance_noise": 0.5}, "float"),
    ("variance_noise", (y, 900, x), {"variance_noise": y.int()}, "int32"),
    ("eta", (y, 900, x), {"eta": -0.1}, "-0.1"),
    ("eta", (y, 900, x), {"eta": 1.5}, "1.5"),
    ("eta", (y, 900, x), {"eta": nan}, "nan"),
    ("eta", (y, 900, x), {"eta": "1"}, "'1'"),
    ("eta", (y, 900, x), {"eta": None}, "None"),
]

LEARNED = [
    ("model_output", (y, 900, x), "(2, 6, 4, 4)"),
    ("model_output", (torch.zeros(2, 9, 4, 4), 900, x), "(2, 9, 4, 4)"),
    ("sample", (torch.zeros(2), 900, torch.zeros(2)), "(B, C, ...)"),
]

NOISING = [
    ("timestep", (x, y, -1), "-1"),
    ("timestep", (x, y, 1000), "1000"),
    ("timestep", (x, y, torch.tensor([0, -1])), "[-1]"),
    ("timestep", (x, y, torch.tensor([0, 1000])), "[1000]"),
    ("timestep", (x, y, torch.tensor([0.0, 1.0])), "float32"),
    ("timestep", (x, y, torch.tensor([True, False])), "bool"),
    ("timestep", (x, y, torch.tensor([0, 1, 2])), "(3,)"),
    ("timestep", (x, y, torch.tensor([[0], [1]])), "(2, 1)"),
    ("timestep", (x, y, 1.5), "1.5"),
    ("timestep", (x, y, [0, 1]), "[0, 1]"),
    ("timestep", (x, y, None), "None"),
    ("noise", (x, y[:, :1], 5), "(2, 1, 4, 4)"),
    ("noise", (x, y[:1], 5), "(1, 3, 4, 4)"),
    ("noise", (x, None, 5), "NoneType"),
    ("noise", (x, y.long(), 5), "int64"),
    ("sample", (x.byte(), y, 5), "uint8"),
    ("sample", ("x", y, 5), "str"),
]


def names(argument, value):
    """Matches a message that holds both."""
    return f"(?s)(?=.*{re.escape(argument)})(?=.*{re.escape(value)})"


@pytest.mark.parametrize(("argument", "config", "value"), CONSTRUCTOR)
def test_the_constructor_refuses(argument, config, value):
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        new(**config)


@pytest.mark.parametrize(("argument", "config", "value"), CONSTRUCTOR[:20])
def test_from_config_refuses_the_same(argument, config, value):
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        GaussianDDPMScheduler.from_config(dict(new().config) | config)


@pytest.mark.parametrize(("argument", "options", "value"), SET_TIMESTEPS)
def test_set_timesteps_refuses_and_changes_nothing(argument, options, value):
    scheduler = new()
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.clone()
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        scheduler.set_timesteps(**options)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 10
    scheduler.step(y, 900, x)


@pytest.mark.parametrize(("argument", "positional", "options", "value"), STEP)
def test_step_refuses(argument, positional, options, value):
    scheduler = new()
    scheduler.set_timesteps(10)
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        scheduler.step(*positional, **options)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize(("argument", "positional", "value"), LEARNED)
def test_step_with_a_learned_variance_refuses(variance_type, argument, positional, value):
    scheduler = new(variance_type=variance_type)
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        scheduler.step(*positional)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize(("argument", "positional", "value"), NOISING)
def test_noising_refuses(method, argument, positional, value):
    with pytest.raises((TypeError, ValueError), match=names(argument, value)):
        getattr(new(), method)(*positional)


@pytest.mark.parametrize(
    ("method", "positional", "argument"),
    [
        ("q_mean_variance", (x.int(), 5), "x_0"),
        ("q_mean_variance", (x, 1000), "timestep"),
        ("q_posterior_mean_variance", (x, y[:1], 5), "x_t"),
        ("q_posterior_mean_variance", (x, y, -1), "timestep"),
        ("diffuse_one_step", (x, 5, y[:1]), "noise"),
        ("diffuse_one_step", (x, 1000, y), "timestep"),
        ("p_mean_variance", (y[:1], 5, x), "model_output"),
        ("p_mean_variance", (y, 5.0, x), "timestep"),
        ("inverse_step", (y, 999, x), "timestep"),
        ("inverse_step", (y, 5, None), "sample"),
        ("snr", (1000,), "timestep"),
        ("log_snr", (torch.tensor([-1]),), "timestep"),
        ("snr", ("5",), "timestep"),
    ],
)
def test_the_mathematics_refuses(method, positional, argument):
    with pytest.raises((TypeError, ValueError), match=argument):
        getattr(new(), method)(*positional)


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
        {**T10, "trained_betas": [0.1, 0.2, 1.0], "prediction_type": "sample"},
        {**T10, "trained_betas": (0.1, 0.2, 0.3)},
        {**T10, "trained_betas": np.array([0.1, 0.2, 0.3], dtype=np.float32)},
        {"steps_offset": 999},
        {"dynamic_thresholding_ratio": 1, "thresholding": True, "sample_max_value": 2},
    ],
)
def test_valid_controls_pass(config):
    scheduler = new(**config)
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


def test_absurd_configurations_are_refused_before_they_cost_anything():
    for T in (10**9, 10**12, -(10**9)):
        with pytest.raises(ValueError, match="num_train_timesteps"):
            new(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
