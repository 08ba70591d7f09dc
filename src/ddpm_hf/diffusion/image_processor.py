# SPDX-License-Identifier: Apache-2.0
"""Conversion of images to x_0 of a model and back, and of masks to tensors."""

from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from PIL import Image
from torch import Tensor

from . import checks, image_format

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def mode_and_bit_depth(
    output_type: str, num_channels: int, facts: image_format.ImageFacts | None
) -> tuple[str, int]:
    """Mode and bit depth of output images. PIL has no 16-bit colour, which gets 8 bits there.

    Raises:
        ValueError: for an unknown output type, and if PIL has no mode for the channels.
    """
    checks.check_choice("output_type", output_type, OUTPUT_TYPES)
    if facts:
        is_colour = facts.mode != "L"
        return facts.mode, 8 if output_type == "pil" and is_colour else facts.bit_depth
    # Two channels are LA only if the facts say so.
    modes = {count: mode for mode, count in image_format.MODE_CHANNELS.items() if mode != "LA"}
    if output_type == "pil" and num_channels not in modes:
        raise ValueError(
            f"`output_type` must be 'np', 'pt' or 'latent', got 'pil': PIL has no image mode for "
            f"the {num_channels} channels of this model"
        )
    return modes.get(num_channels, ""), 8


def to_images(x_0: Tensor, output_type: str, mode: str, bit_depth: int) -> Any:
    """Images of x_0 in [-1, 1].

    Returns:
        float32 in [0, 1], (B, C, H, W) for "pt" or (B, H, W, C) for "np"; for "pil" a list of PIL
        images, of mode "I;16" for 16-bit grey.
    """
    images = (x_0.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * (2**bit_depth - 1)).round()
    pixels = pixels.astype(np.uint16 if bit_depth == 16 else np.uint8)
    return [Image.fromarray(p[..., 0] if mode == "L" else p) for p in pixels]


def encode_images(images: Any, unet: UNet2DModel) -> Tensor:
    """Images as x_0 of a model: the inverse of `to_images`.

    Args:
        images: a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or
            (B, C, H, W), or a list of these. Arrays and tensors are uint8, uint16 or floating
            point in [0, 1].
        unet: network that determines size, mode, bit depth and padding.
    Returns:
        x_0 in [-1, 1], float32, (B, C, H, W), padded as in training by replicated edges.
    Raises:
        TypeError: for another kind of image.
        ValueError: if size, mode, bit depth or range do not fit the model.
    """
    facts, num_channels = image_format.image_facts(unet), unet.config.in_channels
    padded, window = image_format.size_and_window(unet, facts)
    mode, bit_depth = mode_and_bit_depth("np", num_channels, facts)
    shape = (num_channels, *(n.stop - n.start for n in window))
    parts = images if isinstance(images, (list, tuple)) else [images]
    batches = [_channels_first(part, mode, bit_depth) for part in parts]
    x_0 = [_checked_x_0(batch, shape, bit_depth) for batch in batches if len(batch)]
    if not x_0:
        raise ValueError("`images` must hold at least one image, got none")
    return image_format.pad_edges(torch.cat(x_0), padded)


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


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 or uint16 pixels as float32 in [-1, 1]: 0 becomes -1, and 255 or 65535 becomes 1."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32).div_(127.5).sub_(1)
    if pixels.dtype == torch.uint16:
        return pixels.to(torch.float32).div_(32767.5).sub_(1)
    raise TypeError(f"`pixels` must be uint8 or uint16, got {pixels.dtype}")


def _checked_x_0(pixels: Tensor, shape: tuple[int, ...], bit_depth: int) -> Tensor:
    """Pixels (B, C, H, W) of this shape (C, H, W) as float32 in [-1, 1]."""
    if tuple(pixels.shape[1:]) != shape:
        raise ValueError(
            f"`images` must have (channels, height, width) {shape} for this model, got "
            f"{tuple(pixels.shape[1:])}"
        )
    if pixels.dtype == torch.uint16 and bit_depth == 8:
        raise ValueError(
            "`images` must have 8 bits per channel for this model, got uint16; divide by 257 and "
            "round to uint8"
        )
    if pixels.dtype in (torch.uint8, torch.uint16):
        return to_unit_range(pixels)
    if not pixels.is_floating_point():
        raise TypeError(f"`images` must be uint8, uint16 or floating point, got {pixels.dtype}")
    low, high = pixels.min().item(), pixels.max().item()
    if not 0 <= low <= high <= 1:  # NaN compares false
        raise ValueError(
            f"`images` of floating point must be in [0, 1], got values in {low:g}..{high:g}"
        )
    return pixels.to(torch.float32) * 2 - 1


def _channels_first(image: Any, mode: str, bit_depth: int) -> Tensor:
    """Pixels of an image or a batch, (B, C, H, W) in their own dtype."""
    if isinstance(image, Image.Image):
        modes = (mode, "I;16") if mode == "L" and bit_depth == 16 else (mode,)
        # For 8 bits, I;16 is refused below: Pillow would convert it by clipping.
        is_deep = mode == "L" and image.mode == "I;16"
        if mode and image.mode not in modes and not is_deep:
            raise ValueError(
                f"`images` must have mode {' or '.join(modes)} for this model, got {image.mode}; "
                f'use image.convert("{mode}")'
            )
        image = np.array(image)
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "f":
            image = image.astype(np.float32)
        image = image[..., None] if image.ndim == 2 else image
        # A copy, because torch warns about read-only arrays and refuses negative strides.
        image = torch.from_numpy(image.copy()).movedim(-1, -3) if image.ndim > 2 else image
    if not isinstance(image, Tensor) or image.ndim not in (3, 4):
        got = f"shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(
            "`images` must be PIL images, arrays (H, W, C) or (B, H, W, C), or tensors (C, H, W) "
            f"or (B, C, H, W), got {got}"
        )
    return image if image.ndim == 4 else image[None]


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
