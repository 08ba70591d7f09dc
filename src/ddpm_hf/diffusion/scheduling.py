"""Gaussian diffusion of DDPM (2006.11239) as a diffusers scheduler.

Notation: timesteps start at 0, as in diffusers, so `t` in code is timestep t + 1 of the paper, and
the clean image precedes t = 0. "prev" is the next smaller timestep of the trajectory: t - 1 in the
training chain, otherwise the next smaller one chosen by `set_timesteps`.

    q(x_t | x_0)         = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              eq. 4
    q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, posterior_var I)            eq. 6, 7
    p(x_prev | x_t)      = q(x_prev | x_t, x_0_hat) with the network's estimate of x_0  eq. 11, 15

The first two are in `forward_process.py`, the third in `reverse_process.py`, and the derivation of
their coefficients in `coefficients.py`. Travels with the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

# diffusers looks up SchedulerMixin in the module of a scheduler to find its loading method.
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin  # noqa: F401
from torch import Tensor

# Modules, not names: the remote code loader of diffusers resolves `from .x import y` elsewhere.
from . import (
    checks,
    coefficient_tables,
    config_checks,
    inference_timesteps,
    reverse_process,
    scheduler_config,
    schedules,
)

Array = schedules.Array
Timestep = coefficient_tables.Timestep


class GaussianDDPMScheduler(reverse_process.ReverseProcess, inference_timesteps.InferenceTimesteps):
    """Drop-in replacement of `DDPMScheduler` with the same configuration keys and defaults.

    Differs from diffusers 0.42.1: the last step of every trajectory adds no noise, not only t = 0;
    "fixed_large_log" does not give NaN, and "learned" is a log-variance; "trailing" never visits
    t = -1, and an offset never reaches T; arithmetic is at least float32, on tables of full
    precision; settings that cannot sample raise an error in the constructor. `betas`, `alphas` and
    `alphas_cumprod` can be read and moved; to change them, pass `trained_betas`.

    Args:
        num_train_timesteps: T, the length of the training chain, 1 to 100000.
        beta_start: first beta, in (0, 1), of schedules with a range of betas, such as "linear".
        beta_end: last beta, in (0, 1), of schedules with a range of betas.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" (cosine), "sigmoid" or
            "laplace" as in diffusers; "quad", "const", "jsd", "warmup10" and "warmup50" of the DDPM
            code; "cosine" (parameters "offset" and "cap"), "iddpm_linear" (scaled to T),
            "chen_sigmoid" (2301.10972; "start", "end" and "tau") or "laplace_log_snr" (2407.03297;
            "mu" and "b"). Schedules that diffusers lacks are saved as `trained_betas`, which it can
            load.
        trained_betas: T betas in (0, 1), instead of a named schedule; the last may be 1.
        variance_type: type of the reverse variance. "fixed_small" is the posterior variance,
            "fixed_large" is beta_t; the "_log" variants give the same distributions. The network
            predicts the log-variance for "learned" and, as 2 v - 1 in [-1, 1], v of 2102.09672,
            eq. 15, for "learned_range", in the second half of its output channels.
        clip_sample: clamp the estimate of x_0 to [-clip_sample_range, clip_sample_range]. Disable
            it or widen the range for data outside of [-1, 1], such as latents.
        prediction_type: prediction target of the network: "epsilon", "sample" (x_0) or
            "v_prediction".
        thresholding: dynamic thresholding of the estimate of x_0 (2205.11487) instead of clipping;
            for images in [-1, 1], not for latents.
        dynamic_thresholding_ratio: quantile of abs(x_0) used as the threshold, in (0, 1].
        clip_sample_range: bound of `clip_sample`; positive.
        sample_max_value: upper bound of the threshold, at least 1; 1 is plain clipping.
        timestep_spacing: "leading", "linspace" or "trailing" (2305.08891, table 2).
        steps_offset: added to "leading" timesteps, which stay below T.
        rescale_betas_zero_snr: rescale the betas to zero terminal SNR (2305.08891). Requires the
            prediction type "sample" or "v_prediction", and "trailing" to visit the last step.
        beta_schedule_params: parameters of the schedule by name, such as {"tau": 0.7}.
        x_0_mse: mean squared error m_t of the network's estimate of x_0 at each t, T values, as
            measured by `ddpm_hf.calibrate`. It replaces the published reverse variance by
            beta~ + coef_x_0^2 m_t, which minimizes the bound for trajectories of any length
            (2201.06503). A learned variance then only distributes it over the values of an image.
            Dropped when betas or prediction type change.
        calibrated_timesteps: timesteps by sampler and number of steps, as found by
            `ddpm-hf calibrate --timesteps`: {"DDIM": {10: [999, ...]}}. Dropped like `x_0_mse`.
        recommended: the cheapest sampler as good as the best one, as found by
            `ddpm-hf calibrate --sweep`: {"scheduler": "DDIM:timestep_spacing=trailing",
            "num_inference_steps": 25}. It does not affect samples. Dropped like `x_0_mse`.

    Raises:
        TypeError, ValueError: for values that cannot sample, naming argument, value and choices.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    ignore_for_config = [  # noqa: RUF012
        "beta_schedule_params",
        "x_0_mse",
        "calibrated_timesteps",
        "recommended",
    ]
    order = 1

    @scheduler_config.registered
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | Array | Tensor | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        beta_schedule_params: dict[str, float] | None = None,
        x_0_mse: Sequence[float] | Array | Tensor | None = None,
        calibrated_timesteps: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
        recommended: Mapping[str, str | int] | None = None,
    ) -> None:
        config_checks.check_config(self.config)
        # `from_config` of another class drops values marked as defaults: mark none.
        self.register_to_config(_use_default_values=[])
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_betas(self._resolve_betas(beta_schedule_params or {}))
        self._set_calibration(
            x_0_mse=x_0_mse, calibrated_timesteps=calibrated_timesteps, recommended=recommended
        )
        config_checks.check_terminal_signal(self.config.prediction_type, self._log_alphas)
        self._set_trajectory(np.arange(num_train_timesteps))
        config_checks.warn_of_poor_settings(self.config, self._log_alphas)

    def _get_variance(
        self,
        t: Timestep,
        predicted_variance: Tensor | None = None,
        variance_type: str | None = None,
    ) -> Tensor | None:
        """Compatibility with code for `DDPMScheduler`; use `p_mean_variance` in new code.

        Returns:
            As in diffusers: the variance; the standard deviation for "fixed_small_log"; the
            log-variance for "fixed_large_log" and "learned_range"; `predicted_variance` for
            "learned".
        """
        kind = self.config.variance_type if variance_type is None else variance_type
        checks.check_choice("variance_type", kind, config_checks.VARIANCE_TYPES)
        if kind == "learned":
            return predicted_variance
        like = torch.empty((), device=self._timesteps.device, dtype=torch.float32)
        small = self._trajectory.posterior.at(t, like)
        large = self._trajectory.forward.at(t, like).sigma.square()
        if kind == "learned_range":
            if predicted_variance is None:
                raise ValueError(
                    "`predicted_variance` must be a tensor for `variance_type` 'learned_range', got"
                    " None"
                )
            return torch.lerp(small.log_variance, large.log(), (predicted_variance + 1) / 2)
        by_type = {
            "fixed_small": small.variance.clone(),
            "fixed_small_log": small.variance.sqrt(),
            "fixed_large": large,
            "fixed_large_log": large.log(),
        }
        return by_type[kind]

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample unchanged: DDPM does not scale the network's input."""
        return sample


def as_gaussian_scheduler(scheduler: Any) -> GaussianDDPMScheduler:
    """The scheduler as a `GaussianDDPMScheduler`.

    Args:
        scheduler: a `GaussianDDPMScheduler`, returned unchanged; a `DDPMScheduler` of diffusers, or
            a `GaussianDDPMScheduler` loaded from the code in a checkpoint, converted by its
            configuration.

    Raises:
        TypeError: for any other sampler, whose reverse process differs.
    """
    if isinstance(scheduler, GaussianDDPMScheduler):
        return scheduler
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if type(scheduler) is DDPMScheduler or GaussianDDPMScheduler.__name__ in names:
        return GaussianDDPMScheduler.from_config(scheduler.config)
    raise TypeError(
        f"`scheduler` must be a GaussianDDPMScheduler or a DDPMScheduler, got"
        f" {type(scheduler).__name__}, which samples but defines no bound and does not train; use"
        " GaussianDDPMScheduler.from_config(scheduler.config)"
    )
