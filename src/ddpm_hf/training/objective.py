"""Training objective: a loss and the distribution of its timesteps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.losses import Loss, hybrid_loss, simple_loss, vlb_loss
from ddpm_hf.timestep_samplers import TIMESTEP_SAMPLERS, TimestepSampler
from ddpm_hf.training.config import ResolvedConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.weightings import WEIGHTINGS


@dataclass(frozen=True)
class Objective:
    """Loss of a batch and sampler of its timesteps.

    Attributes:
        name: identifies the loss; a resumed run must use the same one.
        loss: one value per image, with the signature of the losses in `ddpm_hf.losses`.
        timesteps: samples the timesteps of a batch.
    """

    name: str
    loss: Loss
    timesteps: TimestepSampler


def build_objective(
    config: ResolvedConfig, scheduler: GaussianDDPMScheduler, bit_depth: int, loss: Loss | None
) -> Objective:
    """The objective of the configuration, or one with the loss that was passed in Python.

    Args:
        config: name of the loss, its weighting and the timestep sampling.
        scheduler: diffusion process.
        bit_depth: of the images, for the decoder term of the variational bound.
        loss: replaces the loss of the configuration.
    Raises:
        ConfigError: for options that contradict each other or the type of the variance.
    """
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampling](len(scheduler))
    if loss is not None:
        return Objective(_qualified_name(loss), loss, sampler)
    _check_objective(config, scheduler)
    weighting = WEIGHTINGS[config.loss_weighting]
    losses: dict[str, Callable[..., Tensor]] = {
        "simple": partial(simple_loss, weighting=weighting),
        "hybrid": partial(hybrid_loss, weighting=weighting, bit_depth=bit_depth),
        # No clipping: where it is active, the mean gets no gradient.
        "vlb": partial(vlb_loss, bit_depth=bit_depth, clip=False),
    }
    return Objective(config.objective, losses[config.objective], sampler)


def _check_objective(config: ResolvedConfig, scheduler: GaussianDDPMScheduler) -> None:
    name, is_learned = config.objective, scheduler.learns_variance
    variance_type = scheduler.config.variance_type
    if is_learned and name == "simple":
        raise ConfigError(
            f"`objective` 'simple' does not train the variance, but `variance_type` is "
            f"{variance_type!r}: use hybrid or vlb, or a fixed variance"
        )
    if name == "hybrid" and not is_learned:
        raise ConfigError(
            f"`objective` 'hybrid' trains a learned variance, but `variance_type` is "
            f"{variance_type!r}: set `variance_type` to learned_range, or use simple"
        )
    if name == "vlb" and config.loss_weighting != "none":
        raise ConfigError(
            f"`loss_weighting` {config.loss_weighting!r} weights the squared error, which "
            "`objective` 'vlb' does not contain: leave `loss_weighting` out"
        )
    if name == "vlb" and config.timestep_sampling == "asymmetric":
        raise ConfigError(
            "`timestep_sampling` 'asymmetric' weights the timesteps, so that the loss of "
            "`objective` 'vlb' would not be the variational bound: use uniform, low_discrepancy or "
            "loss_second_moment"
        )


def _qualified_name(loss: Loss) -> str:
    """Module and name of a function, also in a `partial`, or of the class of a callable object."""
    while isinstance(loss, partial):
        loss = loss.func
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def in_order_of_rows(losses: list[Tensor], accelerator: Accelerator) -> Tensor:
    """The losses of a batch, gathered from all processes.

    Args:
        losses: of this process, one tensor (b,) per micro-batch.
        accelerator: gathers the losses of all processes.
    Returns:
        (batch_size,), in the order of the rows in `image_order.Batches`.
    """
    local = torch.stack(losses)  # (micro-batches, b)
    gathered: Tensor = accelerator.gather(local)  # (processes * micro-batches, b)
    return gathered.reshape(-1, *local.shape).transpose(0, 1).flatten()
