"""Coefficients of the distributions of DDPM at a timestep (2006.11239), as named tuples.

Their fields are tensors on the device and in the dtype of the sample: 0-dim for a single timestep,
(B, 1, ...) for one timestep per image. Travels with the weights.
"""

from typing import NamedTuple

from torch import Tensor


class Marginal(NamedTuple):
    """q(x_t | x_0): x_t = signal x_0 + sigma eps (eq. 4)."""

    signal: Tensor
    sigma: Tensor
    variance: Tensor
    log_variance: Tensor
    snr: Tensor
    log_snr: Tensor


class ForwardStep(NamedTuple):
    """q(x_t | x_prev): x_t = signal x_prev + sigma eps (eq. 2)."""

    signal: Tensor
    sigma: Tensor


class Posterior(NamedTuple):
    """q(x_prev | x_t, x_0) (eq. 7)."""

    coef_x_0: Tensor
    coef_x_t: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseStep(NamedTuple):
    """One sampling step; with a learned variance, its std is `std * std_base ** v`."""

    x_0_from_output: Tensor
    x_0_from_x_t: Tensor
    coef_x_0: Tensor
    coef_x_t: Tensor
    std: Tensor
    std_base: Tensor


class ReverseVariance(NamedTuple):
    """Variance of p(x_prev | x_t); a learned one has the log `log_variance + slope * v`."""

    variance: Tensor
    log_variance: Tensor
    slope: Tensor


class StepKL(NamedTuple):
    """KL(q || p) of one step, (expm1 r - r)/2 + weight e^r (x_0 - x_0_hat)^2, in nats.

    r = log_ratio + slope * v is log sigma_q^2 - log sigma_p^2; log_variance is log sigma_q^2.
    weight is coef_x_0^2 / (2 sigma_q^2), half the decrease of the SNR in the step.
    """

    weight: Tensor
    log_ratio: Tensor
    slope: Tensor
    log_variance: Tensor
    is_last: Tensor


class PixelVariance(NamedTuple):
    """Calibrated variance of p, distributed over the values of an image by the network's v.

    log_ratio + slope * v is log(sigma^2 / beta~) predicted by v for the training chain, and
    log sigma^2 at t = 0. posterior is beta~ of this trajectory, calibrated the mean variance that
    m_t adds; both are divided by eta^2.
    """

    posterior: Tensor
    calibrated: Tensor
    log_ratio: Tensor
    slope: Tensor
    is_zero: Tensor


class InversionStep(NamedTuple):
    """x_next = coef_x_0 x_0 + coef_x_t x_t: the noiseless step to the next noisier timestep."""

    coef_x_0: Tensor
    coef_x_t: Tensor
