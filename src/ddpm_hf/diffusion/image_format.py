# SPDX-License-Identifier: Apache-2.0
"""Format of a model's images: mode, size, bit depth, classes, and padding of x_t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers.models import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from . import checks, config_extension

FACTS_FORMAT = 1
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
        raise ValueError(f"`_ddpm_hf` in unet/config.json: {error}") from None
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
