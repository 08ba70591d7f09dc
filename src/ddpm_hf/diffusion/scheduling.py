"""Gaussian diffusion of DDPM (2006.11239) as a diffusers scheduler.

Notation: timesteps start at 0, as in diffusers, so `t` in code is timestep t + 1 of the paper, and
the clean image precedes t = 0. "prev" is the next smaller timestep of the trajectory: t - 1 in the
training chain, otherwise the next smaller one chosen by `set_timesteps`.

    q(x_t | x_0)         = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              eq. 4
    q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, posterior_var I)            eq. 6, 7
    p(x_prev | x_t)      = q(x_prev | x_t, x_0_hat) with the network's estimate of x_0  eq. 11, 15

All files of this folder travel with the weights and import nothing from the rest of the package.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from diffusers import DDPMScheduler

# diffusers looks up SchedulerMixin in the module of a scheduler to find its loading method.
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin  # noqa: F401
from torch import Tensor

# Modules, not names: the remote code loader of diffusers resolves `from .x import y` elsewhere.
from . import (
    checks,
    coefficient_rows,
    coefficient_tables,
    coefficients,
    config_checks,
    inference_timesteps,
    scheduler_config,
    scheduler_outputs,
    schedules,
    tensor_ops,
)

Array = schedules.Array
Timestep = coefficient_tables.Timestep
Generators = tensor_ops.Generators
at_least_float32 = tensor_ops.at_least_float32
with_dtype_of = tensor_ops.with_dtype_of
GaussianDDPMOutput = scheduler_outputs.GaussianDDPMOutput
ReverseGaussian = scheduler_outputs.ReverseGaussian
StepKL = scheduler_outputs.StepKL


class GaussianDDPMScheduler(inference_timesteps.InferenceTimesteps):
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
            code; "cosine" (parameters "offset" and "cap"), "iddpm_linear" (linear for any T),
            "chen_sigmoid" (2212.11972; "start", "end" and "tau") or "laplace_log_snr" (2407.03297;
            "mu" and "b"). Schedules that diffusers lacks are saved as `trained_betas`, which it can
            load.
        trained_betas: T betas in (0, 1), instead of a named schedule; the last may be 1.
        variance_type: type of the reverse variance. "fixed_small" is the posterior variance,
            "fixed_large" is beta_t; the "_log" variants give the same distributions. The network
            predicts the log-variance for "learned", and v in [-1, 1] of 2102.09672, eq. 15, for
            "learned_range", in the second half of its output channels.
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

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts the reverse variance in a second half of output channels."""
        return coefficients.is_learned(self.config.variance_type)

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

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = ...,
        return_dict: Literal[True] = ...,
        *,
        variance_noise: Tensor | None = ...,
        eta: float = ...,
    ) -> GaussianDDPMOutput: ...

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = ...,
        *,
        return_dict: Literal[False],
        variance_noise: Tensor | None = ...,
        eta: float = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        eta: float = 1.0,
    ) -> GaussianDDPMOutput | tuple[Tensor, Tensor]:
        """Sample x_prev from p(x_prev | x_t); the last step of the trajectory returns the mean.

        Stateless, and without host-device synchronization. Under `torch.compile(fullgraph=True)`,
        pass `variance_noise`, `timestep` as a tensor, and an `eta` of 0, 1 or one used before.

        Args:
            model_output: network output at (sample, timestep), shaped like `sample`, with twice the
                channels for a learned variance.
            timestep: a timestep of the trajectory: an int, or a tensor, 0-dim or (B,).
            sample: x_t, (B, ...), floating point.
            generator: a single generator, or a list of one per image, which makes the noise of an
                image independent of its batch. A CPU generator works for every device.
            return_dict: return a `GaussianDDPMOutput`, else a tuple of its two fields.
            variance_noise: standard normal noise, shaped like `sample`, instead of drawing it.
            eta: scale of the noise, in [0, 1]: 1 is DDPM with the variance of `variance_type`;
                below 1 the variance is eta^2 beta~ for every `variance_type`, and 0 is
                deterministic DDIM (2010.02502, eq. 12 and 16). With `x_0_mse` the variance is
                eta^2 beta~ + coef_x_0^2 m_t: an `eta` just above 0 is Analytic-DDIM (2201.06503),
                and 0 is still deterministic.

        Returns:
            `prev_sample`, x_prev, and `pred_original_sample`, the estimate of x_0, both (B, ...) in
            the dtype of `sample`. Arithmetic is at least float32.

        Raises:
            TypeError, ValueError: if shapes, dtypes or values on the host are invalid. A timestep
                on a device is not read, which would synchronize: if it is not in the trajectory,
                the result is NaN, and at the last step noise is drawn and multiplied by 0.
        """
        checks.check_tensor("sample", sample)
        x_t, t = at_least_float32(sample), coefficient_tables.host_timestep(timestep)
        row = self._reverse(eta).at_host(t, x_t)
        output, v = self._split(model_output, x_t, t, eta)
        x_0_hat = self._predict_x_0(output, x_t, row)  # eq. 15
        is_noiseless = eta == 0 or (type(t) is int and t == self._trajectory.last)
        x_prev = tensor_ops.scaled_noise(row, v, x_t, generator, variance_noise, is_noiseless)
        x_prev.addcmul_(x_t, row.coef_x_t).addcmul_(x_0_hat, row.coef_x_0)  # eq. 7
        if x_t is not sample:
            x_prev, x_0_hat = x_prev.to(sample.dtype), x_0_hat.to(sample.dtype)
        if not return_dict:
            return x_prev, x_0_hat
        return GaussianDDPMOutput(x_prev, x_0_hat)

    def inverse_step(self, model_output: Tensor, timestep: Timestep, sample: Tensor) -> Tensor:
        """DDIM inversion: x at the next noisier timestep from x_t.

        Applied from the last to the second of `timesteps`, starting with an image as x_t, it gives
        the noise from which `step(..., eta=0)` samples that image.

        Args:
            model_output: network output at (sample, timestep), as for `step`.
            timestep: a timestep of the trajectory except its first.
            sample: x_t, (B, ...), floating point.

        Returns:
            x at the next noisier timestep, in the dtype of `sample`.

        Source: 2010.02502, eq. 12 at sigma = 0 and section 4.3.
        """
        checks.check_tensor("sample", sample)
        x_t = at_least_float32(sample)
        inversion = self._trajectory.inversion.at(timestep, x_t)
        output, _ = self._split(model_output, x_t, timestep, 0.0)
        x_0_hat = self._predict_x_0(output, x_t, self._reverse(0.0).at(timestep, x_t))
        x_next = (x_t * inversion.coef_x_t).addcmul_(x_0_hat, inversion.coef_x_0)
        return with_dtype_of(sample, x_next)

    def _reverse(
        self, eta: float
    ) -> coefficient_tables.CoefficientTable[coefficient_rows.ReverseStep]:
        if eta != 1.0:
            checks.check_float("eta", eta, "in [0, 1]", 0.0, 1.0)
        return self._trajectory.reverse(eta)

    def _split(
        self, model_output: Tensor, x_t: Tensor, t: Timestep, eta: float
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction, and v or the log-variance if the variance is learned, else None."""
        if not self._trajectory.is_learned:
            checks.check_tensor("model_output", model_output, x_t)
            return with_dtype_of(x_t, model_output), None
        checks.check_tensor("model_output", model_output, x_t, widen=2)
        output, v = with_dtype_of(x_t, model_output).chunk(2, dim=1)
        if self._trajectory.has_pixel_variance and eta > 0:
            v = tensor_ops.pixel_log_variance(self._trajectory.pixel_variance(eta).at(t, x_t), v)
        return output, v

    def _predict_x_0(
        self, output: Tensor, x_t: Tensor, row: coefficient_rows.ReverseStep, clip: bool = True
    ) -> Tensor:
        """The estimate of x_0, clipped or thresholded as configured (eq. 15)."""
        config = self.config
        x_0_hat = (output * row.x_0_from_output).addcmul_(x_t, row.x_0_from_x_t)
        if not clip:
            return x_0_hat
        if config.thresholding:
            return tensor_ops.threshold(
                x_0_hat, config.dynamic_thresholding_ratio, config.sample_max_value
            )
        if config.clip_sample:
            return x_0_hat.clamp_(-config.clip_sample_range, config.clip_sample_range)
        return x_0_hat

    def p_mean_variance(self, model_output: Tensor, t: Timestep, x_t: Tensor) -> ReverseGaussian:
        """Mean and variance of p(x_prev | x_t), for all prediction and variance types.

        Args:
            model_output: network output at (x_t, t), with twice the channels of x_t for a learned
                variance.
            t: timesteps of the trajectory, an int or (B,).
            x_t: noisy images, (B, ...), floating point.

        Returns:
            Mean and estimate of x_0, (B, ...); variance and log_variance, which broadcast; at least
            float32. At the last step, where `step` adds no noise, the variance of "fixed_small" is
            0; its log_variance, and both fields of "fixed_large", are those of beta~ at the step
            before (2102.09672), or of beta_t if there is only one step. With `x_0_mse` they are
            those of m_t.

        Source: eq. 11 and 15; 2102.09672, eq. 15.
        """
        checks.check_tensor("x_t", x_t)
        x_t = at_least_float32(x_t)
        output, v = self._split(model_output, x_t, t, 1.0)
        row = self._reverse(1.0).at(t, x_t)
        x_0_hat = self._predict_x_0(output, x_t, row)
        mean = (x_t * row.coef_x_t).addcmul_(x_0_hat, row.coef_x_0)  # eq. 7
        fixed = self._trajectory.reverse_variance.at(t, x_t)
        if v is None:
            return ReverseGaussian(mean, *tensor_ops.variance_and_log(fixed, x_t), x_0_hat)
        log_variance = v * fixed.slope + fixed.log_variance
        return ReverseGaussian(mean, log_variance.exp(), log_variance, x_0_hat)

    def step_kl(
        self,
        model_output: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        t: Timestep,
        *,
        clip: bool = True,
        eta: float = 1.0,
    ) -> StepKL:
        """KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)) per value: a term of the variational bound.

        Computed from the difference of x_0 and its estimate. The two means agree in nearly all
        digits at large t, so their difference would have no correct digit in float32.

        Args:
            model_output: network output at (x_t, t), as for `p_mean_variance`.
            x_0: clean images, (B, ...), floating point.
            x_t: noisy images at t, same shape.
            t: timesteps of the trajectory, an int or (B,).
            clip: clip or threshold the estimate of x_0 as in sampling. Clipped values pass no
                gradient to the mean.
            eta: scale of the noise as in `step`, in (0, 1].

        Returns:
            KL in nats and estimate of x_0, (B, ...); log_variance of p and is_last, which
            broadcast; at least float32.

        Source: eq. 5; for eta below 1 2010.02502, eq. 11.
        """
        checks.check_tensor("x_0", x_0)
        checks.check_tensor("x_t", x_t, x_0)
        checks.check_float("eta", eta, "in (0, 1] (eta = 0 has no bound)", checks.ABOVE_0, 1.0)
        x_0 = at_least_float32(x_0)
        x_t = with_dtype_of(x_0, x_t)
        output, v = self._split(model_output, x_t, t, eta)
        x_0_hat = self._predict_x_0(output, x_t, self._reverse(eta).at(t, x_t), clip)
        row = self._trajectory.step_kl(eta).at(t, x_t)
        log_ratio = row.log_ratio if v is None else v * row.slope + row.log_ratio
        mean_term = (x_0 - x_0_hat).square() * row.weight * log_ratio.exp()
        kl = mean_term + tensor_ops.expm1_minus(log_ratio) / 2
        return StepKL(kl, row.log_variance - log_ratio, x_0_hat, row.is_last)


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
