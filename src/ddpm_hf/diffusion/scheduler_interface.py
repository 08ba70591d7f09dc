# SPDX-License-Identifier: Apache-2.0
"""What the pipeline asks of a scheduler, be it its own or another of diffusers. Travels with the
weights.
"""

import inspect
from itertools import pairwise
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from . import checks, coefficients, config_extension, schedules, tensor_ops

Generators = tensor_ops.Generators

# Without alphas_cumprod a scheduler takes other noise levels (EDM's, say) and would draw garbage.
NEEDED = ("set_timesteps", "step", "scale_model_input", "init_noise_sigma", "alphas_cumprod")
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def check_scheduler(scheduler: Any) -> None:
    """Refuse what does not sample images from noise over the betas that a network was trained on.

    Raises:
        TypeError: naming the scheduler.
    """
    kind = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin) or not all(hasattr(scheduler, n) for n in NEEDED):
        raise TypeError(
            "scheduler must be a diffusers scheduler over the betas that the network was trained "
            f"on, got {kind}; use GaussianDDPMScheduler, DDIMScheduler, "
            "DPMSolverMultistepScheduler or another with alphas_cumprod"
        )
    if "Inverse" in kind:
        raise TypeError(
            f"scheduler must sample, but {kind} inverts: it goes from images to noise; "
            "GaussianDDPMScheduler has inverse_step for that"
        )
    parameters = inspect.signature(scheduler.step).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if lacking := sorted(required - {"model_output", "timestep", "sample"}):
        raise TypeError(
            f"scheduler must sample from noise alone, but each step of {kind} needs "
            f"{' and '.join(lacking)}"
        )


def step_options(scheduler: Any, generator: Generators, eta: float | None) -> dict[str, Any]:
    """What this scheduler's `step` understands of the pipeline's arguments."""
    accepted = inspect.signature(scheduler.step).parameters
    if eta is not None:
        checks.check_float("eta", eta, "in [0, 1]", 0, 1)
        if "eta" not in accepted:
            raise ValueError(f"eta={eta}: {type(scheduler).__name__} has no eta")
    options = {"generator": generator, "eta": eta}
    return {k: v for k, v in options.items() if v is not None and k in accepted}


def num_outputs(config: Any, scheduler: Any) -> int:
    """How many of a network's output channels this scheduler reads.

    Args:
        config: of the network.
        scheduler: by its `variance_type`.

    Raises:
        ValueError: if the network has other channels.
    """
    channels: int = config.in_channels
    is_own = type(scheduler).__name__ == config_extension.GAUSSIAN_SCHEDULER
    variance_type = scheduler.config.get("variance_type")
    needed = 2 * channels if is_own and coefficients.is_learned(variance_type) else channels
    # Other schedulers have no use for a learned variance: they get the mean's channels.
    allowed = (needed,) if is_own else (channels, 2 * channels)
    if config.out_channels not in allowed:
        raise ValueError(
            f"unet.config.out_channels is {config.out_channels}, but {channels} image channels "
            f"with variance_type={variance_type!r} need {' or '.join(map(str, allowed))}"
        )
    return needed


def set_timesteps(scheduler: Any, num_steps: int | None, timesteps: Any) -> None:
    """Choose the trajectory, on the host: a loop then reads it without asking the device.

    Args:
        scheduler: of `check_scheduler`.
        num_steps: K in [1, T]; by default as many as the scheduler is usually run with.
        timesteps: the timesteps, strictly descending in [0, T), in place of a number.

    Raises:
        TypeError, ValueError: for anything else, and where the scheduler cannot make so many steps.
    """
    kind, T = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if timesteps is not None:
        if num_steps is not None:
            raise ValueError("pass num_inference_steps or timesteps, not both")
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps={timesteps}: {kind} takes no list of timesteps")
        checks.check_timesteps(timesteps, T)
        _ask(scheduler, f"timesteps={timesteps!r:.100}", timesteps=timesteps)
        return
    num_steps = schedules.usual_num_steps(kind, T) if num_steps is None else num_steps
    num_steps = checks.to_int("num_inference_steps", num_steps, 1, T)
    _ask(scheduler, f"num_inference_steps={num_steps}", num_inference_steps=num_steps)


def _ask(scheduler: Any, asked: str, **options: Any) -> None:
    """`set_timesteps`, whatever it raises or leaves in a state that no step could work with."""
    kind = type(scheduler).__name__
    try:
        scheduler.set_timesteps(**options)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        if kind == config_extension.GAUSSIAN_SCHEDULER:  # its errors say what is wrong
            raise
        raise ValueError(f"{kind} cannot make {asked}: {error}") from error
    visited = scheduler.timesteps.tolist()
    # A scheduler of second order goes back and forth within a step, and PNDM repeats its second.
    repeats = len(visited) > 1 and visited[0] == visited[1]
    rises = any(before < after for before, after in pairwise(visited))
    if scheduler.order == 1 and (repeats or rises):
        sigmas = [name for name in SIGMA_OPTIONS if scheduler.config.get(name)]
        hint = f", or turn off {' and '.join(sigmas)}" if sigmas else ""
        raise ValueError(
            f"{asked} is too many for {kind} with these betas: it would visit the timesteps "
            f"{', '.join(f'{t:g}' for t in visited[:4])}, ..., which must go down; "
            f"pass fewer steps{hint}"
        )
