"""One image file to pixels: which mode becomes what, orientation, transparency, resizing. No torch.

| file mode                      | becomes    | remarks                                            |
|--------------------------------|------------|----------------------------------------------------|
| 1, L                           | L          | 1-bit becomes 0 and 255                            |
| RGB, CMYK, YCbCr               | RGB        | embedded colour profiles are not applied           |
| P (palette)                    | L or RGB   | L where every colour in use is grey                |
| LA, PA, RGBA, RGBa; 1, L, P,   | LA or RGBA | only if a kept pixel is not opaque, else L or RGB; |
| RGB, I;16 with one colour      |            | the colour hidden under full transparency is       |
| marked as transparent          |            | replaced by white                                  |
| I;16 (16-bit grey)             | L, 16 bit  | 8-bit grey beside it: value * 257; with colour     |
|                                |            | beside it it becomes 8 bit, value / 257, and this  |
|                                |            | is said, unless 16 bits are asked for              |
| I (32-bit integer)             | L, 16 bit  | likewise; refused where a value is outside 0..65535|
| RGB, LA or RGBA of 16 bit      | as 8 bit   | Pillow reads no more; counted and warned about     |
| F (float), LAB and others      | refused    | no defined range: scale them to 8 or 16 bit        |

A data set gets the smallest mode that loses nothing of any of its images: grey and colour give
RGB, opaque and transparent give an alpha channel, 8 and 16 bit of grey give 16 bit. A mode without
alpha that the user asks for puts transparent images on white. Resizing is Pillow's antialiased
bicubic filter with premultiplied alpha, in 8 bit for 8-bit images and in float for 16 bit.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Images whose header announces more pixels are refused before any of them is decoded."""

MAX_ASPECT = 4
"""Random crops are taken from the central part of an image, at most this much longer than wide."""

Cell = dict[str, Any]
"""One cell of a `datasets.Image` column: {"bytes": bytes or None, "path": str or None}."""

with suppress(ImportError):  # the codec of iPhones is not part of Pillow
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()
# Formats that Pillow decodes by itself and knows by a signature. EPS would start ghostscript.
_FORMATS: list[str] = [
    name
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "HEIF")
    if name in Image.OPEN
]
EXTENSIONS = {ext for ext, name in Image.registered_extensions().items() if name in _FORMATS}
# What gives them to Pillow where it lacks them.
_PACKAGES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow>=11.3"),
}

_GREY_16 = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
_GREY = {"1", "L", "LA"} | _GREY_16
_COLOUR = {"RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # the EXIF tag


class BadImage(ValueError):
    """Why one image cannot be used."""


@dataclass(frozen=True)
class Target:
    """What every image of a data set becomes.

    With `random_crop` the shorter side becomes min(height, width), and the longer one follows.
    """

    mode: str
    bit_depth: int
    height: int
    width: int
    random_crop: bool = False


def how_to_read(suffixes: Iterable[str]) -> str:
    """Which packages to install for files that cannot be read here, as the end of a message."""
    unread = sorted(_PACKAGES.keys() & set(suffixes) - EXTENSIONS)
    packages = sorted({_PACKAGES[suffix] for suffix in unread})
    return f"; for {' '.join(unread)} install {' '.join(packages)}" if unread else ""


def cell_name(cell: Cell | None) -> str:
    """The path in a cell, quoted for a message, or nothing."""
    return f" ({cell['path']!r})" if cell and cell["path"] else ""


def read_headers(cells: Sequence[Cell | None], root: str | None) -> dict[str, list[Any]]:
    """Size and mode of each image as its header tells it, without decoding."""
    blank = {"height": 0, "width": 0, "colour": False, "alpha": False, "deep": False}
    return _rows(cells, root, _header, blank)


def decode_images(
    cells: Sequence[Cell | None], root: str | None, target: Target
) -> dict[str, list[Any]]:
    """Pixels of each image in the target mode and size, as bytes of (C, H, W), with notes on it."""
    blank = dict.fromkeys(("height", "width", "source_height", "source_width", "peak"), 0)
    blank |= dict.fromkeys(("colour", "alpha", "animated", "narrowed"), False)
    return _rows(cells, root, lambda image: _decode(image, target), {"pixels": b"", **blank})


def _rows(
    cells: Sequence[Cell | None],
    root: str | None,
    read: Callable[[Image.Image], dict[str, Any]],
    blank: dict[str, Any],
) -> dict[str, list[Any]]:
    """`read` of every image, column by column; a bad one gives a blank row and its `problem`."""
    rows = [_row(cell, root, read, blank) for cell in cells]
    return {name: [row[name] for row in rows] for name in (*blank, "problem")}


def _row(
    cell: Cell | None,
    root: str | None,
    read: Callable[[Image.Image], dict[str, Any]],
    blank: dict[str, Any],
) -> dict[str, Any]:
    try:
        # Pillow warns of odd palettes, odd EXIF and large images; what matters is checked here.
        with warnings.catch_warnings(), closing(_stream(cell, root)) as stream:
            warnings.simplefilter("ignore")
            return {**read(_open(stream)), "problem": None}
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything, SyntaxError too
        return {**blank, "problem": _reason(error)}


def _reason(error: Exception) -> str:
    if isinstance(error, BadImage):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_FORMATS)})"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _stream(cell: Cell | None, root: str | None) -> BinaryIO:
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise BadImage("the cell holds no image")
    if cell["bytes"] is None:
        path = os.path.join(root or "", cell["path"])
        if not os.path.isfile(path):
            is_escaped = re.search(r"\\x[0-9a-f]{2}", path)
            raise BadImage(
                "its name is not UTF-8: rename it" if is_escaped else "there is no such file"
            )
        return open(path, "rb")
    if not cell["bytes"]:
        raise BadImage("the file is empty")
    return BytesIO(cell["bytes"])


def _open(stream: BinaryIO) -> Image.Image:
    image = Image.open(stream, formats=_FORMATS)  # reads the header only
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels: {image.width}x{image.height}")
    if image.mode not in _GREY | _COLOUR:
        raise BadImage(f"mode {image.mode} has no defined range: scale it to 8 or 16 bit")
    return image


def _header(image: Image.Image) -> dict[str, Any]:
    # To look for EXIF behind its pixels, Pillow would decode a PNG. Decoding heeds that, too.
    has_exif = image.format != "PNG" or "exif" in image.info
    turned = has_exif and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    return {
        "height": height,
        "width": width,
        "colour": image.mode in _COLOUR,
        "alpha": image.has_transparency_data,
        "deep": image.mode in _GREY_16,
    }


def _decode(image: Image.Image, target: Target) -> dict[str, Any]:
    animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    narrowed = _is_narrowed(image, target)
    image.load()
    image = ImageOps.exif_transpose(image)
    planes = _planes_16(image, target) if target.bit_depth == 16 else _planes_8(image, target)
    has_alpha = target.mode.endswith("A")
    if has_alpha:
        planes[:-1, planes[-1] == 0] = np.iinfo(planes.dtype).max
    return {
        "pixels": planes.tobytes(),
        "height": planes.shape[1],
        "width": planes.shape[2],
        "source_height": image.height,
        "source_width": image.width,
        "peak": int(planes.max()),
        "colour": image.mode in _COLOUR and not (image.mode in ("P", "PA") and _is_grey(planes)),
        "alpha": has_alpha and int(planes[-1].min()) < np.iinfo(planes.dtype).max,
        "animated": animated,
        "narrowed": narrowed,
    }


def _is_narrowed(image: Image.Image, target: Target) -> bool:
    """Whether the file holds 16 bits per channel and 8 are used; known before decoding only."""
    if image.mode in _GREY_16:
        return target.bit_depth == 8
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", [])]
    return any(";16" in raw_mode for raw_mode in raw_modes)


def _is_grey(planes: NDArray[Any]) -> bool:
    return len(planes) < 3 or bool((planes[:3] == planes[0]).all())


def _planes_8(image: Image.Image, target: Target) -> NDArray[np.uint8]:
    """(C, H, W) uint8 of any image; Pillow premultiplies LA and RGBA when it resizes."""
    if image.mode in _GREY_16:
        grey, opaque = np.rint(_grey_16(image, "LA") / 257).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, opaque], -1) if opaque.min() == 0 else grey)
    array = np.array(_fit(_to_mode(image, target.mode), target))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _planes_16(image: Image.Image, target: Target) -> NDArray[np.uint16]:
    """(C, H, W) uint16 of any image."""
    planes = (
        _grey_16(image, target.mode) if image.mode in _GREY_16 else _widened(image, target.mode)
    )
    if target.mode.endswith("A"):
        planes[:-1] *= planes[-1:] / 65535
    planes = np.stack([np.asarray(_fit(Image.fromarray(plane), target)) for plane in planes])
    if target.mode.endswith("A"):
        planes[:-1] *= 65535 / np.maximum(planes[-1:], 1)
    return np.rint(planes).clip(0, 65535).astype(np.uint16)


def _grey_16(image: Image.Image, mode: str) -> NDArray[np.float32]:
    """16-bit grey as the planes of `mode`, (C, H, W) float32 in 0..65535."""
    grey = np.asarray(image).astype(np.float32)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadImage(f"values {grey.min():.0f}..{grey.max():.0f} are outside 0..65535")
    opaque = np.where(grey == image.info.get("transparency", -1), 0, 65535).astype(np.float32)
    if not mode.endswith("A"):
        return np.stack([np.where(opaque == 0, np.float32(65535), grey)] * len(mode))
    return np.stack([grey] * (len(mode) - 1) + [opaque])


def _widened(image: Image.Image, mode: str) -> NDArray[np.float32]:
    """An 8-bit image as the planes of `mode`, (C, H, W) float32 in 0..65535: 255 * 257 = 65535."""
    array = np.asarray(_to_mode(image, mode)).astype(np.float32) * 257
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _fit(image: Image.Image, target: Target) -> Image.Image:
    """The largest centred part that has the shape of the output, resized to it."""
    out_width, out_height = _out_size(image, target)
    scale = min(image.width / out_width, image.height / out_height)
    width, height = max(1, round(out_width * scale)), max(1, round(out_height * scale))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    if (width, height) == (out_width, out_height):
        return image.crop(box)  # exact, where resize would go through premultiplied 8 bit
    return image.resize((out_width, out_height), Image.Resampling.BICUBIC, box)


def _out_size(image: Image.Image, target: Target) -> tuple[int, int]:
    if not target.random_crop:
        return target.width, target.height
    return shorter_side_to(image.width, image.height, min(target.width, target.height), MAX_ASPECT)


def shorter_side_to(
    width: int, height: int, size: int, max_aspect: float = float("inf")
) -> tuple[int, int]:
    """Width and height once the shorter is `size`, the longer at most `max_aspect` times that."""
    scale = size / min(width, height)
    longest = min(size * max_aspect, max(width, height) * scale)
    return (round(longest), size) if width >= height else (size, round(longest))
