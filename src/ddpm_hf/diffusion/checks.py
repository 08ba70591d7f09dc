"""What the scheduler refuses, naming argument, value and choices. Travels with the weights.

Nothing here reads a tensor's values, except of what is on the CPU anyway: no check costs a sync.
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
# Amplitudes, sqrt(alpha_bar). Sampling starts from pure noise, so it misses the signal that is left
# at its first step: 0.006 with stock's defaults, 0.07 with Stable Diffusion's schedule.
MAX_SIGNAL_AT_END = 0.1
MAX_SIGNAL_BEYOND_END = 0.08
# Open intervals, closed at the neighbouring float.
ABOVE_0, BELOW_1 = float(np.nextafter(0, 1)), float(np.nextafter(1, 0))
FINITE = sys.float_info.max

Array = schedules.Array
Steps = schedules.Steps


def warn(message: str) -> None:
    """Warn at the first line outside of this folder, diffusers and what it loads by."""
    files = (__file__, diffusers.__file__, huggingface_hub.__file__)
    inside = tuple(os.path.join(os.path.dirname(f), "") for f in files)
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def warn_of_unknown_keys(cls: Any, keys: Iterable[str]) -> None:
    """Name the keys that neither `cls` nor a scheduler it can be swapped with knows."""
    known = cls._get_init_keys(cls)
    unknown = {key for key in keys if key not in known and not key.startswith("_")}
    if unknown:
        known = known.union(*map(cls._get_init_keys, cls._get_compatibles()))
    for key in sorted(unknown - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        warn(f"{key!r} is no configuration key of {cls.__name__} and has no effect{hint}")


def warn_where_samples_suffer(config: Any, log_alphas: Array) -> None:
    """What stock's keys allow and mean, although images get worse by it."""
    left = float(np.exp(log_alphas.sum() / 2))
    if left > MAX_SIGNAL_AT_END:
        warn(
            f"{left:.0%} of the signal's amplitude is left at the last of {len(log_alphas)} steps,"
            " but sampling starts from pure noise. beta_schedule 'iddpm_linear' fits linear betas"
            " to any T; 'laplace_log_snr' is 'laplace' put right; or raise beta_end"
        )
    if config.trained_betas is None and config.beta_start > config.beta_end:
        warn(f"beta_start={config.beta_start} is above beta_end={config.beta_end}")
    if config.thresholding and config.sample_max_value == 1:
        warn("thresholding with sample_max_value=1 is plain clipping: raise sample_max_value")
    if config.rescale_betas_zero_snr and config.timestep_spacing != "trailing":
        warn(
            f"rescale_betas_zero_snr with timestep_spacing {config.timestep_spacing!r}: short"
            " trajectories miss the step without signal; use 'trailing'"
        )


def warn_if_signal_is_missed(spacing: str, first: int, log_alphas: Array) -> None:
    """A trajectory that starts where training still saw the image."""
    at_start, at_end = np.exp(log_alphas.cumsum()[[first, -1]] / 2)
    if at_start - at_end > MAX_SIGNAL_BEYOND_END:
        warn(
            f"timestep_spacing {spacing!r} starts at t={first}, where {at_start:.0%} of the"
            f" signal's amplitude is left (training ends at {at_end:.0%}), but sampling starts"
            " from pure noise: use 'trailing'"
        )


def check_config(config: Any) -> None:
    """Refuse a configuration that could not sample."""
    T = config.num_train_timesteps
    check_int("num_train_timesteps", T, 1, MAX_TRAIN_TIMESTEPS)
    check_int("steps_offset", config.steps_offset, 0, T - 1)
    for name, wanted, low, high in (
        ("beta_start", "in (0, 1)", ABOVE_0, BELOW_1),
        ("beta_end", "in (0, 1)", ABOVE_0, BELOW_1),
        ("dynamic_thresholding_ratio", "in (0, 1]", ABOVE_0, 1.0),
        ("clip_sample_range", "above 0", ABOVE_0, FINITE),
        ("sample_max_value", "of at least 1", 1.0, FINITE),
    ):
        check_float(name, config[name], wanted, low, high)
    for name, choices in (
        ("beta_schedule", sorted(schedules.BETA_SCHEDULES)),
        ("variance_type", VARIANCE_TYPES),
        ("prediction_type", PREDICTION_TYPES),
        ("timestep_spacing", schedules.STOCK_SPACINGS),
    ):
        check_choice(name, config[name], choices)
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if not isinstance(config[name], bool):
            raise TypeError(f"{name} must be True or False, got {config[name]!r}")
    if config.rescale_betas_zero_snr and T == 1:
        raise ValueError("rescale_betas_zero_snr needs num_train_timesteps of at least 2, got 1")
    if config.thresholding and config.clip_sample_range != 1:
        raise ValueError(
            "thresholding is for data in [-1, 1] and contradicts clip_sample_range="
            f"{config.clip_sample_range!r}: turn it off for latents and other data"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """A value that is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """An int in [low, high]; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int in {low}..{high}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be an int in {low}..{high}, got {value!r}")


def to_int(name: str, value: Any, low: int, high: int) -> int:
    """An int in [low, high], which may come from NumPy."""
    number = int(value) if isinstance(value, np.integer) else value
    check_int(name, number, low, high)
    return int(number)


def check_float(name: str, value: Any, wanted: str, low: float, high: float) -> None:
    """A number in [low, high], described as `wanted`; NaN is none."""
    # A tuple, because torch 2.8 cannot compile a check against a union.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {wanted}, got {value!r}")
    if not low <= value <= high:  # NaN compares false
        raise ValueError(f"{name} must be a number {wanted}, got {value!r}")


def check_schedule_params(name: str, params: Any) -> dict[str, float]:
    """The parameters of an own schedule, completed with its defaults."""
    known = schedules.schedule_parameters(name)
    if not isinstance(params, dict) or params.keys() - known.keys():
        allowed = ", ".join(map(repr, known)) or "nothing"
        raise ValueError(f"beta_schedule_params of {name!r} may hold {allowed}; got {params!r}")
    for key, value in params.items():
        check_float(f"beta_schedule_params[{key!r}]", value, "that is finite", -FINITE, FINITE)
    return {**known, **params}


def check_betas(name: str, given: Any, num_train_timesteps: int) -> Array:
    """Betas as (T,) float64, each in (0, 1); the last may be 1."""
    betas = _per_timestep(name, given, num_train_timesteps)
    good = (betas > 0) & (betas < 1)
    good[-1] |= betas[-1] == 1
    if not good.all():
        bad = int(np.argmin(good))
        raise ValueError(f"{name} must be in (0, 1); got {betas[bad]} at t={bad}")
    return betas


def check_x_0_mse(given: Any, num_train_timesteps: int) -> Array:
    """Mean squared errors as (T,) float64, finite and not negative."""
    mse = _per_timestep("x_0_mse", given, num_train_timesteps)
    good = np.isfinite(mse) & (mse >= 0)
    if not good.all():
        bad = int(np.argmin(good))
        raise ValueError(f"x_0_mse must be finite and at least 0; got {mse[bad]} at t={bad}")
    return mse


def _per_timestep(name: str, given: Any, num_train_timesteps: int) -> Array:
    """A number of each t, as (T,) float64."""
    try:
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except ValueError:  # rows of unequal length
        values = np.asarray("")
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a list of numbers, got {given!r:.200}")
    if values.shape != (num_train_timesteps,):
        raise ValueError(
            f"{name} must hold num_train_timesteps={num_train_timesteps} values, got shape"
            f" {values.shape}"
        )
    return values.astype(np.float64)


def check_signal_left(prediction_type: str, log_alphas: Array) -> None:
    """Enough signal at the last step for a network that predicts the noise."""
    left = np.exp(log_alphas.sum() / 2)
    if prediction_type == "epsilon" and left < np.finfo(np.float32).tiny:
        raise ValueError(
            "prediction_type 'epsilon' divides by the signal's amplitude, of which"
            f" {left:.0e} is left at the last step (zero terminal SNR): use 'v_prediction' or"
            " 'sample', or lower the betas"
        )


def check_same_table(name: str, given: Any, table: Tensor) -> None:
    """A table of the same values as `table`, on any device and of any floating dtype."""
    same = isinstance(given, Tensor) and given.is_floating_point() and given.shape == table.shape
    if same and not given.is_meta and not table.is_meta:
        same = torch.equal(given.detach().cpu(), table.detach().cpu().to(given.dtype))
    if not same:
        raise ValueError(
            f"{name} cannot be changed, because all coefficients come from the betas in float64:"
            " pass trained_betas to the constructor or to from_config"
        )


def check_timesteps(timesteps: Any, num_train_timesteps: int) -> Steps:
    """A custom trajectory, ascending."""
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"timesteps must be a sequence of integers, got {timesteps!r}")
    steps = [coefficient_tables.as_int(t) for t in values]
    falling = all(a > b for a, b in pairwise(steps))
    if not steps or not falling or steps[0] >= num_train_timesteps or steps[-1] < 0:
        raise ValueError(
            f"timesteps must be strictly descending integers in 0..{num_train_timesteps - 1},"
            f" at least one; got {steps}"
        )
    return np.array(steps[::-1], dtype=np.int64)


def check_calibrated_timesteps(given: Any, num_train_timesteps: int) -> dict[str, Any]:
    """Trajectories by sampler and number of steps, as {"DDIM": {"10": [999, ...]}}."""
    try:
        found = {
            str(sampler): {
                str(int(K)): [coefficient_tables.as_int(t) for t in steps]
                for K, steps in of.items()
            }
            for sampler, of in given.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            'calibrated_timesteps must be timesteps by sampler and number, as {"DDIM": {10: [999,'
            f" ...]}}}}, got {given!r:.200}"
        ) from None
    for sampler, of in found.items():
        for K, steps in of.items():
            check_timesteps(steps, num_train_timesteps)
            if len(steps) != int(K):
                raise ValueError(
                    f"calibrated_timesteps of {sampler} must hold {K} timesteps for {K}: {steps}"
                )
    return found


def check_recommended(given: Any, num_train_timesteps: int) -> dict[str, Any]:
    """A sampler by name, and its number of steps."""
    try:
        name, K = given["scheduler"], given["num_inference_steps"]
    except (LookupError, TypeError):
        name, K = None, None
    if not isinstance(name, str) or len(name) > 200:
        raise TypeError(
            'recommended must be as {"scheduler": "DDIM", "num_inference_steps": 25}, got'
            f" {given!r:.200}"
        )
    check_int("num_inference_steps", K, 1, num_train_timesteps)
    return {"scheduler": name, "num_inference_steps": K}


def check_device(device: Any) -> torch.device | None:
    """What torch takes for a device; None stands for the CPU."""
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch asserts that CUDA is there
        raise ValueError(f"device must be a torch device, got {device!r}: {error}") from None


def check_tensor(name: str, x: Any, like: Tensor | None = None, widen: int = 1) -> None:
    """A floating-point tensor, shaped like `like` but with `widen` times the channels."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if like is None:
        if x.ndim == 0:
            raise ValueError(f"{name} must be (B, ...), got a tensor without dimensions")
        return
    if like.ndim < widen:
        raise ValueError(f"sample must be (B, C, ...) for this variance_type, got {like.shape}")
    shape = like.shape if widen == 1 else (len(like), widen * like.shape[1], *like.shape[2:])
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} to fit {tuple(like.shape)} and the variance"
            f" type, got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the sample is, got {x.device}")


def check_generators(generator: Any, batch_size: int) -> None:
    """None, one generator, or one per image."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    each = generator if isinstance(generator, list | tuple) else [None]
    if not all(isinstance(one, torch.Generator) for one in each):
        raise TypeError(
            "generator must be a torch.Generator or a list of them, one per image, got"
            f" {generator!r}; make one with torch.Generator().manual_seed(0)"
        )
    if len(each) != batch_size:
        raise ValueError(
            f"generator is a list of {len(each)} for batch_size={batch_size}; pass one generator,"
            " or exactly one per image"
        )
