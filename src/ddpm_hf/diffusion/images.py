# SPDX-License-Identifier: Apache-2.0
"""What the images of a model are: the facts in its configuration, their window, mode and pixels."""

import math
from typing import Any

import numpy as np
from diffusers.models import UNet2DModel
from PIL import Image
from torch import Tensor

from . import checks

Facts = dict[str, Any]

FACTS_FORMAT = 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODE_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def image_facts(unet: UNet2DModel) -> Facts | None:
    """What the training images were, as the trainer wrote it into the UNet's configuration.

    Args:
        unet: its `config` may hold the key `_ddpm_hf`.
    Returns:
        `{"format_version": 1, "image": {"mode", "height", "width", "bit_depth"}, "class_names"}`
        (`mode` and `class_names` may be absent), or None where there is nothing, or where a newer
        version of the package wrote it (with a warning: images come as stock diffusers gives them).
    Raises:
        ValueError: if what stands there contradicts itself or the UNet.
    """
    facts = unet.config.get("_ddpm_hf")
    if facts is None:
        return None
    facts = facts if isinstance(facts, dict) else {}
    version: Any = facts.get("format_version")
    if is_int(version) and version > FACTS_FORMAT:
        checks.warn(
            f"the image facts of this model have format {version}, this copy of ddpm_hf knows "
            f"{FACTS_FORMAT}: they are ignored; upgrade ddpm_hf to use them"
        )
        return None
    _check_facts(facts, unet.config.in_channels)
    return dict(facts)


def _check_facts(facts: Facts, num_channels: int) -> None:
    image = facts.get("image")
    image = image if isinstance(image, dict) else {}
    mode, names = image.get("mode"), facts.get("class_names")
    size: tuple[Any, ...] = image.get("height"), image.get("width")
    for name, value, is_right, expected in (
        ("format_version", facts.get("format_version"), facts.get("format_version") == 1, "1"),
        ("height, width", size, all(map(is_size, size)), "positive ints"),
        ("bit_depth", image.get("bit_depth"), image.get("bit_depth") in (8, 16), "8 or 16"),
        ("mode", mode, mode is None or MODE_CHANNELS.get(str(mode)) == num_channels,
         f"a mode with the UNet's {num_channels} channels"),
        ("class_names", names, names is None or is_names(names), "a list of names"),
    ):  # fmt: skip
        if not is_right:
            raise ValueError(
                f"`_ddpm_hf` in unet/config.json: {name} must be {expected}, got {value!r}"
            )


def is_int(value: Any) -> bool:
    """Whether this is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(value: Any) -> bool:
    """Whether this is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def is_size(value: Any) -> bool:
    """Whether this is a positive int."""
    return is_int(value) and value > 0


def frame(unet: UNet2DModel, facts: Facts | None) -> tuple[list[int], list[Any]]:
    """The size that the network works at, and the window of it (rows, columns) that is the image.

    The former is `sample_size` up to a multiple of the down-sampling; training pads at all sides.
    """
    size = unet.config.sample_size
    pair = (size, size) if is_int(size) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_size, pair)):
        raise ValueError(
            "unet.config.sample_size must be a positive int or a pair (height, width), got "
            f"{size!r}; set it with unet.register_to_config(sample_size=...)"
        )
    multiple = 2 ** (len(unet.config.down_block_types) - 1)
    padded = [math.ceil(n / multiple) * multiple for n in pair]
    native = (facts["image"]["height"], facts["image"]["width"]) if facts else pair
    if any(n > p for n, p in zip(native, padded, strict=True)):
        raise ValueError(
            f"`_ddpm_hf` in unet/config.json: height, width {native} exceed the UNet's {padded}"
        )
    starts = [(p - n) // 2 for n, p in zip(native, padded, strict=True)]
    return padded, [slice(s, s + n) for s, n in zip(starts, native, strict=True)]


def image_form(output_type: str, num_channels: int, facts: Facts | None) -> tuple[str, int]:
    """Mode and bit depth of the images; an error where PIL has no such form."""
    checks.check_choice("output_type", output_type, OUTPUT_TYPES)
    image = facts["image"] if facts else {}
    mode = image.get("mode", {1: "L", 3: "RGB", 4: "RGBA"}.get(num_channels))
    bit_depth = image.get("bit_depth", 8)
    if output_type == "pil" and mode is None:
        raise ValueError(
            f'output_type="pil" is not possible: PIL has no image mode for the {num_channels} '
            'channels of this model; use "np" or "pt"'
        )
    if output_type == "pil" and bit_depth == 16 and mode != "L":
        raise ValueError(
            f'output_type="pil" is not possible: PIL has 16-bit images in grey only, not in {mode};'
            ' use "np" (values in [0, 1]: times 65535) or "pt"'
        )
    return str(mode), bit_depth


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
