"""What cannot be trained, refused before the first update with what to do about it."""

from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.image_processor import IMAGE_MODES
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.training.config import MIN_SIZE, ConfigError


def check_scheduler(scheduler: Any) -> GaussianDDPMScheduler:
    """A scheduler that was passed in Python, as a `GaussianDDPMScheduler`.

    Raises:
        ConfigError: for any sampler but that and a `DDPMScheduler`.
    """
    try:
        return as_gaussian_scheduler(scheduler)
    except TypeError as error:
        raise ConfigError(str(error)) from None


def check_trainable(unet: Any, scheduler: GaussianDDPMScheduler, facts: ImageFacts) -> None:
    """Raise ConfigError if the network does not go with the scheduler or with the images."""
    if not isinstance(unet, UNet2DModel):
        raise ConfigError(
            f"unet must be a diffusers UNet2DModel, got {type(unet).__name__}; for another network "
            "write a loop of your own around ddpm_hf.losses.simple_loss"
        )
    if unet.dtype != torch.float32 or not any(p.requires_grad for p in unet.parameters()):
        raise ConfigError(
            "unet must have float32 weights that require gradients; mixed_precision sets the "
            "precision of the arithmetic"
        )
    if min(facts.height, facts.width) < MIN_SIZE:
        raise ConfigError(
            f"the images have {facts.width}x{facts.height} pixels, the least is {MIN_SIZE} a side: "
            "set resolution"
        )
    _check_time_embedding(unet.config, len(scheduler))
    _check_channels(unet.config, scheduler, facts)
    _check_classes(unet.config, facts)


def _check_time_embedding(config: Any, num_train_timesteps: int) -> None:
    kind, rows = config.time_embedding_type, config.num_train_timesteps
    if kind == "fourier":
        raise ConfigError(
            "time_embedding_type is 'fourier', which takes the logarithm of a noise level and not "
            "a timestep from 0 on; use 'positional'"
        )
    if kind == "learned" and rows < num_train_timesteps:
        raise ConfigError(
            f"the network has learned embeddings of {rows} timesteps, the diffusion has "
            f"{num_train_timesteps}: set num_train_timesteps of both to the same number"
        )


def _check_channels(config: Any, scheduler: GaussianDDPMScheduler, facts: ImageFacts) -> None:
    channels, variance_type = config.in_channels, scheduler.config.variance_type
    if channels != facts.num_channels:
        raise ConfigError(
            f"the network takes {channels} channels but the images have {facts.num_channels} "
            f"({facts.mode}); set image_mode to {mode_with(channels)}, or train a new network"
        )
    needed = 2 * channels if scheduler.learns_variance else channels
    if config.out_channels != needed:
        raise ConfigError(
            f"the network predicts {config.out_channels} channels for {channels} of the images, "
            f"but variance_type {variance_type!r} needs {needed}: set out_channels of the network "
            f"to {needed}, or variance_type to "
            + ("learned_range" if config.out_channels == 2 * channels else "fixed_small")
        )


def _check_classes(config: Any, facts: ImageFacts) -> None:
    names, given = facts.class_names, config.num_class_embeds
    if config.class_embed_type is not None:
        raise ConfigError(
            f"the network embeds classes by {config.class_embed_type!r}; only numbered classes "
            "(num_class_embeds) can be trained here"
        )
    if names is None and given is not None:
        raise ConfigError(
            f"the network has embeddings of {given - 1} classes and of none, but the training is "
            "without classes: pass class_conditional, or another network"
        )
    if names is not None and given != len(names) + 1:
        raise ConfigError(
            f"num_class_embeds of the network is {given}, but {len(names)} classes need "
            f"{len(names) + 1}: the last one stands for no class"
        )


@torch.no_grad()
def check_runs(unet: UNet2DModel) -> None:
    """Raise ConfigError if the network does not take a noisy image of its `sample_size`."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x_t = torch.zeros(1, unet.config.in_channels, height, width, device=unet.device)
    zero = torch.zeros(1, dtype=torch.long, device=unet.device)
    labels = None if unet.class_embedding is None else zero
    try:
        output = unet.eval()(x_t, zero, class_labels=labels).sample
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"the network does not run on {width}x{height} images: {error}"
        ) from error
    finally:
        unet.train()
    if output.shape[2:] != x_t.shape[2:]:
        raise ConfigError(
            f"the network makes {tuple(output.shape[2:])} of {tuple(x_t.shape[2:])} pixels: it "
            "must give back the size that it gets"
        )


def mode_with(channels: int) -> str | None:
    """The image mode of so many channels, if there is one."""
    return IMAGE_MODES[channels - 1] if channels <= len(IMAGE_MODES) else None
