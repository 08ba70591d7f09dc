# SPDX-License-Identifier: Apache-2.0
"""Image format of a model (mode, size, bit depth, padding), and conversion to x_0 and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from . import checks, config_extension

FACTS_FORMAT = 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODE_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
IMAGE_MODES = tuple(MODE_CHANNELS)
BIT_DEPTHS = (8, 16)
MAX_SIZE = 8192
"""Largest height and width in pixels."""


@dataclass(frozen=True)
class ImageFacts:
    """Format of the training images, kept with the weights so that samples have the same format.

    Attributes:
        mode: "L", "LA", "RGB" or "RGBA": 1, 2, 3 or 4 channels.
        height: height in pixels without padding, in [1, 8192].
        width: width in pixels without padding, in [1, 8192].
        bit_depth: bits per channel, 8 or 16.
        class_names: names of the classes in the order of their numbers, or None.
        class_counts: number of training images of each class, or None if unknown.
        has_null_class: whether training hid labels, so that the null class is trained.
    Raises:
        ValueError: for an invalid attribute.
    """

    mode: str
    height: int
    width: int
    bit_depth: int = 8
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = field(default=None, compare=False)
    has_null_class: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("mode", self.mode in IMAGE_MODES, f"one of {', '.join(IMAGE_MODES)}"),
            ("height", is_size(self.height), f"an int in [1, {MAX_SIZE}]"),
            ("width", is_size(self.width), f"an int in [1, {MAX_SIZE}]"),
            ("bit_depth", self.bit_depth in BIT_DEPTHS, "8 or 16"),
            (
                "class_names",
                self.class_names is None or is_names(self.class_names),
                "a list of strings",
            ),
            (
                "class_counts",
                self.class_counts is None or _are_counts(self.class_counts, self.class_names),
                "one int for each of `class_names`",
            ),
            ("has_null_class", isinstance(self.has_null_class, bool), "true or false"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}")

    @property
    def trained_classes(self) -> list[int]:
        """Numbers of the classes with training images; all if the counts are unknown."""
        counts = self.class_counts or [1] * len(self.class_names or ())
        return [number for number, count in enumerate(counts) if count]

    @property
    def num_channels(self) -> int:
        """Number of channels, one per letter of the mode."""
        return MODE_CHANNELS[self.mode]

    def to_config(self) -> dict[str, Any]:
        """JSON values for the key `_ddpm_hf` of `unet/config.json`."""
        image = {name: getattr(self, name) for name in ("mode", "height", "width", "bit_depth")}
        classes: dict[str, Any] = {}
        if self.class_names:
            classes["class_names"] = list(self.class_names)
            if self.class_counts is not None:
                classes["class_counts"] = list(self.class_counts)
            if not self.has_null_class:
                classes["has_null_class"] = False
        return {"format_version": FACTS_FORMAT, "image": image, **classes}

    @classmethod
    def from_config(cls, config: Any) -> "ImageFacts":
        """Facts from the JSON values of `to_config`.

        Raises:
            ValueError: for another format version, and for missing or invalid values.
        """
        config = config if isinstance(config, dict) else {}
        version = config.get("format_version")
        if version != FACTS_FORMAT:
            raise ValueError(f"`format_version` must be {FACTS_FORMAT}, got {version!r}")
        image: Any = config["image"] if isinstance(config.get("image"), dict) else {}
        mode, height, width, bit_depth = map(image.get, ("mode", "height", "width", "bit_depth"))
        names, counts = (
            tuple(values) if isinstance(values := config.get(key), list) else values
            for key in ("class_names", "class_counts")
        )
        null = config.get("has_null_class", True)
        return cls(mode, height, width, bit_depth, names, counts, null)


def image_facts(unet: UNet2DModel) -> ImageFacts | None:
    """Format of the training images, as stored in the configuration of the network.

    Args:
        unet: network whose configuration may have the key `_ddpm_hf`.
    Returns:
        the facts, or None if there are none. Facts of a newer version of the package are ignored
        with a warning: images then look as in stock diffusers.
    Raises:
        ValueError: if the facts are invalid or do not fit the network.
    """
    config = unet.config.get(config_extension.EXTENSION_KEY)
    if config is None:
        return None
    version = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(version, int) and version > FACTS_FORMAT:
        checks.warn(
            f"the image facts of this model have format {version}, but this version of ddpm_hf "
            f"reads format {FACTS_FORMAT}: they are ignored; upgrade ddpm_hf to use them"
        )
        return None
    try:
        facts = ImageFacts.from_config(config)
        if facts.num_channels != unet.config.in_channels:
            raise ValueError(
                f"`mode` must have {unet.config.in_channels} channels like the UNet, got "
                f"{facts.mode!r}"
            )
    except ValueError as error:
        raise ValueError(f"`_ddpm_hf` in unet/config.json: {error}") from error
    return facts


def set_image_facts(unet: UNet2DModel, facts: ImageFacts) -> None:
    """Write the facts into the UNet's configuration, where `image_facts` reads them."""
    unet.register_to_config(**{config_extension.EXTENSION_KEY: facts.to_config()})


def is_int(value: Any) -> bool:
    """Whether this is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(value: Any) -> bool:
    """Whether this is a list or tuple of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _are_counts(value: Any, names: Any) -> bool:
    is_list = isinstance(value, tuple) and len(value) == len(names or ())
    return is_list and all(is_int(count) and count >= 0 for count in value)


def is_size(value: Any) -> bool:
    """Whether this is a valid height or width in pixels."""
    return is_int(value) and 1 <= value <= MAX_SIZE


# ----------------------------------------------------------------------------------------------
# Size and padding


def size_multiple(unet: UNet2DModel) -> int:
    """Number that height and width of x_t must be a multiple of: the down-sampling factor."""
    return int(2 ** (len(unet.config.down_block_types) - 1))


def padded_size(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """Height and width, rounded up to a multiple."""
    height, width = (math.ceil(n / multiple) * multiple for n in size)
    return height, width


def centred_window(native: Sequence[int], padded: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of the padded image that hold the native image, centred."""
    starts = [(p - n) // 2 for n, p in zip(native, padded, strict=True)]
    rows, columns = (slice(start, start + n) for start, n in zip(starts, native, strict=True))
    return rows, columns


def pad_edges(x_0: Tensor, padded: Sequence[int]) -> Tensor:
    """Images (B, C, H, W) with replicated edges around the centred window.

    Args:
        x_0: images to pad.
        padded: height and width to pad to.
    """
    height, width = padded
    if (height, width) == x_0.shape[-2:]:
        return x_0
    rows, columns = centred_window(x_0.shape[-2:], padded)
    edges = (columns.start, width - columns.stop, rows.start, height - rows.stop)
    return F.pad(x_0, edges, mode="replicate")


def size_and_window(
    unet: UNet2DModel, facts: ImageFacts | None
) -> tuple[tuple[int, int], tuple[slice, slice]]:
    """Size of x_t and the window (rows, columns) in it that holds the image.

    The size is `sample_size` rounded up to a multiple of the down-sampling factor.

    Raises:
        ValueError: if `sample_size` is invalid or smaller than the training images.
    """
    size = unet.config.sample_size
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_size, pair)):
        raise ValueError(
            f"unet.config.sample_size must be an int in [1, {MAX_SIZE}] or a pair (height, width), "
            f"got {size!r}; set it with unet.register_to_config(sample_size=...)"
        )
    padded = padded_size(pair, size_multiple(unet))
    native = (facts.height, facts.width) if facts else tuple(pair)
    if any(n > p for n, p in zip(native, padded, strict=True)):
        raise ValueError(
            f"`_ddpm_hf` in unet/config.json: (height, width) {native} exceed the {padded} of the "
            "UNet"
        )
    return padded, centred_window(native, padded)


# ----------------------------------------------------------------------------------------------
# From x_0 to images and back


def mode_and_bit_depth(
    output_type: str, num_channels: int, facts: ImageFacts | None
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
    modes = {count: mode for mode, count in MODE_CHANNELS.items() if mode != "LA"}
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
    facts, num_channels = image_facts(unet), unet.config.in_channels
    padded, window = size_and_window(unet, facts)
    mode, bit_depth = mode_and_bit_depth("np", num_channels, facts)
    shape = (num_channels, *(n.stop - n.start for n in window))
    parts = images if isinstance(images, (list, tuple)) else [images]
    batches = [_channels_first(part, mode, bit_depth) for part in parts]
    x_0 = [_checked_x_0(batch, shape, bit_depth) for batch in batches if len(batch)]
    if not x_0:
        raise ValueError("`images` must hold at least one image, got none")
    return pad_edges(torch.cat(x_0), padded)


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
        if mode and image.mode not in modes:
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
