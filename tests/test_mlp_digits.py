"""The lesson in training/mlp_digits.py does what it says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PATH = Path(__file__).parents[1] / "training" / "mlp_digits.py"


@pytest.fixture(scope="module")
def lesson():
    spec = importlib.util.spec_from_file_location("mlp_digits", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_thousand_small_steps_end_where_one_jump_does(lesson):
    torch.manual_seed(0)
    x_0 = lesson.digits()[:200]
    seen = lesson.diffuse(x_0)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert list(seen) == [9, 99, 299, 999]
    for t, (factor, variance) in seen.items():
        noise = 1 - alpha_bar[t]
        # A least-squares factor has the standard error sigma / |x_0|, a variance of n values the
        # relative one sqrt(2 / n). Each of the 8 figures leaves 4 of its own 1 time in 16,000.
        factor_error = (noise / x_0.square().sum().item()) ** 0.5
        assert abs(factor - alpha_bar[t] ** 0.5) < 4 * factor_error
        assert abs(variance / noise - 1) < 4 * (2 / x_0.numel()) ** 0.5


def test_the_reverse_chain_takes_any_callable_and_ends_at_its_estimate(lesson):
    x_0 = lesson.digits()[:3]
    # The last step's mean is the estimate itself, but for a few float32 roundings of 6e-8.
    torch.testing.assert_close(lesson.sample(lambda x_t, t: x_0, 3), x_0, rtol=0, atol=1e-6)


def test_the_loss_of_the_lesson_is_the_error_of_the_estimate(lesson):
    x_0 = lesson.digits()[:5]
    losses = lesson.errors(lambda x_t, t: x_0 + 0.5, x_0)
    # 0.5 squared; x_0 + 0.5 - x_0 is exact but for the rounding of the sum.
    assert losses == pytest.approx(dict.fromkeys(losses, 0.25), rel=1e-6)
    assert set(losses) == {0, 50, 100, 200, 400, 600, 800, 999}


@pytest.mark.slow
@pytest.mark.parametrize("told_t", [False, True], ids=["not told t", "told t"])
def test_the_network_learns_what_can_be_known_of_digits(lesson, told_t):
    x_0 = lesson.digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    mlp = lesson.MLP(told_t)
    lesson.train(mlp, x_0[:1500], 500)
    errors = lesson.errors(mlp, x_0[1500:])
    variance = x_0[1500:].var(0).mean().item()
    # Nearly all of a digit at t = 0; at t = 999, from noise alone, the mean of all digits.
    assert errors[0] < 0.25 * variance
    assert 0.8 * variance < errors[999] < 1.2 * variance


@pytest.mark.slow
def test_the_lesson_says_how_to_run_it(tmp_path):
    command = [sys.executable, str(PATH), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--steps" in done.stdout


@pytest.mark.slow
def test_the_lesson_runs_and_draws_a_picture(lesson, tmp_path, capsys):
    picture = tmp_path / "new" / "lesson.png"
    lesson.main(steps=30, picture=picture)
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10
    assert "%" in capsys.readouterr().out
