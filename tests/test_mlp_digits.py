"""training/mlp_digits.py: forward and reverse process, loss, training and command line."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_forked

PATH = Path(__file__).parents[1] / "training" / "mlp_digits.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("mlp_digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_thousand_single_steps_equal_the_closed_form(program):
    torch.manual_seed(0)
    x_0 = program.digits()[:40]
    measured = program.diffuse(x_0)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert list(measured) == [9, 99, 299, 999]
    for t, (factor, variance) in measured.items():
        noise = 1 - alpha_bar[t]
        # The standard error of a least-squares factor is sigma / |x_0|; the relative one of a
        # variance of n values is sqrt(2 / n). A value is off by 4 of them 1 time in 16,000.
        factor_error = (noise / x_0.square().sum().item()) ** 0.5
        assert abs(factor - alpha_bar[t] ** 0.5) < 4 * factor_error
        assert abs(variance / noise - 1) < 4 * (2 / x_0.numel()) ** 0.5


def test_the_reverse_process_accepts_a_callable_and_ends_at_its_estimate(program):
    x_0 = program.digits()[:3]
    # The mean of the last step is the estimate, up to a few float32 roundings of 6e-8.
    torch.testing.assert_close(program.sample(lambda x_t, t: x_0, 3), x_0, rtol=0, atol=1e-6)


def test_the_loss_is_the_squared_error_of_the_estimate(program):
    x_0 = program.digits()[:5]
    losses = program.errors(lambda x_t, t: x_0 + 0.5, x_0)
    # 0.5 squared, up to the rounding of the sum.
    assert losses == pytest.approx(dict.fromkeys(losses, 0.25), rel=1e-6)
    assert set(losses) == {0, 50, 100, 200, 400, 600, 800, 999}


@pytest.mark.slow
@pytest.mark.parametrize("uses_t", [False, True], ids=["without t", "with t"])
def test_the_network_approaches_the_best_estimate_of_x_0(program, uses_t):
    x_0 = program.digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    mlp = program.MLP(uses_t)
    program.train(mlp, x_0[:1500], 250)
    errors = program.errors(mlp, x_0[1500:])
    variance = x_0[1500:].var(0).mean().item()
    # At t = 0 nearly x_0; at t = 999, where x_t is noise, the mean of all digits.
    assert errors[0] < 0.25 * variance
    assert 0.8 * variance < errors[999] < 1.2 * variance


@pytest.mark.slow
def test_the_help_lists_the_options():
    done = run_forked([PATH, "--help"])
    assert done.returncode == 0, done.stderr
    assert "--steps" in done.stdout


@pytest.mark.slow
def test_the_program_runs_and_saves_a_picture(program, tmp_path, capsys):
    picture = tmp_path / "new" / "digits.png"
    program.main(steps=30, picture=picture)
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10
    assert "%" in capsys.readouterr().out
