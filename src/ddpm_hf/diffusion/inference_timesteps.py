"""Timesteps of the sampling trajectory.

Notation as in `scheduling.py`. Travels with the weights.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import (
    checks,
    coefficient_tables,
    coefficients,
    config_checks,
    forward_process,
    scheduler_config,
    timestep_spacings,
)

Steps = timestep_spacings.Steps
Timestep = coefficient_tables.Timestep


class InferenceTimesteps(scheduler_config.PortableScheduler, forward_process.ForwardProcess):
    """Base class of the scheduler: chooses the timesteps and derives their coefficients."""

    num_inference_steps: int | None
    custom_timesteps: bool

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        timestep_spacing: str | None = None,
    ) -> None:
        """Set the timesteps of the sampling trajectory.

        Until this is called, the trajectory is the training chain T - 1, ..., 0. Sample with a copy
        of the scheduler while training with it.

        Args:
            num_inference_steps: number of timesteps, K in [1, T]. They are distinct. A trajectory
                of one step goes from x_t to the estimate of x_0.
            device: device of `timesteps` and of the coefficients; None for the CPU.
            timesteps: custom timesteps, strictly descending in [0, T), instead of a number.
            timestep_spacing: overrides the value in the configuration. One of "leading",
                "linspace", "trailing", "quadratic" (2010.02502); a respacing string of 2102.09672
                such as "10,10,20" or "ddim50", which also sets the number of steps; "likelihood",
                the timesteps from T - 1 to 0 with the lowest bound (2106.03802), which needs
                `x_0_mse` and is for likelihoods only: most timesteps are near t = 0, so samples get
                worse; or "calibrated", the timesteps found by `ddpm-hf calibrate --timesteps` for
                DDIM (eta = 0).

        Raises:
            TypeError, ValueError: for invalid arguments, naming argument, value and choices.
        """
        if timesteps is None:
            ascending = self._spaced_timesteps(num_inference_steps, timestep_spacing)
        elif num_inference_steps is None and timestep_spacing is None:
            ascending = checks.check_timesteps(timesteps, len(self))
        else:
            raise ValueError(
                "`timesteps` excludes `num_inference_steps` and `timestep_spacing`; pass one, got"
                f" {timesteps!r}, {num_inference_steps!r} and {timestep_spacing!r}"
            )
        self._set_trajectory(ascending, checks.check_device(device))
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(ascending)

    def _spaced_timesteps(self, num_steps: Any, spacing: Any) -> Steps:
        T = len(self)
        is_given = spacing is not None  # a configured one is often a default: no warning
        spacing = spacing if is_given else self.config.timestep_spacing
        if isinstance(spacing, str) and re.fullmatch("ddim[0-9]+|[0-9]+(,[0-9]+)*", spacing):
            steps = timestep_spacings.section_timesteps(spacing, T)
            config_checks.warn_of_remaining_signal(spacing, int(steps[-1]), self._log_alphas)
            if num_steps not in (None, len(steps)):
                raise ValueError(
                    f"`num_inference_steps` must be {len(steps)}, the number of timesteps of"
                    f" `timestep_spacing` {spacing!r}, got {num_steps!r}; leave it out"
                )
            return steps
        measured = {"likelihood": self._likelihood_timesteps, "calibrated": self._ddim_timesteps}
        choices = (*timestep_spacings.SPACINGS, *measured, "10,10,20", "ddim50")
        checks.check_choice("timestep_spacing", spacing, choices)
        if spacing in measured:
            return measured[spacing](num_steps)
        num_steps = checks.to_int("num_inference_steps", num_steps, 1, T)
        steps = timestep_spacings.SPACINGS[spacing](num_steps, T, self.config.steps_offset)
        if is_given:
            config_checks.warn_of_remaining_signal(spacing, int(steps[-1]), self._log_alphas)
        return steps

    def _likelihood_timesteps(self, num_steps: Any) -> Steps:
        if self.x_0_mse is None:
            raise ValueError(
                "`timestep_spacing` 'likelihood' needs a calibrated scheduler, but `x_0_mse` is"
                " None; run `ddpm-hf calibrate` or ddpm_hf.calibrate"
            )
        checks.check_int(
            "num_train_timesteps", len(self), 2, timestep_spacings.MAX_LIKELIHOOD_TIMESTEPS
        )
        num_steps = checks.to_int("num_inference_steps", num_steps, 2, len(self))
        snr = self.snr(torch.arange(len(self)), torch.float64).numpy()
        return timestep_spacings.likelihood_timesteps(snr, self.x_0_mse.numpy(), num_steps)

    def _ddim_timesteps(self, num_steps: Any) -> Steps:
        by_num_steps = self.calibrated_timesteps.get("DDIM", {})
        if num_steps not in by_num_steps:
            if not by_num_steps:
                raise ValueError(
                    "`timestep_spacing` 'calibrated' needs calibrated timesteps, but this scheduler"
                    " has none; run `ddpm-hf calibrate --timesteps`"
                )
            low, high = min(by_num_steps), max(by_num_steps)
            raise ValueError(
                f"`num_inference_steps` must be an int in [{low}, {high}] for `timestep_spacing`"
                f" 'calibrated', got {num_steps!r}"
            )
        return checks.check_timesteps(by_num_steps[num_steps], len(self))

    def _set_trajectory(self, ascending: Steps, device: torch.device | None = None) -> None:
        config, mse = self.config, self.x_0_mse
        trajectory = coefficients.Trajectory(
            self._log_alphas,
            ascending,
            config.prediction_type,
            config.variance_type,
            None if mse is None else mse.numpy()[ascending],
        )
        for eta in (1.0, 0.0):  # torch.compile cannot make these tables inside of `step`
            trajectory.reverse(eta).on(device or torch.device("cpu"), torch.float32)
        if trajectory.has_pixel_variance:
            trajectory.pixel_variance(1.0).on(device or torch.device("cpu"), torch.float32)
        with torch.inference_mode(False):
            self._timesteps = torch.from_numpy(ascending[::-1].astype(np.int64)).to(device)
        self._trajectory = trajectory

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the sampling trajectory in descending order, (K,) int64."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        """Set custom timesteps, as `set_timesteps(timesteps=...)` does."""
        self.set_timesteps(timesteps=timesteps, device=getattr(timesteps, "device", None))

    def trajectory_betas(self) -> Tensor:
        """beta of each step of the current trajectory, in the order of rising t, (K,) float64.

        As `trained_betas` of another scheduler they give the same marginals in K timesteps.
        """
        return torch.from_numpy(self._trajectory.beta.copy())

    def previous_timestep(self, timestep: Timestep) -> Tensor:
        """The timestep after `timestep` in sampling, 0-dim; -1, the clean image, after the last."""
        return torch.tensor(self._trajectory.previous(timestep), device=self._timesteps.device)

    def _adopt_extension(self, extension: Any) -> None:
        super()._adopt_extension(extension)
        if self.x_0_mse is not None:
            self._set_trajectory(np.arange(len(self)))  # with the calibrated variances
