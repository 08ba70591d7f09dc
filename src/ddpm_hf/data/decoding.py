"""Decoding of an image file: mode, orientation, transparency and size. Does not import torch.

| file mode                      | result     | remarks                                            |
|--------------------------------|------------|----------------------------------------------------|
| 1, L                           | L          | 1-bit images get the values 0 and 255              |
| RGB, CMYK, YCbCr               | RGB        | embedded colour profiles are not applied           |
| P (palette)                    | L or RGB   | L if all used colours are grey                     |
| LA, PA, RGBA, RGBa; 1, L, P,   | LA or RGBA | L or RGB if all kept pixels are opaque; the colour |
| RGB, I;16 with one transparent |            | of fully transparent pixels is replaced by white   |
| colour                         |            |                                                    |
| I;16 (16-bit grey)             | L, 16 bit  | 8-bit grey in the same dataset: value * 257; with  |
|                                |            | colour in the dataset: 8 bit, value / 257, with a |
|                                |            | warning, unless 16 bits are requested              |
| I (32-bit integer)             | L, 16 bit  | as I;16; error if a value is outside 0..65535      |
| RGB, LA or RGBA of 16 bit      | as 8 bit   | Pillow reads 8 bits; counted, with a warning, in   |
|                                |            | PNG, TIFF and PPM                                  |
| F (float), LAB and others      | error      | no defined range: scale them to 8 or 16 bit        |

A dataset gets the smallest mode that is lossless for all of its images: grey and colour give RGB,
opaque and transparent give an alpha channel, 8-bit and 16-bit grey give 16 bit. If a mode without
alpha is requested, transparent images are composited on white. Resizing uses Pillow's antialiased
bicubic filter with premultiplied alpha, in 8 bit for 8-bit images and in float for 16 bit.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any, BinaryIO, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.data.errors import BadImage
from ddpm_hf.data.image_conversion import GREY_16, Target, to_target

MAX_PIXELS = 64_000_000
"""Images with more pixels, according to their header, are rejected before decoding."""
FILES_AT_ONCE = 64
"""Number of encoded files to hold in memory, each of up to some MB."""

with suppress(ImportError):  # optional codec of iPhone photos
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()
# Formats that Pillow decodes itself and detects by a signature. EPS would start ghostscript.
_FORMATS: list[str] = [
    name
    for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "HEIF")
    if name in Image.OPEN
]
EXTENSIONS = {ext for ext, name in Image.registered_extensions().items() if name in _FORMATS}
# Packages that add a format to Pillow.
_PACKAGES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow>=11.3"),
}

_GREY = {"1", "L", "LA"} | GREY_16
_COLOUR = {"RGB", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # EXIF tag
_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\.|pillow_heif"), 0)
"""Entry of `warnings.filters` for the modules of Pillow."""


class Cell(TypedDict):
    """Cell of a `datasets.Image` column: the bytes of a file, or its path."""

    bytes: bytes | None
    path: str | None


@dataclass(frozen=True)
class ImageHeader:
    """Properties in the header of an image file, after EXIF rotation."""

    height: int = 0  # 0 for an unusable image
    width: int = 0
    colour: bool = False
    alpha: bool = False  # may have transparent pixels
    deep: bool = False  # 16-bit grey
    problem: str | None = None  # why the image is unusable


@dataclass(frozen=True)
class DecodedImage:
    """Decoded and resized image."""

    pixels: bytes = b""  # array (C, height, width), uint8 or uint16
    height: int = 0  # 0 for an unusable image
    width: int = 0
    source_height: int = 0  # of the file
    source_width: int = 0
    peak: int = 0  # largest value
    colour: bool = False
    alpha: bool = False  # has pixels that are not opaque
    animated: bool = False  # several frames or pages
    narrowed: bool = False  # from 16 to 8 bits per channel
    problem: str | None = None  # why the image is unusable


Row = TypeVar("Row", ImageHeader, DecodedImage)


def install_hint(suffixes: Iterable[str]) -> str:
    """End of a message that names packages for unsupported file formats; empty without any."""
    unread = sorted(_PACKAGES.keys() & set(suffixes) - EXTENSIONS)
    packages = sorted({_PACKAGES[suffix] for suffix in unread})
    return f"; for {' '.join(unread)} install {' '.join(packages)}" if unread else ""


def cell_name(cell: Cell | None) -> str:
    """Quoted path of a cell in parentheses, for a message; empty without path."""
    return f" ({cell['path']!r:.300})" if cell and cell["path"] else ""


def read_headers(cells: Sequence[Cell | None], root: str | None) -> dict[str, list[Any]]:
    """Columns of `ImageHeader`, without decoding the images."""
    return _to_columns([_read(cell, root, _read_header, ImageHeader) for cell in cells])


def decode_images(
    cells: Sequence[Cell | None], root: str | None, target: Target
) -> dict[str, list[Any]]:
    """Columns of `DecodedImage`, in the target format."""
    decode = lambda image: _decode(image, target)  # noqa: E731
    return _to_columns([_read(cell, root, decode, DecodedImage) for cell in cells])


def _to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = [field.name for field in fields(rows[0])]
    return {name: [getattr(row, name) for row in rows] for name in names}


def _read(
    cell: Cell | None, root: str | None, read: Callable[[Image.Image], Row], kind: type[Row]
) -> Row:
    """Result of `read` for the image in a cell, or a row with only a `problem`."""
    _ignore_warnings_of_pillow()
    try:
        with closing(_open_file(cell, root)) as file:
            return read(_open_image(file))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises all kinds of errors for damaged files
        return kind(problem=_reason(error))


def _ignore_warnings_of_pillow() -> None:
    """Ignore those about unusual palettes, EXIF data and sizes; the relevant ones are checked here.

    `catch_warnings` is not safe in threads, which decode the shards of a stream: it could leave all
    warnings of the process ignored.
    """
    if _PILLOW not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW[3].pattern)


def _reason(error: Exception) -> str:
    if isinstance(error, BadImage):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_FORMATS)})"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _open_file(cell: Cell | None, root: str | None) -> BinaryIO:
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise BadImage("the cell contains no image")
    if cell["bytes"] is None:
        path = os.path.join(root or "", cell["path"] or "")
        if not os.path.isfile(path):
            is_escaped = re.search(r"\\x[0-9a-f]{2}", path)
            raise BadImage(
                "the file name is not UTF-8: rename the file" if is_escaped else "file not found"
            )
        return open(path, "rb")
    if not cell["bytes"]:
        raise BadImage("the file is empty")
    return BytesIO(cell["bytes"])


def _open_image(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=_FORMATS)  # reads only the header
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels: {image.width}x{image.height}")
    if image.mode not in _GREY | _COLOUR:
        raise BadImage(f"mode {image.mode} has no defined range: scale it to 8 or 16 bit")
    return image


def _read_header(image: Image.Image) -> ImageHeader:
    # Pillow gives the size of a TIFF after rotation, and would decode a PNG to find EXIF after its
    # pixels; `_decode` applies that as well.
    is_known = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
    is_rotated = not is_known and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    height, width = (image.width, image.height) if is_rotated else (image.height, image.width)
    return ImageHeader(
        height=height,
        width=width,
        colour=image.mode in _COLOUR,
        alpha=image.has_transparency_data,
        deep=image.mode in GREY_16,
    )


def _decode(image: Image.Image, target: Target) -> DecodedImage:
    animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    narrowed = _is_narrowed(image, target)
    image.load()
    image = ImageOps.exif_transpose(image)
    planes = to_target(image, target)
    has_alpha = target.mode.endswith("A")
    if has_alpha:
        planes[:-1, planes[-1] == 0] = np.iinfo(planes.dtype).max
    return DecodedImage(
        pixels=planes.tobytes(),
        height=planes.shape[1],
        width=planes.shape[2],
        source_height=image.height,
        source_width=image.width,
        peak=int(planes.max()),
        colour=image.mode in _COLOUR and not (image.mode in ("P", "PA") and _is_grey(planes)),
        alpha=has_alpha and int(planes[-1].min()) < np.iinfo(planes.dtype).max,
        animated=animated,
        narrowed=narrowed,
    )


def _is_narrowed(image: Image.Image, target: Target) -> bool:
    """Whether 16 bits per channel are reduced to 8; only known before decoding."""
    if image.mode in GREY_16:
        return target.bit_depth == 8
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    if image.format == "PPM":  # raw mode, with the largest value unless that is usual
        return any(isinstance(argument, tuple) and argument[1] > 255 for argument in arguments)
    return any(";16" in str(argument) for argument in arguments)


def _is_grey(planes: NDArray[Any]) -> bool:
    return len(planes) < 3 or bool((planes[:3] == planes[0]).all())
