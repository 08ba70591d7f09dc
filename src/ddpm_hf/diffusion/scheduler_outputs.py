"""Return types of the scheduler. Travels with the weights."""

from collections import OrderedDict
from typing import NamedTuple

from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor


class Gaussian(NamedTuple):
    """Normal distribution with diagonal covariance; the fields broadcast with each other."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseGaussian(NamedTuple):
    """p(x_prev | x_t), and the estimate of x_0 that its mean is computed from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor


class StepKL(NamedTuple):
    """KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)) in nats, and the parameters of p.

    At the last step, whose mean is the estimate of x_0, the bound contains -log p(x_0 | x_t)
    instead of the KL. `is_last` is 1 there, else 0.
    """

    kl: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor
    is_last: Tensor


class GaussianDDPMOutput(DDPMSchedulerOutput):  # type: ignore[misc]
    """Output of `step`: the fields of `DDPMSchedulerOutput`, as attributes and as items.

    The generic constructor of the parent class takes a fifth of the time of a small step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor

    def __init__(self, prev_sample: Tensor, pred_original_sample: Tensor) -> None:
        fields = {"prev_sample": prev_sample, "pred_original_sample": pred_original_sample}
        self.__dict__.update(fields)
        for name, value in fields.items():
            OrderedDict.__setitem__(self, name, value)
