"""The forward process of DDPM (2006.11239): how images are noised, and what is known of it.

    q(x_t | x_0)         = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)              eq. 4
    q(x_t | x_prev)      = N(sqrt(alpha_t) x_prev, beta_t I)                          eq. 2
    q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, posterior_var I)            eq. 6, 7

Notation as in `scheduling.py`, beside which this file travels with the weights.
"""

from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from . import (
    checks,
    coefficient_tables,
    coefficients,
    scheduler_outputs,
    schedules,
    tensor_ops,
)

Array = schedules.Array
Timestep = coefficient_tables.Timestep
at_least_float32 = tensor_ops.at_least_float32
with_dtype_of = tensor_ops.with_dtype_of
Gaussian = scheduler_outputs.Gaussian


class PublicTable:
    """A float32 table for tools of diffusers: it can be read and moved, but not changed.

    What is computed comes from tables in float64, which a change of this one would not reach.
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
            checks.check_same_table(self._name, table, present)
        vars(scheduler)[f"_{self._name}"] = table


class ForwardProcess:
    """The part of a scheduler that no network takes part in."""

    betas = PublicTable()
    alphas = PublicTable()
    alphas_cumprod = PublicTable()

    _trajectory: coefficients.Trajectory

    @torch.inference_mode(False)  # a scheduler made while sampling must serve training later
    def _set_betas(self, betas: Array) -> None:
        """Tables: float64 to compute by, and their float32 roundings for tools of diffusers."""
        with np.errstate(divide="ignore"):  # log 0 at a last beta of 1
            self._log_alphas = np.log1p(-betas)
            self._marginal = coefficients.marginal(self._log_alphas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = torch.from_numpy(np.exp(self._log_alphas.cumsum())).float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """x_t from q(x_t | x_0), for given noise (eq. 4).

        Args:
            original_samples: x_0, (B, ...), floating point.
            noise: standard normal noise, same shape.
            timesteps: t in [0, T), an int or (B,).

        Returns:
            x_t, in the dtype of `original_samples`. The arithmetic is at least float32.

        Raises:
            TypeError, ValueError: for tensors that do not fit, or a t on the host outside [0, T).
        """
        checks.check_tensor("original_samples", original_samples)
        checks.check_tensor("noise", noise, original_samples)
        x_0 = at_least_float32(original_samples)
        eps = with_dtype_of(x_0, noise)
        q = self._marginal.at(timesteps, x_0)
        return with_dtype_of(original_samples, (x_0 * q.signal).addcmul_(eps, q.sigma))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, what "v_prediction" learns.

        Args:
            sample: x_0, (B, ...), floating point.
            noise: the eps of `add_noise`, same shape.
            timesteps: t in [0, T), an int or (B,).

        Returns:
            v, in the dtype of `sample`.

        Source: 2202.00512, section 4.
        """
        checks.check_tensor("sample", sample)
        checks.check_tensor("noise", noise, sample)
        x_0 = at_least_float32(sample)
        eps = with_dtype_of(x_0, noise)
        q = self._marginal.at(timesteps, x_0)
        return with_dtype_of(sample, (eps * q.signal).addcmul_(x_0, q.sigma, value=-1))

    def diffuse_one_step(self, x_prev: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """x_t from q(x_t | x_prev), for given noise: the recursion that `add_noise` jumps over.

        Args:
            x_prev: x at the previous element of the trajectory (x_0 before its last), (B, ...).
            t: elements of the trajectory, an int or (B,).
            noise: standard normal noise, same shape.

        Returns:
            x_t, in the dtype of `x_prev`.

        Source: eq. 2.
        """
        checks.check_tensor("x_prev", x_prev)
        checks.check_tensor("noise", noise, x_prev)
        x = at_least_float32(x_prev)
        eps = with_dtype_of(x, noise)
        q = self._trajectory.forward.at(t, x)
        return with_dtype_of(x_prev, (x * q.signal).addcmul_(eps, q.sigma))

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> Gaussian:
        """q(x_t | x_0): mean (B, ...), variance and its log, which broadcast (eq. 4).

        Args:
            x_0: clean images, (B, ...), floating point.
            t: in [0, T), an int or (B,).
        """
        checks.check_tensor("x_0", x_0)
        x_0 = at_least_float32(x_0)
        q = self._marginal.at(t, x_0)
        return Gaussian(x_0 * q.signal, *tensor_ops.variance_and_log(q, x_0))

    def q_posterior_mean_variance(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> Gaussian:
        """q(x_prev | x_t, x_0): mean (B, ...), variance and its log, which broadcast.

        Args:
            x_0: clean images, (B, ...), floating point.
            x_t: noisy images at t, same shape.
            t: elements of the trajectory, an int or (B,).

        Returns:
            The variance is 0 at the last step. Its log is clipped there to that of the step before
            (2102.09672), or of beta_t where the trajectory has only one step.

        Source: eq. 6 and 7.
        """
        checks.check_tensor("x_0", x_0)
        checks.check_tensor("x_t", x_t, x_0)
        x_0 = at_least_float32(x_0)
        x_t = with_dtype_of(x_0, x_t)
        q = self._trajectory.posterior.at(t, x_0)
        mean = (x_t * q.coef_x_t).addcmul_(x_0, q.coef_x_0)
        return Gaussian(mean, *tensor_ops.variance_and_log(q, x_0))

    def snr(self, t: Timestep, dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), in the shape of t in [0, T) (2107.00630)."""
        like = _like(t, dtype)
        return tensor_ops.as_tensor(self._marginal.at(t, like).snr, like)

    def log_snr(self, t: Timestep, dtype: torch.dtype = torch.float32) -> Tensor:
        """Natural log of `snr`: -inf where no signal is left."""
        like = _like(t, dtype)
        return tensor_ops.as_tensor(self._marginal.at(t, like).log_snr, like)


def _like(t: Timestep, dtype: torch.dtype) -> Tensor:
    """A tensor in the shape of t, which a coefficient of t is looked up for."""
    shape, device = (t.shape, t.device) if isinstance(t, Tensor) else ((), None)
    return torch.empty(shape, device=device, dtype=dtype)
