# SPDX-License-Identifier: Apache-2.0
"""Guidance by any log-likelihood log p(y | x_t): of a class, a measurement, or a loss.

The score of p(x_t | y) is that of p(x_t) plus the gradient of log p(y | x_t). In terms of the
estimate of x_0, which every scheduler uses, that is

    x_0_hat + (1 - alpha_bar) / sqrt(alpha_bar) grad log p(y | x_t)      2209.14687, eq. 5

so that guidance works with every scheduler and every eta.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checks, tensor_ops

Denoiser = tensor_ops.Denoiser
Guidance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, x_0_hat, t) -> log p(y | x_t) up to a constant, (B,)."""


def guided_denoiser(
    denoiser: Denoiser, scheduler: Any, guidance: Guidance, weight: float = 1.0
) -> Denoiser:
    """The denoiser whose estimate of x_0 is moved towards higher log p(y | x_t).

    Args:
        denoiser: callable (x_t, t); with twice the channels of x_t for a learned variance, which is
            not changed.
        scheduler: gives prediction type and noise levels.
        guidance: callable (x_t, x_0_hat, t) -> (B,), differentiable with respect to x_t, directly
            or through x_0_hat. A loss is the negative of it.
        weight: factor of the gradient; 1 is Bayes' rule.

    Returns:
        a callable (x_t, t). It raises ValueError if `guidance` returns another shape, or a tensor
        without gradient.

    Source: 2105.05233, algorithm 2; 2209.14687, eq. 5.
    """
    checks.check_finite_float("guidance_weight", weight)
    kind = scheduler.config.get("prediction_type", "epsilon")

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        is_differentiated = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x_t = x_t if is_differentiated else x_t.detach().requires_grad_()
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH) if is_differentiated else nullcontext():
                output = tensor_ops.prediction_of(denoiser(x_t, t))
            mean_part = output[:, : x_t.shape[1]].to(x_t.dtype)
            signal, sigma = _signal_and_sigma(scheduler, t, x_t)
            x_0_hat = tensor_ops.x_0_of_prediction(kind, mean_part, x_t, signal, sigma)
            log_likelihood = guidance(x_t, x_0_hat, t)
            gradient = _gradient(log_likelihood, x_t, create_graph=is_differentiated)
        # The change of x_0_hat, sigma^2 / signal * gradient, in terms of the output; 0 where x_t
        # holds no signal.
        change = {
            "epsilon": -sigma,
            "sample": torch.where(signal > 0, sigma.square() / signal, 0),
            "v_prediction": torch.where(signal > 0, -sigma / signal, 0),
        }[kind]
        output = output if is_differentiated else output.detach()
        mean_part = output[:, : x_t.shape[1]] + (weight * change * gradient).to(output.dtype)
        return torch.cat([mean_part, output[:, x_t.shape[1] :]], dim=1)

    return guided


def _signal_and_sigma(scheduler: Any, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), (B or 1, 1, ...)."""
    dtype = torch.promote_types(x_t.dtype, torch.float32)  # alpha_bar near 1 is 1 in float16
    if hasattr(scheduler, "log_snr"):
        log_snr = scheduler.log_snr(t, dtype)
    else:
        log_snr = _at(scheduler.alphas_cumprod.to(t.device, dtype).logit(), t)
    log_snr = log_snr.reshape(-1, *(1,) * (x_t.ndim - 1)).to(x_t.device)
    return log_snr.sigmoid().sqrt().to(x_t.dtype), (-log_snr).sigmoid().sqrt().to(x_t.dtype)


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Values of a table at timesteps, between which Euler's and Heun's schedulers interpolate."""
    if not t.is_floating_point():
        return table[t]
    low, share = t.floor().long(), t.frac().to(table.dtype)
    return torch.where(share > 0, torch.lerp(table[low], table[t.ceil().long()], share), table[low])


def _gradient(log_likelihood: Any, x_t: Tensor, create_graph: bool) -> Tensor:
    if not isinstance(log_likelihood, Tensor) or log_likelihood.shape != (len(x_t),):
        shape = getattr(log_likelihood, "shape", None)
        got = tuple(shape) if shape is not None else type(log_likelihood).__name__
        raise ValueError(
            f"`guidance` must return log p(y | x_t) of each image, a tensor of shape ({len(x_t)},),"
            f" got {got}"
        )
    gradient = None
    if log_likelihood.requires_grad:
        (gradient,) = torch.autograd.grad(
            log_likelihood.sum(), x_t, allow_unused=True, create_graph=create_graph
        )
    if gradient is None:
        raise ValueError(
            "`guidance` returned a tensor without gradient with respect to x_t; compute it from"
            " x_t or x_0_hat by differentiable operations, without torch.no_grad(),"
            " torch.inference_mode() or .detach()"
        )
    return gradient


@dataclass(frozen=True)
class MeasurementGuidance:
    """log p(y | x_t) of a linear measurement y = A x_0 + noise.

    x_0 given x_t is approximated by a Gaussian around x_0_hat, whose variance is the m_t measured
    by calibration, or 1 - alpha_bar without a calibration (2305.04391).

    Attributes:
        measure: A, a differentiable linear function of x_0, whose rows have unit norm.
        y: the measurement, (B, ...) or broadcast to it.
        scheduler: of the model; with `x_0_mse` where it is calibrated.
        noise_std: standard deviation of the measurement's noise.
    """

    measure: Callable[[Tensor], Tensor]
    y: Tensor
    scheduler: Any
    noise_std: float = 0.0

    def __call__(self, x_t: Tensor, x_0_hat: Tensor, t: Tensor) -> Tensor:
        gap = self.measure(x_0_hat) - self.y.to(x_0_hat)
        x_0_mse = getattr(self.scheduler, "x_0_mse", None)
        if x_0_mse is None:
            _, sigma = _signal_and_sigma(self.scheduler, t, x_t)
            variance = sigma.square().flatten()
        else:
            variance = _at(x_0_mse.to(x_t.device, x_t.dtype), t).flatten()
        variance = variance + self.noise_std**2
        return -gap.square().flatten(1).sum(1) / (2 * variance)


@dataclass(frozen=True)
class ClassifierGuidance:
    """log p(class | x_t) of a classifier that was trained on noisy images.

    A classifier of clean images, applied to x_0_hat, is no replacement: it ignores the variance of
    x_0 given x_t.

    Attributes:
        classifier: callable (x_t, t) -> logits, (B, num_classes).
        class_labels: the class of each image, numbers in [0, num_classes), one or B.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    class_labels: Sequence[int]

    def __call__(self, x_t: Tensor, x_0_hat: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x_t)) if t.ndim == 0 else t
        labels = torch.as_tensor(self.class_labels, device=x_t.device).expand(len(x_t))
        log_p = self.classifier(x_t, t).log_softmax(1)
        return log_p.gather(1, labels[:, None])[:, 0]
