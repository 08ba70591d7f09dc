# SPDX-License-Identifier: Apache-2.0
"""What the images of a model are: mode, size and bit depth, their place in the padded square that
the network works on, and pixels made of x_0."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.models import UNet2DModel
from PIL import Image
from torch import Tensor

from . import checks, config_extension

FACTS_FORMAT = 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODE_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
IMAGE_MODES = tuple(MODE_CHANNELS)
BIT_DEPTHS = (8, 16)
MAX_SIZE = 8192
"""Most pixels a side."""


@dataclass(frozen=True)
class ImageFacts:
    """What the images of a data set are; kept with the weights, so that samples come back alike.

    Attributes:
        mode: "L", "LA", "RGB" or "RGBA": 1, 2, 3 or 4 channels.
        height: in pixels, before any padding, 1..8192.
        width: likewise.
        bit_depth: 8 or 16 bits per channel.
        class_names: names of the labels in their order, or None.

    Raises:
        ValueError: if one of them is none of these.
    """

    mode: str
    height: int
    width: int
    bit_depth: int = 8
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("mode", self.mode in IMAGE_MODES, f"one of {', '.join(IMAGE_MODES)}"),
            ("height", is_size(self.height), f"an int in 1..{MAX_SIZE}"),
            ("width", is_size(self.width), f"an int in 1..{MAX_SIZE}"),
            ("bit_depth", self.bit_depth in BIT_DEPTHS, "8 or 16"),
            ("class_names", self.class_names is None or is_names(self.class_names), "names"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def num_channels(self) -> int:
        """Channels of a training tensor: one per letter of the mode."""
        return MODE_CHANNELS[self.mode]

    def to_config(self) -> dict[str, Any]:
        """The JSON form, as it stands in `unet/config.json` under `_ddpm_hf`."""
        image = dataclasses.asdict(self)
        names = image.pop("class_names")
        config: dict[str, Any] = {"format_version": FACTS_FORMAT, "image": image}
        return config | ({"class_names": list(names)} if names else {})

    @classmethod
    def from_config(cls, config: Any) -> "ImageFacts":
        """The facts in the JSON form of `to_config`.

        Raises:
            ValueError: if the format is another one, or a value is missing or wrong.
        """
        config = config if isinstance(config, dict) else {}
        version = config.get("format_version")
        if version != FACTS_FORMAT:
            raise ValueError(f"format_version must be {FACTS_FORMAT}, got {version!r}")
        image, names = config.get("image"), config.get("class_names")
        image = image if isinstance(image, dict) else {}
        names = tuple(names) if isinstance(names, list) else names
        values: dict[str, Any] = {
            name: image.get(name) for name in ("mode", "height", "width", "bit_depth")
        }
        return cls(**values, class_names=names)


def image_facts(unet: UNet2DModel) -> ImageFacts | None:
    """What the training images were, as the trainer wrote it into the UNet's configuration.

    Args:
        unet: its `config` may hold the key `_ddpm_hf`.
    Returns:
        the facts, or None where there are none, or where a newer version of the package wrote them
        (with a warning: images come as stock diffusers gives them).
    Raises:
        ValueError: if what stands there contradicts itself or the UNet.
    """
    config = unet.config.get(config_extension.EXTENSION_KEY)
    if config is None:
        return None
    version = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(version, int) and version > FACTS_FORMAT:
        checks.warn(
            f"the image facts of this model have format {version}, this copy of ddpm_hf knows "
            f"{FACTS_FORMAT}: they are ignored; upgrade ddpm_hf to use them"
        )
        return None
    try:
        facts = ImageFacts.from_config(config)
        if facts.num_channels != unet.config.in_channels:
            raise ValueError(
                f"mode must have the UNet's {unet.config.in_channels} channels, got {facts.mode!r}"
            )
    except ValueError as error:
        raise ValueError(f"`_ddpm_hf` in unet/config.json: {error}") from error
    return facts


def set_image_facts(unet: UNet2DModel, facts: ImageFacts) -> None:
    """Write the facts into the UNet's configuration, where `image_facts` reads them."""
    unet.register_to_config(**{config_extension.EXTENSION_KEY: facts.to_config()})


def is_int(value: Any) -> bool:
    """Whether this is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(value: Any) -> bool:
    """Whether this is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def is_size(value: Any) -> bool:
    """Whether this is a number of pixels that an image may have a side."""
    return is_int(value) and 1 <= value <= MAX_SIZE


def size_multiple(unet: UNet2DModel) -> int:
    """Height and width of what the network works on must be multiples of this."""
    return int(2 ** (len(unet.config.down_block_types) - 1))


def padded_size(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """Height and width, padded up to the next multiple."""
    height, width = (math.ceil(n / multiple) * multiple for n in size)
    return height, width


def centred_window(native: Sequence[int], padded: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of the padded image that are the image: training pads at all sides."""
    starts = [(p - n) // 2 for n, p in zip(native, padded, strict=True)]
    rows, columns = (slice(start, start + n) for start, n in zip(starts, native, strict=True))
    return rows, columns


def size_and_window(
    unet: UNet2DModel, facts: ImageFacts | None
) -> tuple[tuple[int, int], tuple[slice, slice]]:
    """The size that the network works at, and the window of it (rows, columns) that is the image.

    The former is `sample_size` up to a multiple of the down-sampling.
    """
    size = unet.config.sample_size
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_size, pair)):
        raise ValueError(
            f"unet.config.sample_size must be an int in 1..{MAX_SIZE} or a pair (height, width), "
            f"got {size!r}; set it with unet.register_to_config(sample_size=...)"
        )
    padded = padded_size(pair, size_multiple(unet))
    native = (facts.height, facts.width) if facts else tuple(pair)
    if any(n > p for n, p in zip(native, padded, strict=True)):
        raise ValueError(
            f"`_ddpm_hf` in unet/config.json: height, width {native} exceed the UNet's {padded}"
        )
    return padded, centred_window(native, padded)


def mode_and_bit_depth(
    output_type: str, num_channels: int, facts: ImageFacts | None
) -> tuple[str, int]:
    """Mode and bit depth of the images; PIL has 16 bits in grey only, so its colour gets 8."""
    checks.check_choice("output_type", output_type, OUTPUT_TYPES)
    if facts:
        is_colour = facts.mode != "L"
        return facts.mode, 8 if output_type == "pil" and is_colour else facts.bit_depth
    # Two channels may be anything.
    modes = {count: mode for mode, count in MODE_CHANNELS.items() if mode != "LA"}
    if output_type == "pil" and num_channels not in modes:
        raise ValueError(
            f'output_type="pil" is not possible: PIL has no image mode for the {num_channels} '
            'channels of this model; use "np" or "pt"'
        )
    return modes.get(num_channels, ""), 8


def to_images(x_0: Tensor, output_type: str, mode: str, bit_depth: int) -> Any:
    """x_0 in [-1, 1] as float32 images in [0, 1], or as PIL images (16-bit grey: mode "I;16")."""
    images = (x_0.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * (2**bit_depth - 1)).round()
    pixels = pixels.astype(np.uint16 if bit_depth == 16 else np.uint8)
    return [Image.fromarray(p[..., 0] if mode == "L" else p) for p in pixels]
