"""Checks of arguments, whose errors name argument, value and choices.

Only values of CPU tensors are read, so no check synchronizes with a device. Travels with the
weights.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from . import coefficient_tables, schedules, timestep_spacings

# Ends of open intervals, as the nearest float inside.
ABOVE_0, BELOW_1 = float(np.nextafter(0, 1)), float(np.nextafter(1, 0))
FINITE = sys.float_info.max
Array = schedules.Array
Steps = timestep_spacings.Steps

MAX_IMAGES = 2**16  # a larger number is a typing error


def warn(message: str) -> None:
    """Issue a warning at the caller's line outside of this folder, diffusers and its loader."""
    files = (__file__, diffusers.__file__, huggingface_hub.__file__)
    internal = tuple(os.path.join(os.path.dirname(f), "") for f in files)
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(internal):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def error_in_file(file: object, error: Exception) -> ValueError:
    """The error of an argument that comes from a file: in double quotes, as a key of JSON."""
    reason = f"{error}".replace("`", '"')
    return ValueError(f"{file}: {reason}")


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


def check_finite_float(name: str, value: Any) -> None:
    """Check that the value is a finite number."""
    check_float(name, value, "that is finite", -FINITE, FINITE)


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
        also = " and this `variance_type`" if name == "model_output" else ""
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)} for a sample of shape {tuple(like.shape)}"
            f"{also}, got {tuple(x.shape)}"
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
