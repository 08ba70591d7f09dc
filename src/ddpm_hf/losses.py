"""Training losses: one value per sample, unreduced, for any denoiser.

simple_loss  L_simple, of which DDPM's samples are best                    2006.11239, eq. 14
vlb_term     the term of the variational bound at t, in bits/dim           2006.11239, eq. 5
vlb_loss     K times that: the bound, estimated from one t per sample
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
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    weighting: Weighting | None = None,
) -> Tensor:
    """L_simple: the squared error of the network's prediction, averaged over each sample.

    The weight of every step is 1 whatever the prediction type, as the name says: choosing
    `prediction_type="sample"` does not bring a signal-to-noise weighting with it.

    Args:
        denoiser: any callable `(x_t, t)` that returns a tensor or an object with `.sample`; where
            the scheduler's variance is learned with twice the channels, of which the first half
            is the prediction.
        scheduler: gives q(x_t | x_0) and the prediction type.
        x_0: clean samples in [-1, 1], (B, ...).
        t: step index per sample, (B,), in [0, T).
        noise: standard normal, same shape as `x_0`.
        weighting: weights of the steps other than 1, such as `weightings.MinSNR()`.
    Returns:
        (B,), float32 (float64 for float64 samples), not reduced over the batch.
    Raises:
        ValueError: if the output does not have the shape that the variance type asks for.
    Source: DDPM (2006.11239), eq. 14.
    """
    output = denoise(denoiser, scheduler, scheduler.add_noise(x_0, noise, t), t)
    return _simple(scheduler, output, x_0, t, noise, weighting)


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
    """The term of the variational bound at t: a KL, or the decoder's at the trajectory's last t.

    Args:
        denoiser: as for `simple_loss`.
        scheduler: its trajectory has the K timesteps of the bound.
        x_0: clean samples in [-1, 1], (B, ...).
        t: elements of the trajectory, (B,).
        noise: standard normal, same shape as `x_0`.
        decoder: "exact", "tanh" or "continuous": see `decoders.decoder_of`.
        bit_depth: of the images: 8 or 16.
        clip: clip the estimate of x_0 as the scheduler is configured to, as sampling and
            `bits_per_dim` do. Where the clip is active the mean gets no gradient, and at large t a
            network that has not learned yet is clipped nearly everywhere: to train the mean by
            the bound, turn it off, as Improved DDPM's code does in training.
    Returns:
        (B,), bits/dim, float32 (float64 for float64 samples).
    Raises:
        ValueError: for an output of another shape, or, for values on the CPU, if samples are off
            the grid of `bit_depth` or t off the trajectory.
    Source: DDPM (2006.11239), eq. 5 and 13.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    output = denoise(denoiser, scheduler, x_t, t)
    return _term(scheduler, output, x_0, x_t, t, decoder, bit_depth, clip)


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
    """L_vlb from one t per sample: K times `vlb_term`, whose arguments it has.

    Unbiased for the sum of the bound's K terms where t is uniform over the trajectory, which leaves
    out the prior's: nothing there can be trained.
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
    """L_simple + vlb_weight L_vlb, the mean detached in the second: it trains the variance alone.

    Args:
        vlb_weight: lambda; acts on bits/dim, as 0.001 does in Improved DDPM's code.
        weighting: of L_simple, as for `simple_loss`.
        decoder, bit_depth, clip: as for `vlb_term`. With the clip the variance is fitted to the
            mean that sampling uses.
    Returns:
        (B,), float32 (float64 for float64 samples). The network is called once.
    Source: Improved DDPM (2102.09672), eq. 16.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    output = denoise(denoiser, scheduler, x_t, t)
    frozen = output.detach()
    if scheduler.learns_variance:
        frozen = torch.cat([frozen.chunk(2, dim=1)[0], output.chunk(2, dim=1)[1]], dim=1)
    simple = _simple(scheduler, output, x_0, t, noise, weighting)
    term = _term(scheduler, frozen, x_0, x_t, t, decoder, bit_depth, clip)
    return simple + vlb_weight * len(scheduler.timesteps) * term


def bits_per_dim(nats: Tensor) -> Tensor:
    """Nats per value, (B, ...), as bits per dimension of each sample, (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def denoise(denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_t: Tensor, t: Tensor) -> Tensor:
    """What the network says about x_t, in the shape that the scheduler's variance type asks for.

    Raises:
        ValueError: if it has another one.
    """
    answer = denoiser(x_t, t)
    output: Tensor = answer.sample if hasattr(answer, "sample") else answer
    factor = 2 if scheduler.learns_variance else 1
    shape = (len(x_t), *(factor * n for n in x_t.shape[1:2]), *x_t.shape[2:])
    if not isinstance(output, Tensor) or output.shape != shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the denoiser returned {got} for samples of {tuple(x_t.shape)}; variance_type"
            f" {scheduler.config.variance_type!r} needs {shape}"
        )
    return output


def _simple(
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


def _term(
    scheduler: GaussianDDPMScheduler,
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    decoder: str,
    bit_depth: int,
    clip: bool,
) -> Tensor:
    nll_of = decoder_of(decoder, bit_depth)
    if x_0.is_cpu:  # elsewhere it would cost a wait
        check_images(x_0, decoder, bit_depth)
    step = scheduler.step_kl(output, x_0, x_t, t, clip=clip)
    is_last = step.is_last.bool()
    if is_last.is_cpu and not is_last.any():  # nearly always; elsewhere asking would cost a wait
        return bits_per_dim(step.kl)
    # Where it is not asked, the decoder sees a good estimate: an overflow would give NaN gradients.
    x_0 = at_least_float32(x_0)
    x_0_hat = torch.where(is_last, step.pred_original_sample, x_0)
    log_variance = torch.where(is_last, step.log_variance, 0.0)
    return bits_per_dim(torch.where(is_last, nll_of(x_0, x_0_hat, log_variance), step.kl))
