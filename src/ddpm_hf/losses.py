"""Training losses of any denoiser: one value per sample, not reduced over the batch.

simple_loss  L_simple, the loss with DDPM's best sample quality            2006.11239, eq. 14
vlb_term     term of the variational bound at t, in bits/dim               2006.11239, eq. 5
vlb_loss     variational bound, estimated from one t per sample            2006.11239, eq. 5
hybrid_loss  L_simple for the mean, the bound for the variance             2102.09672, eq. 16
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_hf.decoders import check_images, decoder_of
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.diffusion.tensor_ops import Denoiser, at_least_float32
from ddpm_hf.weightings import Weighting

# (denoiser, scheduler, x_0, t, noise) -> one value per sample, (B,), unreduced.
Loss = Callable[[Denoiser, GaussianDDPMScheduler, Tensor, Tensor, Tensor], Tensor]


def prediction_target(
    scheduler: GaussianDDPMScheduler, x_0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Regression target of the network: the noise, x_0 or v.

    Args:
        scheduler: its `prediction_type` selects the target.
        x_0: clean samples in [-1, 1], (B, ...).
        noise: standard normal, same shape.
        t: step index per sample, (B,), in [0, T).
    Returns:
        target, same shape as `x_0`.
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
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    weighting: Weighting | None = None,
) -> Tensor:
    """L_simple: mean squared error of the network's prediction, per sample.

    Without `weighting`, all steps have weight 1 for every prediction type; in particular,
    `prediction_type="sample"` adds no signal-to-noise weighting.

    Args:
        denoiser: any callable `(x_t, t)` that returns a tensor or an object with `.sample`. With a
            learned variance the output has twice the channels; the first half is the prediction.
        scheduler: defines q(x_t | x_0) and the prediction type.
        x_0: clean samples in [-1, 1], (B, ...).
        t: step index per sample, (B,), in [0, T).
        noise: standard normal, same shape as `x_0`.
        weighting: weights of the steps, such as `weightings.MinSNR()`.
    Returns:
        loss per sample, (B,), float32 (float64 for float64 samples).
    Raises:
        ValueError: if the shape of the output does not match the variance type.
    Source: DDPM (2006.11239), eq. 14.
    """
    output = denoise(denoiser, scheduler, scheduler.add_noise(x_0, noise, t), t)
    return _simple_of_output(scheduler, output, x_0, t, noise, weighting)


def vlb_term(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    decoder: str = "exact",
    bit_depth: int = 8,
    clip: bool = True,
) -> Tensor:
    """Term of the variational bound at t: a KL divergence, or the decoder's NLL at the last t.

    Args:
        denoiser: as for `simple_loss`.
        scheduler: its current trajectory holds the K timesteps of the bound.
        x_0: clean samples in [-1, 1], (B, ...).
        t: timesteps of the trajectory, (B,).
        noise: standard normal, same shape as `x_0`.
        decoder: "exact", "tanh" or "continuous"; see `decoders.decoder_of`.
        bit_depth: bits per channel of the images, 8 or 16.
        clip: clip the estimate of x_0 as the scheduler is configured, like sampling and
            `bits_per_dim`. Clipped values give the mean no gradient, and at large t an untrained
            network is clipped nearly everywhere. To train the mean with the bound, turn it off, as
            Improved DDPM's code does in training.
    Returns:
        term per sample in bits/dim, (B,), float32 (float64 for float64 samples).
    Raises:
        ValueError: if the output has the wrong shape; on the CPU also if samples are off the grid
            of `bit_depth` or t is not in the trajectory.
    Source: DDPM (2006.11239), eq. 5 and 13.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    output = denoise(denoiser, scheduler, x_t, t)
    return _vlb_term_of_output(scheduler, output, x_0, x_t, t, decoder, bit_depth, clip)


def vlb_loss(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    decoder: str = "exact",
    bit_depth: int = 8,
    clip: bool = True,
) -> Tensor:
    """L_vlb estimated from one t per sample: K times `vlb_term`, with the same arguments.

    Unbiased for the sum of the K terms if t is uniform over the trajectory. The prior term is left
    out: it has no trainable part.
    """
    num_steps = len(scheduler.timesteps)
    return num_steps * vlb_term(
        denoiser, scheduler, x_0, t, noise, decoder=decoder, bit_depth=bit_depth, clip=clip
    )


def hybrid_loss(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    vlb_weight: float = 1e-3,
    weighting: Weighting | None = None,
    decoder: str = "exact",
    bit_depth: int = 8,
    clip: bool = True,
) -> Tensor:
    """L_simple + vlb_weight L_vlb; in L_vlb the mean is detached, so it trains only the variance.

    Calls the network once.

    Args:
        denoiser, scheduler, x_0, t, noise: as for `vlb_term`.
        vlb_weight: lambda, for L_vlb in bits/dim; 0.001 in Improved DDPM's code.
        weighting: weights of the steps in L_simple.
        decoder, bit_depth, clip: as for `vlb_term`. With `clip` the variance is fitted to the mean
            that sampling uses.
    Returns:
        loss per sample, (B,), float32 (float64 for float64 samples).
    Source: Improved DDPM (2102.09672), eq. 16.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    output = denoise(denoiser, scheduler, x_t, t)
    mean_detached = output.detach()
    if scheduler.learns_variance:
        mean_detached = torch.cat([mean_detached.chunk(2, dim=1)[0], output.chunk(2, dim=1)[1]], 1)
    simple = _simple_of_output(scheduler, output, x_0, t, noise, weighting)
    term = _vlb_term_of_output(scheduler, mean_detached, x_0, x_t, t, decoder, bit_depth, clip)
    return simple + vlb_weight * len(scheduler.timesteps) * term


def nats_to_bits_per_dim(nats: Tensor) -> Tensor:
    """Bits per dimension of each sample, (B,), from nats per value, (B, ...)."""
    return nats.flatten(1).mean(1) / math.log(2)


def denoise(denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_t: Tensor, t: Tensor) -> Tensor:
    """Output of the network for x_t as a tensor, with the channels that the variance type needs.

    Raises:
        ValueError: if the shape is wrong.
    """
    output: Tensor = denoiser(x_t, t)
    output = getattr(output, "sample", output)
    factor = 2 if scheduler.learns_variance else 1
    shape = (len(x_t), *(factor * n for n in x_t.shape[1:2]), *x_t.shape[2:])
    if not isinstance(output, Tensor) or output.shape != shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"`denoiser` must return a tensor of shape {shape} for samples {tuple(x_t.shape)} and"
            f" `variance_type` {scheduler.config.variance_type!r}, got {got}"
        )
    return output


def _simple_of_output(
    scheduler: GaussianDDPMScheduler,
    output: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    weighting: Weighting | None,
) -> Tensor:
    prediction = output.chunk(2, dim=1)[0] if scheduler.learns_variance else output
    target = prediction_target(scheduler, x_0, noise, t)
    error = at_least_float32(prediction) - target
    loss = error.square().flatten(1).mean(1)
    return loss if weighting is None else loss * weighting(scheduler, t, loss.dtype)


def _vlb_term_of_output(
    scheduler: GaussianDDPMScheduler,
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    decoder: str,
    bit_depth: int,
    clip: bool,
) -> Tensor:
    decoder_nll = decoder_of(decoder, bit_depth)
    if x_0.is_cpu:  # reading values on an accelerator synchronises
        check_images(x_0, decoder, bit_depth, "x_0")
    step = scheduler.step_kl(output, x_0, x_t, t, clip=clip)
    is_last = step.is_last.bool()
    if is_last.is_cpu and not is_last.any():  # nearly always; on an accelerator, `any` synchronises
        return nats_to_bits_per_dim(step.kl)
    # Rows at other timesteps get a perfect estimate: an overflow there would give NaN gradients.
    x_0 = at_least_float32(x_0)
    x_0_hat = torch.where(is_last, step.pred_original_sample, x_0)
    log_variance = torch.where(is_last, step.log_variance, 0.0)
    nll = decoder_nll(x_0, x_0_hat, log_variance)
    return nats_to_bits_per_dim(torch.where(is_last, nll, step.kl))
