"""Which timesteps sampling visits, and with that what "prev" means.

Notation as in `scheduling.py`, beside which this file travels with the weights.
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
    forward_process,
    likelihood_timesteps,
    scheduler_config,
    schedules,
)

Steps = schedules.Steps
Timestep = coefficient_tables.Timestep


class VisitedTimesteps(scheduler_config.PortableScheduler, forward_process.ForwardProcess):
    """The part of a scheduler that chooses timesteps, and holds what follows from the choice."""

    num_inference_steps: int | None
    custom_timesteps: bool

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        timestep_spacing: str | None = None,
    ) -> None:
        """Choose which timesteps sampling visits, and with that what "prev" means.

        A scheduler that nobody called this on visits all of T-1, ..., 0. Where one trains and
        samples, let sampling have a copy.

        Args:
            num_inference_steps: K in [1, T]: exactly K distinct timesteps. A trajectory of one step
                goes from x_t to the estimate of x_0.
            device: where `self.timesteps` and the coefficients shall be; None for the CPU.
            timesteps: the timesteps, strictly descending in [0, T), in place of a number.
            timestep_spacing: in place of the configuration's: "leading", "linspace", "trailing",
                "quadratic" (2010.02502), or sections of 2102.09672 such as "10,10,20" or "ddim50",
                which give the number of steps, too; with `x_0_mse` "likelihood", the timesteps from
                T - 1 to 0 of the least bound (2106.03802). They are for the bound alone: most of
                them are near t = 0, and samples get worse; "calibrated", the timesteps that
                `ddpm-hf calibrate --timesteps` found for DDIM, that is for eta = 0.

        Raises:
            TypeError, ValueError: for anything else.
        """
        if timesteps is None:
            ascending = self._spaced_timesteps(num_inference_steps, timestep_spacing)
        elif num_inference_steps is None and timestep_spacing is None:
            ascending = checks.check_timesteps(timesteps, len(self))
        else:
            raise ValueError(
                "timesteps is in place of num_inference_steps and timestep_spacing: pass one, got"
                f" {timesteps!r}, {num_inference_steps!r} and {timestep_spacing!r}"
            )
        self._set_trajectory(ascending, checks.check_device(device))
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(ascending)

    def _spaced_timesteps(self, num_steps: Any, spacing: Any) -> Steps:
        T = len(self)
        spacing = self.config.timestep_spacing if spacing is None else spacing
        if isinstance(spacing, str) and re.fullmatch("ddim[0-9]+|[0-9]+(,[0-9]+)*", spacing):
            steps = schedules.section_timesteps(spacing, T)
            checks.warn_if_signal_is_missed(spacing, int(steps[-1]), self._log_alphas)
            if num_steps not in (None, len(steps)):
                raise ValueError(
                    f"num_inference_steps={num_steps!r}, but timestep_spacing {spacing!r} has"
                    f" {len(steps)} steps"
                )
            return steps
        own = {"likelihood": self._likelihood_timesteps, "calibrated": self._found_timesteps}
        choices = (*schedules.SPACINGS, *own, "10,10,20", "ddim50")
        checks.check_choice("timestep_spacing", spacing, choices)
        if spacing in own:
            return own[spacing](num_steps)
        num_steps = checks.to_int("num_inference_steps", num_steps, 1, T)
        steps = schedules.SPACINGS[spacing](num_steps, T, self.config.steps_offset)
        checks.warn_if_signal_is_missed(spacing, int(steps[-1]), self._log_alphas)
        return steps

    def _likelihood_timesteps(self, num_steps: Any) -> Steps:
        if self.x_0_mse is None:
            raise ValueError(
                "timestep_spacing 'likelihood' needs x_0_mse: calibrate the model, by"
                " `ddpm-hf calibrate` or ddpm_hf.calibrate"
            )
        checks.check_int("num_train_timesteps", len(self), 2, likelihood_timesteps.MAX_TIMESTEPS)
        num_steps = checks.to_int("num_inference_steps", num_steps, 2, len(self))
        snr = self.snr(torch.arange(len(self)), torch.float64).numpy()
        return likelihood_timesteps.likelihood_timesteps(snr, self.x_0_mse.numpy(), num_steps)

    def _found_timesteps(self, num_steps: Any) -> Steps:
        found = self.calibrated_timesteps.get("DDIM", {})
        if num_steps not in found:
            known = f"those were found for {min(found)} to {max(found)} steps" if found else "none"
            raise ValueError(
                "timestep_spacing 'calibrated' has no timesteps for"
                f" num_inference_steps={num_steps} of DDIM: {known}; `ddpm-hf calibrate"
                " --timesteps` finds them for 5 to 25"
            )
        return checks.check_timesteps(found[num_steps], len(self))

    def _set_trajectory(self, ascending: Steps, device: torch.device | None = None) -> None:
        config, mse = self.config, self.x_0_mse
        trajectory = coefficients.Trajectory(
            self._log_alphas,
            ascending,
            config.prediction_type,
            config.variance_type,
            None if mse is None else mse.numpy()[ascending],
        )
        for eta in (1.0, 0.0):  # made here, since torch.compile cannot make them inside of `step`
            trajectory.reverse(eta).on(device or torch.device("cpu"), torch.float32)
        if trajectory.is_shared:
            trajectory.sharing(1.0).on(device or torch.device("cpu"), torch.float32)
        with torch.inference_mode(False):
            self._timesteps = torch.from_numpy(ascending[::-1].astype(np.int64)).to(device)
        self._trajectory = trajectory

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that sampling visits, descending, (K,) int64."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        """Follow these from now on."""
        device = getattr(timesteps, "device", None)
        self._set_trajectory(checks.check_timesteps(timesteps, len(self)), device)

    def previous_timestep(self, timestep: Timestep) -> Tensor:
        """The timestep that `step` goes to from `timestep`, 0-dim; -1, the clean image, at last."""
        return torch.tensor(self._trajectory.previous(timestep), device=self._timesteps.device)

    def _adopt_extension(self, own: Any) -> None:
        super()._adopt_extension(own)
        if self.x_0_mse is not None:
            self._set_trajectory(np.arange(len(self)))  # of other variances
