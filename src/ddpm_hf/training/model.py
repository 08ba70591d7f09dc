"""Network and scheduler of a run: new, pretrained or given, and checked with its images."""

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.image_format import set_image_facts, size_multiple
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.dataset_setup import mode_of_channels
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.network import build_scheduler, new_unet, sample_size
from ddpm_hf.training.options import MIN_SIZE
from ddpm_hf.training.pretrained import (
    StartingModel,
    adapt_to_classes,
    adapt_to_variance,
    without_calibration,
)


def build_model(
    options: TrainingConfig,
    base: StartingModel,
    facts: ImageFacts,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
) -> tuple[UNet2DModel, GaussianDDPMScheduler, list[str]]:
    """Network on the device, scheduler, and notes for the plan.

    Args:
        options: the options, with those of the resumed run filled in.
        base: what training starts from.
        facts: mode, size and classes of the images, which the configuration of the network records.
        accelerator: device and precision.
        unet, scheduler: replace those that the options describe; see `train`.
    Raises:
        ConfigError: if network, scheduler and images do not fit together.
    """
    if scheduler is None:
        scheduler = build_scheduler(options, base.scheduler)
    try:
        scheduler = as_gaussian_scheduler(scheduler)
    except TypeError as error:
        raise ConfigError(str(error)) from None
    scheduler, notes = without_calibration(scheduler)
    names, device = facts.class_names or (), accelerator.device
    if unet is None and base.unet is not None:
        unet = base.unet
        notes += adapt_to_variance(unet, scheduler, base.scheduler)
        notes += adapt_to_classes(unet, names) if names else []
    elif unet is None:
        torch.manual_seed(options.seed)  # the same initial weights on every process
        unet = new_unet(facts, device.type, base.arguments, scheduler, len(names) or None)
    _check_trainable(unet, scheduler, facts)
    set_image_facts(unet, facts)
    unet.register_to_config(sample_size=sample_size(facts, size_multiple(unet)))
    with accelerator.autocast():
        _check_runs(unet.to(device))
    return unet, scheduler, notes


def _check_trainable(unet: Any, scheduler: GaussianDDPMScheduler, facts: ImageFacts) -> None:
    """Check that the network fits the scheduler and the images.

    Raises:
        ConfigError: if it does not, with what to change.
    """
    if not isinstance(unet, UNet2DModel):
        raise ConfigError(
            f"`unet` must be a diffusers UNet2DModel, got {type(unet).__name__}; to train another "
            "network, write a loop around ddpm_hf.losses.simple_loss"
        )
    if unet.dtype != torch.float32 or not any(p.requires_grad for p in unet.parameters()):
        raise ConfigError(
            "`unet` must have float32 weights that require gradients; `mixed_precision` sets the "
            "precision of the arithmetic"
        )
    if min(facts.height, facts.width) < MIN_SIZE:
        raise ConfigError(
            f"images must have at least {MIN_SIZE} pixels per side, got {facts.width}x"
            f"{facts.height}; set `resolution`"
        )
    _check_time_embedding(unet.config, len(scheduler))
    _check_channels(unet.config, scheduler, facts)
    _check_classes(unet.config, facts)


def _check_time_embedding(config: Any, num_train_timesteps: int) -> None:
    kind, rows = config.time_embedding_type, config.num_train_timesteps
    if kind == "fourier":
        raise ConfigError(
            "time_embedding_type of the network must be 'positional' or 'learned', got 'fourier', "
            "which embeds the logarithm of a noise level instead of a timestep; use 'positional'"
        )
    if kind == "learned" and rows < num_train_timesteps:
        raise ConfigError(
            f"the network has learned embeddings of {rows} timesteps, but the scheduler has "
            f"{num_train_timesteps}: set num_train_timesteps of both to the same number"
        )


def _check_channels(config: Any, scheduler: GaussianDDPMScheduler, facts: ImageFacts) -> None:
    channels, variance_type = config.in_channels, scheduler.config.variance_type
    if channels != facts.num_channels:
        raise ConfigError(
            f"the network has {channels} input channels, but the images have {facts.num_channels} "
            f"({facts.mode}); set `image_mode` to {mode_of_channels(channels)}, or train a new "
            "network"
        )
    needed = 2 * channels if scheduler.learns_variance else channels
    if config.out_channels != needed:
        other = "learned_range" if config.out_channels == 2 * channels else "fixed_small"
        raise ConfigError(
            f"the network has {config.out_channels} output channels, but images with {channels} "
            f"channels and `variance_type` {variance_type!r} need {needed}: set out_channels of "
            f"the network to {needed}, or `variance_type` to {other}"
        )


def _check_classes(config: Any, facts: ImageFacts) -> None:
    names, num_embeddings = facts.class_names, config.num_class_embeds
    if config.class_embed_type is not None:
        raise ConfigError(
            f"class_embed_type of the network must be None, got {config.class_embed_type!r}: only "
            "class indices (num_class_embeds) can be trained"
        )
    if names is None and num_embeddings is not None:
        raise ConfigError(
            f"the network has embeddings of {num_embeddings - 1} classes and the null class, but "
            "training is unconditional: set `class_conditional`, or use another network"
        )
    if names is not None and num_embeddings != len(names) + 1:
        raise ConfigError(
            f"num_class_embeds of the network is {num_embeddings}, but {len(names)} classes need "
            f"{len(names) + 1}: the last one is the null class"
        )


@torch.no_grad()
def _check_runs(unet: UNet2DModel) -> None:
    """Check that the network maps a noisy image of its `sample_size` to the same size.

    Raises:
        ConfigError: if it fails or returns another size.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x_t = torch.zeros(1, unet.config.in_channels, height, width, device=unet.device)
    zero = torch.zeros(1, dtype=torch.long, device=unet.device)
    labels = None if unet.class_embedding is None else zero
    try:
        output = unet.eval()(x_t, zero, class_labels=labels).sample
    except (
        ArithmeticError, RuntimeError, ValueError, TypeError, IndexError, AttributeError,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"the network does not run on {width}x{height} images: {error}"
        ) from error
    finally:
        unet.train()
    if output.shape[2:] != x_t.shape[2:]:
        raise ConfigError(
            f"the network maps images of {width}x{height} pixels to {output.shape[3]}x"
            f"{output.shape[2]}: input and output must have the same size"
        )
