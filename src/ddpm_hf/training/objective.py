"""What an update minimises: a loss, and which timesteps it is asked at."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_hf.diffusion.image_processor import ImageFacts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.losses import Loss, hybrid_loss, simple_loss, vlb_loss
from ddpm_hf.timestep_samplers import TIMESTEP_SAMPLERS, TimestepSampler
from ddpm_hf.training.config import ConfigError, TrainingConfig
from ddpm_hf.weightings import WEIGHTINGS


@dataclass(frozen=True)
class Objective:
    """The losses of a batch, and where the batch is asked.

    Attributes:
        name: by which a resumed run must know it.
        loss: one value per image, of the form of `ddpm_hf.losses`.
        timesteps: draws the timesteps of a whole batch.
    """

    name: str
    loss: Loss
    timesteps: TimestepSampler


def choose_objective(config: TrainingConfig, scheduler: GaussianDDPMScheduler) -> TrainingConfig:
    """`config` with an objective: both terms where the variance is learned, else L_simple alone."""
    return dataclasses.replace(
        config, objective=config.objective or ("hybrid" if scheduler.learns_variance else "simple")
    )


def build_objective(
    config: TrainingConfig,
    scheduler: GaussianDDPMScheduler,
    facts: ImageFacts,
    loss: Loss | None,
) -> Objective:
    """The objective that the options name, or a loss that was passed in Python.

    Raises:
        ConfigError: for options that contradict each other or the variance.
    """
    sampler = TIMESTEP_SAMPLERS[config.timestep_sampling](len(scheduler))
    if loss is not None:
        return Objective(_name_of(loss), loss, sampler)
    name, learned = str(config.objective), scheduler.learns_variance
    if learned and name == "simple":
        raise ConfigError(
            f"objective simple leaves the variance untrained, but variance_type is "
            f"{scheduler.config.variance_type!r}: use hybrid, vlb, or a fixed variance"
        )
    if name == "hybrid" and not learned:
        raise ConfigError(
            f"objective hybrid trains a learned variance, but variance_type is "
            f"{scheduler.config.variance_type!r}: pass variance_type learned_range, or use simple"
        )
    weighting = WEIGHTINGS[config.loss_weighting]
    losses: dict[str, Callable[..., Tensor]] = {
        "simple": partial(simple_loss, weighting=weighting),
        "hybrid": partial(hybrid_loss, weighting=weighting, bit_depth=facts.bit_depth),
        # Without the clip: where it is active, the mean would get no gradient.
        "vlb": partial(vlb_loss, bit_depth=facts.bit_depth, clip=False),
    }
    if name == "vlb" and weighting is not None:
        raise ConfigError(
            f"loss_weighting {config.loss_weighting} weighs L_simple, of which objective vlb has "
            "none: leave it out"
        )
    return Objective(name, losses[name], sampler)


def _name_of(loss: Any) -> str:
    """How a function, or an object that is called, is known."""
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def in_order_of_rows(losses: list[Tensor], accelerator: Accelerator) -> Tensor:
    """The losses of a whole batch, the same on every process.

    Args:
        losses: this process's, a tensor (b,) per micro-batch.
        accelerator: gathers those of the others.
    Returns:
        (batch size,), by the row of the batch, as `randomness.Batches` gives them out.
    """
    mine = torch.stack(losses)  # (micro-batches, b)
    everyones: Tensor = accelerator.gather(mine)  # (processes * micro-batches, b)
    return everyones.reshape(-1, *mine.shape).transpose(0, 1).flatten()
