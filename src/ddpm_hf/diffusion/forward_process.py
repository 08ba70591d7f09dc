"""The forward process of DDPM (2006.11239) and its posterior.

    q(x_t | x_0)         = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              eq. 4
    q(x_t | x_prev)      = N(sqrt(alpha_t) x_prev, beta_t I)                          eq. 2
    q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, posterior_var I)            eq. 6, 7

Notation as in `scheduling.py`. Travels with the weights.
"""

from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from . import (
    coefficient_tables,
    coefficients,
    config_checks,
    scheduler_outputs,
    schedules,
    tensor_ops,
)

Array = schedules.Array
Timestep = coefficient_tables.Timestep
checked_pair = tensor_ops.checked_pair
with_dtype_of = tensor_ops.with_dtype_of
Gaussian = scheduler_outputs.Gaussian


class Float32Table:
    """Descriptor of a float32 table of the scheduler that other diffusers code reads.

    The table can be moved or cast, but its values cannot be changed: the scheduler computes from
    float64 tables, which would not change with it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, scheduler: None, owner: type) -> Self: ...

    @overload
    def __get__(self, scheduler: Any, owner: type) -> Tensor: ...

    def __get__(self, scheduler: Any, owner: type) -> Any:
        return self if scheduler is None else vars(scheduler)[f"_{self._name}"]

    def __set__(self, scheduler: Any, table: Tensor) -> None:
        present = vars(scheduler).get(f"_{self._name}")
        if present is not None:
            config_checks.check_unchanged(self._name, table, present)
        vars(scheduler)[f"_{self._name}"] = table


class ForwardProcess:
    """Base class of the scheduler: the forward process, which involves no network."""

    betas = Float32Table()
    alphas = Float32Table()
    alphas_cumprod = Float32Table()

    _trajectory: coefficients.Trajectory

    @torch.inference_mode(False)  # a scheduler made while sampling must also serve training
    def _set_betas(self, betas: Array) -> None:
        """Set the float64 tables, and the float32 tables that other diffusers code reads."""
        with np.errstate(divide="ignore"):  # log 0 at a last beta of 1
            self._log_alphas = np.log1p(-betas)
            self._marginal = coefficients.marginal(self._log_alphas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(self._log_alphas.cumsum())).float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """x_t from q(x_t | x_0) with the given noise (eq. 4).

        Args:
            original_samples: x_0, (B, ...), floating point.
            noise: standard normal noise, same shape.
            timesteps: t in [0, T), an int or (B,).

        Returns:
            x_t, in the dtype of `original_samples`. The arithmetic is at least float32.

        Raises:
            TypeError, ValueError: if shapes, dtypes or devices do not match, or if a timestep on
                the host is outside [0, T).
        """
        x_0, eps = checked_pair("original_samples", original_samples, "noise", noise)
        q = self._marginal.at(timesteps, x_0)
        return with_dtype_of(original_samples, (x_0 * q.signal).addcmul_(eps, q.sigma))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, the target of "v_prediction".

        Args:
            sample: x_0, (B, ...), floating point.
            noise: the noise eps passed to `add_noise`, same shape.
            timesteps: t in [0, T), an int or (B,).

        Returns:
            v, in the dtype of `sample`.

        Source: 2202.00512, section 4.
        """
        x_0, eps = checked_pair("sample", sample, "noise", noise)
        q = self._marginal.at(timesteps, x_0)
        return with_dtype_of(sample, (eps * q.signal).addcmul_(x_0, q.sigma, value=-1))

    def diffuse_one_step(self, x_prev: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """x_t from q(x_t | x_prev) with the given noise: one step of the forward process.

        Args:
            x_prev: x at the timestep that sampling visits after t, or x_0 if t is the last one;
                (B, ...).
            t: timesteps of the trajectory, an int or (B,).
            noise: standard normal noise, same shape.

        Returns:
            x_t, in the dtype of `x_prev`.

        Source: eq. 2.
        """
        x, eps = checked_pair("x_prev", x_prev, "noise", noise)
        q = self._trajectory.forward.at(t, x)
        return with_dtype_of(x_prev, (x * q.signal).addcmul_(eps, q.sigma))

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> Gaussian:
        """Mean, (B, ...), variance and log-variance, which broadcast, of q(x_t | x_0) (eq. 4).

        Args:
            x_0: clean images, (B, ...), floating point.
            t: timesteps in [0, T), an int or (B,).
        """
        x_0 = tensor_ops.checked("x_0", x_0)
        q = self._marginal.at(t, x_0)
        return Gaussian(x_0 * q.signal, *tensor_ops.variance_and_log(q, x_0))

    def q_posterior_mean_variance(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> Gaussian:
        """Mean, (B, ...), variance and log-variance, which broadcast, of q(x_prev | x_t, x_0).

        Args:
            x_0: clean images, (B, ...), floating point.
            x_t: noisy images at t, same shape.
            t: timesteps of the trajectory, an int or (B,).

        Returns:
            The posterior. At the last step of the trajectory its variance is 0, and log_variance is
            that of the step before (2102.09672), or log beta_t if there is only one step.

        Source: eq. 6 and 7.
        """
        x_0, x_t = checked_pair("x_0", x_0, "x_t", x_t)
        q = self._trajectory.posterior.at(t, x_0)
        mean = (x_t * q.coef_x_t).addcmul_(x_0, q.coef_x_0)
        return Gaussian(mean, *tensor_ops.variance_and_log(q, x_0))

    def snr(self, t: Timestep, dtype: torch.dtype = torch.float32) -> Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), in the shape of t (2107.00630)."""
        like = _like(t, dtype)
        return tensor_ops.copy_like(self._marginal.at(t, like).snr, like)

    def log_snr(self, t: Timestep, dtype: torch.dtype = torch.float32) -> Tensor:
        """Natural logarithm of `snr`, in the shape of t; -inf where alpha_bar_t is 0."""
        like = _like(t, dtype)
        return tensor_ops.copy_like(self._marginal.at(t, like).log_snr, like)


def _like(t: Timestep, dtype: torch.dtype) -> Tensor:
    """An empty tensor with the shape and device of t, for looking up coefficients."""
    shape, device = (t.shape, t.device) if isinstance(t, Tensor) else ((), None)
    return torch.empty(shape, device=device, dtype=dtype)
