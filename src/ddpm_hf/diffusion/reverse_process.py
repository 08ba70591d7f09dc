"""The reverse process of DDPM (2006.11239) and the terms of its variational bound.

    x_0_hat         = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)           eq. 15
    p(x_prev | x_t) = q(x_prev | x_t, x_0_hat), with a variance by `variance_type`         eq. 11
    step_kl         = KL(q(x_prev | x_t, x_0) || p(x_prev | x_t))                          eq. 5

DDIM (2010.02502) is the same process with less noise, `eta` below 1. Notation as in
`scheduling.py`. Travels with the weights.
"""

from typing import Any, Literal, overload

from torch import Tensor

from . import checks, coefficient_tables, coefficients, scheduler_outputs, tensor_ops

Timestep = coefficient_tables.Timestep
Generators = tensor_ops.Generators
checked = tensor_ops.checked
with_dtype_of = tensor_ops.with_dtype_of
GaussianDDPMOutput = scheduler_outputs.GaussianDDPMOutput
ReverseGaussian = scheduler_outputs.ReverseGaussian
StepKL = scheduler_outputs.StepKL


class ReverseProcess:
    """Base class of the scheduler: the reverse process, from outputs of the network."""

    config: Any
    _trajectory: coefficients.Trajectory

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts the reverse variance in a second half of output channels."""
        return coefficients.is_learned(self.config.variance_type)

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
                on a device is not read, which would synchronize: one in [0, T) that is not in the
                trajectory gives NaN, and at the last step noise is drawn and multiplied by 0.
        """
        x_t, t = checked("sample", sample), coefficient_tables.host_timestep(timestep)
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
        noise from which `step(..., eta=0)` samples nearly that image, the nearer the more steps.

        Args:
            model_output: network output at (sample, timestep), as for `step`.
            timestep: a timestep of the trajectory except its first.
            sample: x_t, (B, ...), floating point.

        Returns:
            x at the next noisier timestep, in the dtype of `sample`.

        Source: 2010.02502, eq. 12 at sigma = 0 and section 4.3.
        """
        x_t = checked("sample", sample)
        inversion = self._trajectory.inversion.at(timestep, x_t)
        output, _ = self._split(model_output, x_t, timestep, 0.0)
        x_0_hat = self._predict_x_0(output, x_t, self._reverse(0.0).at(timestep, x_t))
        x_next = (x_t * inversion.coef_x_t).addcmul_(x_0_hat, inversion.coef_x_0)
        return with_dtype_of(sample, x_next)

    def _reverse(
        self, eta: float
    ) -> coefficient_tables.CoefficientTable[coefficient_tables.ReverseStep]:
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
        self, output: Tensor, x_t: Tensor, row: coefficient_tables.ReverseStep, clip: bool = True
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
        x_t = checked("x_t", x_t)
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
        x_0, x_t = tensor_ops.checked_pair("x_0", x_0, "x_t", x_t)
        checks.check_float("eta", eta, "in (0, 1] (eta = 0 has no bound)", checks.ABOVE_0, 1.0)
        output, v = self._split(model_output, x_t, t, eta)
        x_0_hat = self._predict_x_0(output, x_t, self._reverse(eta).at(t, x_t), clip)
        row = self._trajectory.bound_term(eta).at(t, x_t)
        log_ratio = row.log_ratio if v is None else v * row.slope + row.log_ratio
        mean_term = ((x_0 - x_0_hat) * row.scale).square() * row.weight * log_ratio.exp()
        kl = mean_term + tensor_ops.expm1_minus(log_ratio) / 2
        return StepKL(kl, row.log_variance - log_ratio, x_0_hat, row.is_last)
