"""Argument checks of the scheduler, whose errors name argument, value and choices.

Only values of CPU tensors are read, so no check synchronizes with a device. Travels with the
weights.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from . import coefficient_tables, schedules

MAX_TRAIN_TIMESTEPS = 100_000
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)
# Amplitudes, sqrt(alpha_bar). Sampling starts from pure noise, without the signal that remains at
# its first timestep: 0.006 with the defaults of diffusers, 0.07 with those of Stable Diffusion.
MAX_SIGNAL_AT_END = 0.1
MAX_SIGNAL_BEYOND_END = 0.08
# Ends of open intervals, as the nearest float inside.
ABOVE_0, BELOW_1 = float(np.nextafter(0, 1)), float(np.nextafter(1, 0))
FINITE = sys.float_info.max

Array = schedules.Array
Steps = schedules.Steps


def warn(message: str) -> None:
    """Issue a warning at the caller's line outside of this folder, diffusers and its loader."""
    files = (__file__, diffusers.__file__, huggingface_hub.__file__)
    internal = tuple(os.path.join(os.path.dirname(f), "") for f in files)
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(internal):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def warn_of_unknown_keys(cls: Any, keys: Iterable[str]) -> None:
    """Warn of keys that neither `cls` nor a compatible scheduler has."""
    known = cls._get_init_keys(cls)
    unknown = {key for key in keys if key not in known and not key.startswith("_")}
    if unknown:
        known = known.union(*map(cls._get_init_keys, cls._get_compatibles()))
    for key in sorted(unknown - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        warn(f"{key!r} is not a configuration key of {cls.__name__} and is ignored{hint}")


def warn_of_poor_settings(config: Any, log_alphas: Array) -> None:
    """Warn of valid settings that make samples worse."""
    signal = float(np.exp(log_alphas.sum() / 2))
    if signal > MAX_SIGNAL_AT_END:
        warn(
            f"the signal amplitude at the last of {len(log_alphas)} timesteps is {signal:.0%}, but"
            " sampling starts from pure noise; use the `beta_schedule` 'iddpm_linear' (linear betas"
            " for any T) or 'laplace_log_snr' (corrects 'laplace'), or increase `beta_end`"
        )
    if config.trained_betas is None and config.beta_start > config.beta_end:
        warn(
            f"`beta_start` should be at most `beta_end`, {config.beta_end}, got {config.beta_start}"
        )
    if config.thresholding and config.sample_max_value == 1:
        warn("`thresholding` with a `sample_max_value` of 1 is plain clipping; increase the latter")
    if config.rescale_betas_zero_snr and config.timestep_spacing != "trailing":
        warn(
            "`timestep_spacing` should be 'trailing' with `rescale_betas_zero_snr`, got"
            f" {config.timestep_spacing!r}: short trajectories omit the timestep without signal"
        )


def warn_of_remaining_signal(spacing: str, first: int, log_alphas: Array) -> None:
    """Warn of a trajectory whose first timestep still contains signal."""
    at_start, at_end = np.exp(log_alphas.cumsum()[[first, -1]] / 2)
    if at_start - at_end > MAX_SIGNAL_BEYOND_END:
        warn(
            f"`timestep_spacing` {spacing!r} starts at t={first} with a signal amplitude of"
            f" {at_start:.0%} ({at_end:.0%} at the last training timestep), but sampling starts"
            " from pure noise; use 'trailing'"
        )


def check_config(config: Any) -> None:
    """Check the configuration of a scheduler.

    Raises:
        TypeError, ValueError: for values that cannot sample.
    """
    T = config.num_train_timesteps
    check_int("num_train_timesteps", T, 1, MAX_TRAIN_TIMESTEPS)
    check_int("steps_offset", config.steps_offset, 0, T - 1)
    for name, interval, low, high in (
        ("beta_start", "in (0, 1)", ABOVE_0, BELOW_1),
        ("beta_end", "in (0, 1)", ABOVE_0, BELOW_1),
        ("dynamic_thresholding_ratio", "in (0, 1]", ABOVE_0, 1.0),
        ("clip_sample_range", "above 0", ABOVE_0, FINITE),
        ("sample_max_value", "at least 1", 1.0, FINITE),
    ):
        check_float(name, config[name], interval, low, high)
    for name, choices in (
        ("beta_schedule", sorted(schedules.BETA_SCHEDULES)),
        ("variance_type", VARIANCE_TYPES),
        ("prediction_type", PREDICTION_TYPES),
        ("timestep_spacing", schedules.STOCK_SPACINGS),
    ):
        check_choice(name, config[name], choices)
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if not isinstance(config[name], bool):
            raise TypeError(f"`{name}` must be True or False, got {config[name]!r}")
    if config.rescale_betas_zero_snr and T == 1:
        raise ValueError(
            "`num_train_timesteps` must be at least 2 with `rescale_betas_zero_snr`, got 1"
        )
    if config.thresholding and config.clip_sample_range != 1:
        raise ValueError(
            "`clip_sample_range` must be 1 with `thresholding`, which is for data in [-1, 1], got"
            f" {config.clip_sample_range!r}; disable `thresholding` for latents and other data"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Check that the value is an int, and not a bool, in [low, high]."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= value <= high:
        error = ValueError if is_int else TypeError
        raise error(f"`{name}` must be an int in [{low}, {high}], got {value!r}")


def to_int(name: str, value: Any, low: int, high: int) -> int:
    """The value, an int or a NumPy integer in [low, high], as an int."""
    number = int(value) if isinstance(value, np.integer) else value
    check_int(name, number, low, high)
    return int(number)


def check_float(name: str, value: Any, interval: str, low: float, high: float) -> None:
    """Check that the value is a number, and not NaN, in [low, high], described by `interval`."""
    # A tuple, because torch 2.8 cannot compile a check against a union.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN compares false
        error = ValueError if is_number else TypeError
        raise error(f"`{name}` must be a number {interval}, got {value!r}")


def check_schedule_params(name: str, params: Any) -> dict[str, float]:
    """The parameters of schedule `name`, completed with its defaults."""
    defaults = schedules.schedule_parameters(name)
    if not isinstance(params, dict) or params.keys() - defaults.keys():
        raise ValueError(
            f"`beta_schedule_params` must be a dict with keys in {[*defaults]} for `beta_schedule`"
            f" {name!r}, got {params!r}"
        )
    for key, value in params.items():
        check_float(f"beta_schedule_params[{key!r}]", value, "that is finite", -FINITE, FINITE)
    return {**defaults, **params}


def check_betas(name: str, values: Any, num_train_timesteps: int) -> Array:
    """Betas as (T,) float64, each in (0, 1); the last may be 1.

    Args:
        name: start of the error message.
        values: the betas.
        num_train_timesteps: T.
    """
    betas = _per_timestep(name, values, num_train_timesteps)
    is_valid = (betas > 0) & (betas < 1)
    is_valid[-1] |= betas[-1] == 1
    if not is_valid.all():
        t = int(np.argmin(is_valid))
        raise ValueError(f"{name} must be in (0, 1), got {betas[t]} at t={t}")
    return betas


def check_x_0_mse(values: Any, num_train_timesteps: int) -> Array:
    """Mean squared errors as (T,) float64, finite and not negative."""
    mse = _per_timestep("`x_0_mse`", values, num_train_timesteps)
    is_valid = np.isfinite(mse) & (mse >= 0)
    if not is_valid.all():
        t = int(np.argmin(is_valid))
        raise ValueError(f"`x_0_mse` must be finite and at least 0, got {mse[t]} at t={t}")
    return mse


def _per_timestep(name: str, values: Any, num_train_timesteps: int) -> Array:
    """One number per timestep, as (T,) float64."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError:  # rows of unequal length
        array = np.asarray("")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a list of numbers, got {values!r:.200}")
    if array.shape != (num_train_timesteps,):
        raise ValueError(
            f"{name} must have shape ({num_train_timesteps},), one value for each of"
            f" `num_train_timesteps`, got shape {array.shape}"
        )
    return array.astype(np.float64)


def check_terminal_signal(prediction_type: str, log_alphas: Array) -> None:
    """Check that the last timestep has enough signal for the prediction type "epsilon"."""
    signal = np.exp(log_alphas.sum() / 2)
    if prediction_type == "epsilon" and signal < np.finfo(np.float32).tiny:
        raise ValueError(
            "`prediction_type` must be 'v_prediction' or 'sample' for these betas, got 'epsilon',"
            f" which divides by the signal amplitude, {signal:.0e} at the last timestep (zero"
            " terminal SNR); or decrease the betas"
        )


def check_unchanged(name: str, values: Any, table: Tensor) -> None:
    """Check that a tensor of any device and floating dtype has the values of `table`."""
    same = isinstance(values, Tensor) and values.is_floating_point() and values.shape == table.shape
    if same and not values.is_meta and not table.is_meta:
        same = torch.equal(values.detach().cpu(), table.detach().cpu().to(values.dtype))
    if not same:
        raise ValueError(
            f"`{name}` must keep its values: all coefficients are computed from the betas in"
            " float64; to change them, pass `trained_betas` to the constructor or to from_config"
        )


def check_timesteps(timesteps: Any, num_train_timesteps: int) -> Steps:
    """Custom timesteps in ascending order, (K,) int64."""
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"`timesteps` must be a sequence of integers, got {timesteps!r}")
    steps = [coefficient_tables.as_int(t) for t in values]
    is_descending = all(a > b for a, b in pairwise(steps))
    if not steps or not is_descending or steps[0] >= num_train_timesteps or steps[-1] < 0:
        raise ValueError(
            "`timesteps` must be strictly descending integers in"
            f" [0, {num_train_timesteps - 1}], at least one, got {steps}"
        )
    return np.array(steps[::-1], dtype=np.int64)


def check_calibrated_timesteps(
    values: Any, num_train_timesteps: int
) -> dict[str, dict[str, list[int]]]:
    """Timesteps by sampler and number of steps as JSON, such as {"DDIM": {"2": [999, 499]}}."""
    try:
        trajectories = {
            str(sampler): {
                str(int(K)): [coefficient_tables.as_int(t) for t in steps]
                for K, steps in by_num_steps.items()
            }
            for sampler, by_num_steps in values.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            "`calibrated_timesteps` must be a dict of timesteps by sampler and number of steps,"
            f' such as {{"DDIM": {{2: [999, 499]}}}}, got {values!r:.200}'
        ) from None
    for sampler, by_num_steps in trajectories.items():
        for K, steps in by_num_steps.items():
            check_timesteps(steps, num_train_timesteps)
            if len(steps) != int(K):
                raise ValueError(
                    f"`calibrated_timesteps`[{sampler!r}][{K}] must have {K} timesteps, got {steps}"
                )
    return trajectories


def check_recommended(value: Any, num_train_timesteps: int) -> dict[str, str | int]:
    """The name of a sampler and its number of steps."""
    try:
        name, K = value["scheduler"], value["num_inference_steps"]
    except (LookupError, TypeError):
        name, K = None, None
    if not isinstance(name, str) or len(name) > 200:
        raise TypeError(
            '`recommended` must be like {"scheduler": "DDIM", "num_inference_steps": 25}, got'
            f" {value!r:.200}"
        )
    check_int("num_inference_steps", K, 1, num_train_timesteps)
    return {"scheduler": name, "num_inference_steps": K}


def check_device(device: Any) -> torch.device | None:
    """The value as a torch device; None stands for the CPU."""
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: CUDA is missing
        raise ValueError(
            f"`device` must be an available torch device, got {device!r}: {error}"
        ) from None


def check_tensor(name: str, x: Any, like: Tensor | None = None, widen: int = 1) -> None:
    """Check that x is a floating-point tensor on the device of `like` and of a matching shape.

    Args:
        name: argument name.
        x: the tensor.
        like: tensor of the expected shape, (B, C, ...); None accepts (B, ...).
        widen: factor of the expected number of channels.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor, got {got}")
    if like is None:
        if x.ndim == 0:
            raise ValueError(f"`{name}` must have shape (B, ...), got a 0-dim tensor")
        return
    if like.ndim < widen:
        raise ValueError(
            f"`sample` must have shape (B, C, ...) for a learned variance, got {tuple(like.shape)}"
        )
    shape = like.shape if widen == 1 else (len(like), widen * like.shape[1], *like.shape[2:])
    if x.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)} for a sample of shape {tuple(like.shape)} and"
            f" this `variance_type`, got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device} like the sample, got {x.device}")


def check_generators(generator: Any, batch_size: int) -> None:
    """Check that the value is None, a generator, or a list of one generator per image."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    each = generator if isinstance(generator, list | tuple) else [None]
    if not all(isinstance(one, torch.Generator) for one in each):
        raise TypeError(
            "`generator` must be a torch.Generator or a list with one per image, got"
            f" {generator!r}; create one with torch.Generator().manual_seed(0)"
        )
    if len(each) != batch_size:
        raise ValueError(
            f"`generator` must be a single generator or a list of {batch_size}, one per image, got"
            f" a list of {len(each)}"
        )
