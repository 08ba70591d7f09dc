"""Conversion of an opened image to the mode, bit depth and size of a dataset."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_hf.data.errors import BadImage

MAX_ASPECT = 4
"""Largest aspect ratio of the central part from which random crops are taken."""

GREY_16 = {"I;16", "I;16B", "I;16L", "I;16N", "I"}


@dataclass(frozen=True)
class Target:
    """Format of the decoded images of a dataset.

    With `random_crop` the shorter side becomes min(height, width) and the aspect ratio is kept.
    """

    mode: str
    bit_depth: int
    height: int
    width: int
    random_crop: bool = False


def to_target(image: Image.Image, target: Target) -> NDArray[Any]:
    """The image in the target format, (C, H, W), uint8 or uint16."""
    return _planes_16(image, target) if target.bit_depth == 16 else _planes_8(image, target)


def _planes_8(image: Image.Image, target: Target) -> NDArray[np.uint8]:
    """The image in the target mode, (C, H, W) uint8; Pillow premultiplies alpha when resizing."""
    if image.mode in GREY_16:
        grey, opaque = np.rint(_grey_16(image, "LA") / 257).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, opaque], -1) if opaque.min() == 0 else grey)
    array = np.array(_fit(_to_mode(image, target.mode), target))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _planes_16(image: Image.Image, target: Target) -> NDArray[np.uint16]:
    """The image in the target mode, (C, H, W) uint16."""
    planes = _grey_16(image, target.mode) if image.mode in GREY_16 else _widened(image, target.mode)
    if target.mode.endswith("A"):
        planes[:-1] *= planes[-1:] / 65535
    planes = np.stack([np.asarray(_fit(Image.fromarray(plane), target)) for plane in planes])
    if target.mode.endswith("A"):
        planes[:-1] *= 65535 / np.maximum(planes[-1:], 1)
    return np.rint(planes).clip(0, 65535).astype(np.uint16)


def _grey_16(image: Image.Image, mode: str) -> NDArray[np.float32]:
    """A 16-bit grey image in `mode`, (C, H, W) float32 in 0..65535."""
    grey = np.asarray(image).astype(np.float32)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadImage(f"values {grey.min():.0f}..{grey.max():.0f} are outside 0..65535")
    opaque = np.where(grey == image.info.get("transparency", -1), 0, 65535).astype(np.float32)
    if not mode.endswith("A"):
        return np.stack([np.where(opaque == 0, np.float32(65535), grey)] * len(mode))
    return np.stack([grey] * (len(mode) - 1) + [opaque])


def _widened(image: Image.Image, mode: str) -> NDArray[np.float32]:
    """An 8-bit image in `mode`, (C, H, W) float32 in 0..65535: 255 * 257 = 65535."""
    array = np.asarray(_to_mode(image, mode)).astype(np.float32) * 257
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _fit(image: Image.Image, target: Target) -> Image.Image:
    """Largest centred crop with the output's aspect ratio, resized to the output size."""
    out_width, out_height = _output_size(image, target)
    scale = min(image.width / out_width, image.height / out_height)
    width, height = max(1, round(out_width * scale)), max(1, round(out_height * scale))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    if (width, height) == (out_width, out_height):
        return image.crop(box)  # exact; resize would round premultiplied 8 bit
    return image.resize((out_width, out_height), Image.Resampling.BICUBIC, box)


def _output_size(image: Image.Image, target: Target) -> tuple[int, int]:
    if not target.random_crop:
        return target.width, target.height
    return resize_shorter_side(
        image.width, image.height, min(target.width, target.height), MAX_ASPECT
    )


def resize_shorter_side(
    width: int, height: int, size: int, max_aspect: float = float("inf")
) -> tuple[int, int]:
    """Width and height with a shorter side of `size`, and a longer one up to `max_aspect` times."""
    scale = size / min(width, height)
    longest = min(size * max_aspect, max(width, height) * scale)
    return (round(longest), size) if width >= height else (size, round(longest))
