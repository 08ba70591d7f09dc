"""Batches of images for a denoiser: their number, shape and bit depth."""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.checks import check_tensor
from ddpm_hf.diffusion.image_format import image_facts, size_multiple

_BATCH_SIZE = 64


def batches_of(images: Tensor | Iterable[Tensor], batch_size: int | None) -> Iterator[Tensor]:
    """The images in batches; batches of an iterable stay as they are without a `batch_size`.

    Raises:
        TypeError: if the iterable does not contain tensors.
    """
    is_tensor = isinstance(images, Tensor)
    size = batch_size or (_BATCH_SIZE if is_tensor else None)
    for batch in [images] if is_tensor else images:
        if not isinstance(batch, Tensor):
            raise TypeError(
                "`images` must be a tensor or an iterable of tensors (N, C, ...), got an iterable"
                f" of {type(batch).__name__}; for a loader of pairs pass (x for x, _ in loader)"
            )
        for start in range(0, len(batch), size or max(1, len(batch))):
            yield batch[start : start + size] if size else batch


def num_batches(images: Any, batch_size: int | None) -> int | None:
    """Number of batches; None if unknown."""
    if isinstance(images, Tensor):
        return math.ceil(len(images) / (batch_size or _BATCH_SIZE))
    return len(images) if batch_size is None and hasattr(images, "__len__") else None


def check_batch(batch: Tensor, unet: UNet2DModel | None) -> None:
    """Check the shape of a batch.

    Raises:
        ValueError: for a shape that `unet` does not accept.
    """
    check_tensor("images", batch)
    if unet is None:
        if batch.ndim < 2:
            raise ValueError(f"`images` must have shape (N, C, ...), got {tuple(batch.shape)}")
        return
    channels, multiple, hint = unet.config.in_channels, size_multiple(unet), ""
    is_multiple = not any(size % multiple for size in batch.shape[-2:])
    if batch.ndim == 4 and batch.shape[1] == channels and is_multiple:
        return
    if batch.ndim == 3 and batch.shape[0] == channels:
        hint = "; add the dimension N with images[None]"
    elif batch.ndim == 4 and batch.shape[-1] == channels != batch.shape[1]:
        hint = "; move the channels with images.permute(0, 3, 1, 2)"
    of_sizes = f" with H and W multiples of {multiple}" if multiple > 1 else ""
    raise ValueError(
        f"`images` must have shape (N, {channels}, H, W){of_sizes} for this model, got shape"
        f" {tuple(batch.shape)}{hint}"
    )


def recorded_bit_depth(denoiser: Any) -> int:
    """Bit depth in the configuration of a model; 8 for other callables."""
    unet = unet_of(denoiser)
    facts = image_facts(unet) if unet else None
    return facts.bit_depth if facts else 8


def unet_of(denoiser: Any) -> UNet2DModel | None:
    """The network inside torch.compile, DistributedDataParallel and `functools.partial`, if any."""
    while isinstance(denoiser, torch.nn.Module | functools.partial):
        if isinstance(denoiser, UNet2DModel):
            return denoiser
        inner = (getattr(denoiser, name, None) for name in ("_orig_mod", "module", "func"))
        denoiser = next((value for value in inner if value is not None), None)
    return None
