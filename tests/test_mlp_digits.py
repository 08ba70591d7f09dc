"""The lesson in training/mlp_digits.py does what it says."""

import importlib.util
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
def test_the_network_learns_digits_and_knowing_t_lowers_its_error(lesson):
    x_0 = lesson.digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    errors = {}
    for told_t in (False, True):
        torch.manual_seed(0)
        mlp = lesson.MLP(told_t)
        lesson.train(mlp, x_0[:1500], 1500)
        errors[told_t] = lesson.errors(mlp, x_0[1500:])
    spread = x_0[1500:].var(0).mean().item()
    assert errors[True][0] < 0.5 * spread < errors[True][999]
    assert errors[True][0] < 0.98 * errors[False][0]


@pytest.mark.slow
def test_the_lesson_runs_and_draws_a_picture(lesson, tmp_path, capsys):
    picture = tmp_path / "new" / "lesson.png"
    lesson.main(steps=30, picture=picture)
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert np.asarray(image.convert("L")).std() > 10
    assert "%" in capsys.readouterr().out
