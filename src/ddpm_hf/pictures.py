"""Pictures: side by side for people, and in files for people and programs."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[Any]  # one image, (H, W, C), float in [0, 1]
# A grid cell is enlarged by whole factors until its longer side has at least this many pixels.
LEGIBLE_PIXELS = 64
MOST_PICTURE_CHANNELS = 4
LONGEST_NAME = 24  # characters of a row's name in a grid
BACKDROP = (235, 235, 235)


def quantised(image: Pixels, bit_depth: int) -> Pixels:
    """Pixels of 8 or 16 bits from pixels in [0, 1]."""
    pixels: Pixels = (image * (2**bit_depth - 1)).round()
    return pixels.astype(np.uint16 if bit_depth == 16 else np.uint8)


def to_pil(image: Pixels, bit_depth: int = 8) -> Image.Image:
    """The picture of pixels (H, W, C): L, LA, RGB or RGBA for C = 1, 2, 3, 4.

    Args:
        image: in [0, 1]; or uint8, or grey of uint16, which are kept.
        bit_depth: of what is in [0, 1]; PIL has 16 bits in grey only, and colour gets 8.

    Raises:
        ValueError: if C > 4.
    """
    num_channels = image.shape[-1]
    if num_channels > MOST_PICTURE_CHANNELS:
        raise ValueError(f"a picture has 1 to {MOST_PICTURE_CHANNELS} channels, not {num_channels}")
    is_whole = image.dtype.kind == "u"
    pixels = image if is_whole else quantised(image, bit_depth if num_channels == 1 else 8)
    return Image.fromarray(pixels[..., 0] if num_channels == 1 else pixels)


def image_grid(
    images: Sequence[Image.Image | Pixels | None],
    columns: int | None = None,
    row_names: Sequence[str] | None = None,
    longest_name: int = LONGEST_NAME,
) -> Image.Image:
    """One picture of all images, row by row, small ones enlarged without smoothing.

    Args:
        images: of one size: PIL images in any mode, or pixels (H, W, C) in [0, 1]. Transparency is
            shown over a light grey; of more than four channels, each is a grey tile. None leaves a
            place empty, but the first.
        columns: images in a row, by default such that the grid is about square.
        row_names: written to the left of the rows, such as the names of classes.
        longest_name: what of those is longer than so many characters is cut.
    Returns:
        an RGB image.
    Raises:
        ValueError: if there is no image, or `columns` is not positive.
    """
    if not images:
        raise ValueError("images is empty: a grid needs at least one image")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cells = {place: _visible(image) for place, image in enumerate(images) if image is not None}
    factor = max(1, math.ceil(LEGIBLE_PIXELS / max(cells[0].size)))
    width, height = (side * factor for side in cells[0].size)
    gap = 2
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new("RGB", size, BACKDROP)
    for place, cell in cells.items():
        cell = cell.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(cell, (place % columns * (width + gap), place // columns * (height + gap)))
    if not row_names:
        return grid
    return _with_row_names(grid, row_names, height + gap, longest_name)


def grid_by_row(images: Sequence[Pixels], rows: Sequence[str]) -> Image.Image:
    """A grid with a row for each name in `rows`, which has that of every image."""
    by_row: dict[str, list[Pixels | None]] = {}
    for image, name in zip(images, rows, strict=True):
        by_row.setdefault(name, []).append(image)
    columns = max(map(len, by_row.values()))
    cells = [cell for row in by_row.values() for cell in [*row, *[None] * (columns - len(row))]]
    return image_grid(cells, columns, list(by_row))


def _with_row_names(
    grid: Image.Image, names: Sequence[str], row_height: int, longest: int
) -> Image.Image:
    """The grid with a name, cut where it is long, at the middle of the left of each row."""
    font = ImageFont.load_default(size=14)
    names = [textwrap.shorten(name, longest, placeholder="...") for name in names]
    margin = math.ceil(max(font.getlength(name) for name in names)) + 12
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((6, row * row_height + row_height // 2), name, "black", font, anchor="lm")
    return picture


def _visible(image: Image.Image | Pixels) -> Image.Image:
    """The image in RGB, as a person would see it."""
    if not isinstance(image, Image.Image):
        height, _, num_channels = image.shape
        if num_channels > MOST_PICTURE_CHANNELS:
            image = image.transpose(0, 2, 1).reshape(height, -1, 1)  # its channels side by side
        image = to_pil(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16 bit to 8 instead of scaling.
        return image.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode in ("LA", "RGBA"):
        backdrop = Image.new("RGBA", image.size, (*BACKDROP, 255))
        return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_picture(path: Path) -> bool:
    """Whether the name is that of a picture that can be written, such as "grid.png"."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.SAVE
