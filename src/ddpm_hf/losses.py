"""Training losses: one value per sample, unreduced, for any denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_hf.diffusion.arithmetic import Denoiser
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

# (denoiser, scheduler, x_0, t, noise) -> one value per sample, (B,), unreduced.
Loss = Callable[[Denoiser, GaussianDDPMScheduler, Tensor, Tensor, Tensor], Tensor]


def prediction_target(
    scheduler: GaussianDDPMScheduler, x_0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """What the network is asked for: the noise, x_0 or v, by the scheduler's `prediction_type`.

    Args:
        scheduler: its `prediction_type` decides.
        x_0: clean samples in [-1, 1], (B, ...).
        noise: standard normal, same shape.
        t: step index per sample, (B,), in [0, T).
    Returns:
        the target, same shape as `x_0`.
    Source: DDPM (2006.11239), eq. 14 for epsilon; 2202.00512, appendix D for v.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case _:
            return scheduler.get_velocity(x_0, noise, t)


def simple_loss(
    denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple: the squared error of the network's prediction, averaged over each sample.

    The weight of every step is 1 whatever the prediction type, as the name says: choosing
    `prediction_type="sample"` does not bring a signal-to-noise weighting with it.

    Args:
        denoiser: any callable `(x_t, t)` that returns a tensor or an object with `.sample`.
        scheduler: gives q(x_t | x_0) and the prediction type.
        x_0: clean samples in [-1, 1], (B, ...).
        t: step index per sample, (B,), in [0, T).
        noise: standard normal, same shape as `x_0`.
    Returns:
        (B,), float32 (float64 for float64 samples), not reduced over the batch.
    Raises:
        ValueError: if the prediction has another shape than `x_0`.
    Source: DDPM (2006.11239), eq. 14.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    output = denoiser(x_t, t)
    prediction: Tensor = output.sample if hasattr(output, "sample") else output
    if prediction.shape != x_0.shape:
        raise ValueError(
            f"the denoiser returned {tuple(prediction.shape)} for samples of {tuple(x_0.shape)}; "
            "L_simple needs one predicted value per input value"
        )
    target = prediction_target(scheduler, x_0, noise, t)
    error = prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target
    return error.square().flatten(1).mean(1)
