"""Pictures and masks from visitors, checked and brought into the format of a model."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ddpm_hf.app.request_errors import RequestError
from ddpm_hf.app.served_models import ServedModel
from ddpm_hf.pictures import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_UPLOAD_PIXELS = 2**25
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def open_upload(path: Any, model: ServedModel) -> Image.Image:
    """The picture in a file, cropped to the model's shape and resized to its size.

    Args:
        path: file of the upload.
        model: determines size, mode and bit depth.
    Raises:
        ValueError: for a file that is not a picture in one of `FORMATS` or is too large, and for a
            model without a picture mode.
    """
    return fitted(_opened(path), model)


def open_mask(path: Any, model: ServedModel) -> Image.Image:
    """The mask in a file, white above half, in the model's size.

    Raises:
        ValueError: as `open_upload`.
    """
    mask = ImageOps.fit(_in_8_bits(_opened(path)).convert("L"), model.size, Image.Resampling.BOX)
    return mask.point(lambda value: 255 * (value > 127))


def _opened(path: Any) -> Image.Image:
    if not isinstance(path, str | Path):
        raise RequestError("no_upload")
    try:
        # Opening reads the header only; the size is checked before pixels are decoded.
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_UPLOAD_PIXELS:
                raise RequestError(
                    "upload_size",
                    most=f"{MAX_UPLOAD_PIXELS:,}",
                    width=f"{width:,}",
                    height=f"{height:,}",
                )
            return ImageOps.exif_transpose(picture).copy()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError("upload", formats=", ".join(FORMATS)) from error


def fitted(picture: Image.Image, model: ServedModel) -> Image.Image:
    """A picture in the format of a model: mode, size by cropping and resizing, bit depth."""
    channels = model.pipeline.unet.config.in_channels
    if channels not in _MODES:
        raise RequestError("channels", channels=channels)
    is_deep = channels == 1 and model.bit_depth == 16
    plain = picture.convert("F") if is_deep and _is_deep(picture) else _plain(picture, channels)
    is_enlargement = plain.width % model.size[0] == 0 and plain.height % model.size[1] == 0
    method = Image.Resampling.BOX if is_enlargement else Image.Resampling.LANCZOS
    plain = ImageOps.fit(plain, model.size, method)
    if plain.mode == "F":
        return Image.fromarray(np.asarray(plain).clip(0, 65535).round().astype(np.uint16))
    plain = plain.convert(_MODES[channels])
    return Image.fromarray(np.asarray(plain).astype(np.uint16) * 257) if is_deep else plain


def _plain(picture: Image.Image, channels: int) -> Image.Image:
    """The picture in 8 bits, as RGBA for a model with alpha, else as RGB."""
    plain = _in_8_bits(picture).convert("RGBA" if _MODES[channels] in ("LA", "RGBA") else "RGB")
    if picture.mode in ("LA", "PA", "RGBA", "P") and plain.mode == "RGB":
        return to_rgb(picture.convert("RGBA"))
    return plain


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode.startswith("I;16")


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """The picture; 16 bits, which Pillow would convert by clipping, are scaled."""
    return to_rgb(picture) if _is_deep(picture) else picture


def mask_picture(value: Any, model: ServedModel) -> Image.Image:
    """Picture of a mask, white where it was painted.

    Args:
        value: value of the painter; "mask" has a character 0 or 1 for each pixel, row by row.
        model: determines the size.
    Raises:
        ValueError: for a mask of another form or size, and for an empty one.
    """
    width, height = model.size
    text = value.get("mask") if isinstance(value, dict) else None
    if not isinstance(text, str) or "1" not in text:
        raise RequestError("mask")
    if len(text) != width * height or not set(text) <= {"0", "1"}:
        raise RequestError("mask_size", width=width, height=height)
    bits = np.frombuffer(text.encode(), np.uint8) - ord("0")
    return Image.fromarray(bits.reshape(height, width) * np.uint8(255))
