"""Checks of the configuration of a scheduler."""

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, coefficient_tables, schedules, timestep_spacings

Array = schedules.Array

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


def warn_of_unknown_keys(cls: Any, keys: Iterable[str]) -> None:
    """Warn of keys that neither `cls` nor a compatible scheduler has."""
    known = cls._get_init_keys(cls)
    unknown = {key for key in keys if key not in known and not key.startswith("_")}
    if unknown:
        known = known.union(*map(cls._get_init_keys, cls._get_compatibles()))
    for key in sorted(unknown - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        checks.warn(f"{key!r} is not a configuration key of {cls.__name__} and is ignored{hint}")


def warn_of_poor_settings(config: Any, log_alphas: Array) -> None:
    """Warn of valid settings that make samples worse."""
    signal = float(np.exp(log_alphas.sum() / 2))
    if signal > MAX_SIGNAL_AT_END:
        checks.warn(
            f"the signal amplitude at the last of {len(log_alphas)} timesteps is {signal:.0%}, but"
            " sampling starts from pure noise; use the `beta_schedule` 'iddpm_linear' (linear betas"
            " for any T) or 'laplace_log_snr' (corrects 'laplace'), or increase `beta_end`"
        )
    if config.trained_betas is None and config.beta_start > config.beta_end:
        checks.warn(
            f"`beta_start` should be at most `beta_end`, {config.beta_end}, got {config.beta_start}"
        )
    if config.thresholding and config.sample_max_value == 1:
        checks.warn(
            "`thresholding` with a `sample_max_value` of 1 is plain clipping; increase the latter"
        )
    if config.rescale_betas_zero_snr and config.timestep_spacing != "trailing":
        checks.warn(
            "`timestep_spacing` should be 'trailing' with `rescale_betas_zero_snr`, got"
            f" {config.timestep_spacing!r}: short trajectories omit the timestep without signal"
        )


def warn_of_remaining_signal(spacing: str, first: int, log_alphas: Array) -> None:
    """Warn of a trajectory whose first timestep still contains signal."""
    at_start, at_end = np.exp(log_alphas.cumsum()[[first, -1]] / 2)
    if at_start - at_end > MAX_SIGNAL_BEYOND_END:
        checks.warn(
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
    checks.check_int("num_train_timesteps", T, 1, MAX_TRAIN_TIMESTEPS)
    checks.check_int("steps_offset", config.steps_offset, 0, T - 1)
    for name, interval, low, high in (
        ("beta_start", "in (0, 1)", checks.ABOVE_0, checks.BELOW_1),
        ("beta_end", "in (0, 1)", checks.ABOVE_0, checks.BELOW_1),
        ("dynamic_thresholding_ratio", "in (0, 1]", checks.ABOVE_0, 1.0),
        ("clip_sample_range", "above 0", checks.ABOVE_0, checks.FINITE),
        ("sample_max_value", "at least 1", 1.0, checks.FINITE),
    ):
        checks.check_float(name, config[name], interval, low, high)
    for name, choices in (
        ("beta_schedule", sorted(schedules.BETA_SCHEDULES)),
        ("variance_type", VARIANCE_TYPES),
        ("prediction_type", PREDICTION_TYPES),
        ("timestep_spacing", timestep_spacings.STOCK_SPACINGS),
    ):
        checks.check_choice(name, config[name], choices)
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


def check_schedule_params(name: str, params: Any) -> dict[str, float]:
    """The parameters of schedule `name`, completed with its defaults."""
    defaults = schedules.schedule_parameters(name)
    if not isinstance(params, dict) or params.keys() - defaults.keys():
        raise ValueError(
            f"`beta_schedule_params` must be a dict with keys in {[*defaults]} for `beta_schedule`"
            f" {name!r}, got {params!r}"
        )
    for key, value in params.items():
        checks.check_finite_float(f"beta_schedule_params[{key!r}]", value)
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
            checks.check_timesteps(steps, num_train_timesteps)
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
    checks.check_int("num_inference_steps", K, 1, num_train_timesteps)
    return {"scheduler": name, "num_inference_steps": K}
