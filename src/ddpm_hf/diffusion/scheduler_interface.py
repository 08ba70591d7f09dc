# SPDX-License-Identifier: Apache-2.0
"""Requirements of the pipeline on a scheduler, its own or another one of diffusers."""

import copy
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from . import (
    checks,
    coefficients,
    config_extension,
    scheduling,
    tensor_ops,
    timestep_spacings,
)

Generators = tensor_ops.Generators
GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler

# A scheduler without alphas_cumprod has other noise levels (EDM's, for example): its samples would
# be wrong.
REQUIRED_ATTRIBUTES = (
    "set_timesteps", "step", "scale_model_input", "init_noise_sigma", "alphas_cumprod",
)  # fmt: skip
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler samples from noise over the betas of training.

    Raises:
        TypeError: naming the class of another scheduler.
    """
    kind = type(scheduler).__name__
    is_complete = all(hasattr(scheduler, name) for name in REQUIRED_ATTRIBUTES)
    if not isinstance(scheduler, SchedulerMixin) or not is_complete:
        raise TypeError(
            "`scheduler` must be a diffusers scheduler over the betas that the network was trained "
            f"with, got {kind}; use GaussianDDPMScheduler, DDIMScheduler, "
            "DPMSolverMultistepScheduler or another one with alphas_cumprod"
        )
    if "Inverse" in kind:
        raise TypeError(
            f"`scheduler` must sample images from noise, but {kind} inverts sampling; use "
            "GaussianDDPMScheduler.inverse_step for inversion"
        )
    parameters = inspect.signature(scheduler.step).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if missing := sorted(required - {"model_output", "timestep", "sample"}):
        raise TypeError(
            f"`scheduler` must sample from noise alone, but each step of {kind} requires "
            f"{' and '.join(missing)}"
        )


def step_options(scheduler: Any, generator: Generators, eta: float | None) -> dict[str, Any]:
    """Keyword arguments for `scheduler.step`, without those that it does not accept.

    Raises:
        ValueError: for an `eta` outside [0, 1] or one that the scheduler does not accept.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if eta is not None:
        checks.check_float("eta", eta, "in [0, 1]", 0, 1)
        if "eta" not in accepted:
            raise ValueError(
                f"`eta` is not supported by {type(scheduler).__name__}, got {eta}; leave it out"
            )
    options = {"generator": generator, "eta": eta}
    return {k: v for k, v in options.items() if v is not None and k in accepted}


def num_outputs(config: Any, scheduler: Any) -> int:
    """Number of output channels of a network that a scheduler reads.

    Args:
        config: configuration of the network.
        scheduler: its `variance_type` decides whether there are channels for the variance.
    Raises:
        ValueError: if the network has another number of output channels.
    """
    channels: int = config.in_channels
    is_own = type(scheduler).__name__ == config_extension.GAUSSIAN_SCHEDULER
    variance_type = scheduler.config.get("variance_type")
    needed = 2 * channels if is_own and coefficients.is_learned(variance_type) else channels
    # Other schedulers ignore a learned variance: they get the channels of the mean.
    allowed = (needed,) if is_own else (channels, 2 * channels)
    if config.out_channels not in allowed:
        raise ValueError(
            f"unet.config.out_channels must be {' or '.join(map(str, allowed))} for {channels} "
            f"image channels and variance_type={variance_type!r}, got {config.out_channels}"
        )
    return needed


def set_timesteps(scheduler: Any, num_steps: int | None, timesteps: Any) -> None:
    """Set the timesteps of a scheduler on the CPU, where a loop reads them without a device sync.

    Args:
        scheduler: scheduler that passed `check_scheduler`.
        num_steps: K in [1, T]; by default the scheduler's usual number.
        timesteps: timesteps instead of a number, strictly descending in [0, T).
    Raises:
        TypeError, ValueError: for invalid arguments, and if the scheduler cannot make these steps.
    """
    kind, T = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if timesteps is not None:
        if num_steps is not None:
            raise ValueError("pass either `num_inference_steps` or `timesteps`, not both")
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"`timesteps` is not supported by {kind}, got {timesteps!r:.100}; pass "
                "`num_inference_steps`"
            )
        checks.check_timesteps(timesteps, T)
        _set_and_check(scheduler, f"`timesteps` {timesteps!r:.100}", timesteps=timesteps)
        return
    num_steps = timestep_spacings.usual_num_steps(kind, T) if num_steps is None else num_steps
    num_steps = checks.to_int("num_inference_steps", num_steps, 1, T)
    _set_and_check(scheduler, f"`num_inference_steps` {num_steps}", num_inference_steps=num_steps)


def _set_and_check(scheduler: Any, request: str, **options: Any) -> None:
    """Call `set_timesteps`; turn its errors and unusable timesteps into one ValueError."""
    kind = type(scheduler).__name__
    try:
        scheduler.set_timesteps(**options)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        if kind == config_extension.GAUSSIAN_SCHEDULER:  # its errors name the argument
            raise
        raise ValueError(f"{kind} does not support {request}: {error}") from None
    visited = scheduler.timesteps.tolist()
    if scheduler.timesteps.isnan().any():  # KDPM2 with betas that end in almost pure noise
        raise ValueError(
            f"{kind} does not support {request} with these betas: a timestep would be nan"
        )
    # A scheduler of second order goes back and forth within a step, and PNDM repeats its second.
    repeats = len(visited) > 1 and visited[0] == visited[1]
    rises = any(before < after for before, after in pairwise(visited))
    if scheduler.order == 1 and (repeats or rises):
        sigmas = [name for name in SIGMA_OPTIONS if scheduler.config.get(name)]
        hint = f", or turn off {' and '.join(sigmas)}" if sigmas else ""
        raise ValueError(
            f"{request} is too many for {kind} with these betas: its timesteps would be "
            f"{', '.join(f'{t:g}' for t in visited[:4])}, ... instead of descending; pass fewer "
            f"steps{hint}"
        )


def gaussian_copy(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> GaussianDDPMScheduler:
    """A copy as `GaussianDDPMScheduler` with this trajectory; all training timesteps by default.

    Another scheduler of diffusers gives its betas and its prediction type.
    """
    check_scheduler(scheduler)
    is_ours = isinstance(scheduler, GaussianDDPMScheduler)
    ours: GaussianDDPMScheduler = (
        copy.deepcopy(scheduler) if is_ours else GaussianDDPMScheduler.from_config(scheduler.config)
    )
    if num_inference_steps is None and timesteps is None:
        timesteps = range(len(ours) - 1, -1, -1)
    ours.set_timesteps(num_inference_steps, timesteps=timesteps)
    return ours


def with_options(scheduler: Any, timesteps: Sequence[int], **options: Any) -> GaussianDDPMScheduler:
    """A `GaussianDDPMScheduler` with other options and these timesteps, without calibration."""
    # An extension fits one prediction type; the betas that it names are also in the configuration.
    config = config_extension.with_extension(scheduler.config, {})
    changed: GaussianDDPMScheduler = GaussianDDPMScheduler.from_config(config, **options)
    changed.set_timesteps(timesteps=timesteps)
    return changed
