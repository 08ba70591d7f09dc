# SPDX-License-Identifier: Apache-2.0
"""Masks of images as tensors. Travels with the weights."""

from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from PIL import Image
from torch import Tensor

from . import image_format


def encode_masks(mask_image: Any, unet: UNet2DModel, num_inputs: int, num_images: int) -> Tensor:
    """1 where a mask is white, (1 or num_inputs * num_images, 1, H, W), padded like the images.

    Args:
        mask_image: as for `GaussianDDPMPipeline.inpaint`.
        unet: gives size and padding.
        num_inputs: number of images; there is one mask for all, or one for each.
        num_images: draws of each image.
    Raises:
        ValueError, TypeError: for another size, shape, dtype or number of masks.
    """
    padded, window = image_format.size_and_window(unet, image_format.image_facts(unet))
    size = tuple(side.stop - side.start for side in window)
    masks = mask_image if isinstance(mask_image, (list, tuple)) else [mask_image]
    white = [_white(mask) for mask in masks]
    for mask in white:
        if tuple(mask.shape[-2:]) != size:
            raise ValueError(
                f"`mask_image` must have the size of the image, (height, width) {size}, got"
                f" {tuple(mask.shape[-2:])}"
            )
    count = sum(map(len, white))
    if count not in (1, num_inputs):
        raise ValueError(
            f"`mask_image` must be one mask or one for each image, got {count} masks for"
            f" {num_inputs} images"
        )
    encoded = image_format.pad_edges(torch.cat(white).float(), padded)
    return encoded if count == 1 else encoded.repeat_interleave(num_images, dim=0)


def _white(mask: Any) -> Tensor:
    """Where a mask is above half, (B, 1, H, W)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = mask[..., 0] if mask.ndim > 2 and mask.shape[-1] == 1 else mask
        mask = torch.from_numpy(mask.copy())  # torch warns of arrays that cannot be written to
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"`mask_image` must be a PIL image, an array or a tensor, got {type(mask).__name__}"
        )
    values = mask[None] if mask.ndim == 2 else mask
    values = values[:, None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1] != 1:
        raise ValueError(
            "`mask_image` must be a PIL image or (H, W), (B, H, W) or (B, 1, H, W), got shape"
            f" {tuple(values.shape)}"
        )
    is_bytes = values.dtype == torch.uint8
    if not is_bytes and not values.is_floating_point() and values.dtype != torch.bool:
        raise TypeError(
            f"`mask_image` must be boolean, uint8 or floating point, got {values.dtype}; pass"
            " mask > 0 for a mask of 0 and 1"
        )
    return values > (127 if is_bytes else 0.5)
