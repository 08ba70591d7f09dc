"""Conversion of pixels to PIL images, and image grids."""

import math
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ddpm_hf.utils import fonts

Pixels = npt.NDArray[Any]  # one image, (H, W, C), float in [0, 1]
# Small images are enlarged by an integer factor: to cells of at least 64 pixels, and further, up to
# 256, as long as the longer side of the grid stays within 768.
MIN_CELL_PIXELS, MAX_CELL_PIXELS, MAX_GRID_PIXELS = 64, 256, 768
MAX_PICTURE_CHANNELS = 4
MAX_NAME_LENGTH = 24  # characters
BACKGROUND = (235, 235, 235)


def quantised(image: Pixels, bit_depth: int) -> Pixels:
    """uint8 or uint16 pixels from pixels in [0, 1]."""
    pixels: Pixels = (image * (2**bit_depth - 1)).round()
    return pixels.astype(np.uint16 if bit_depth == 16 else np.uint8)


def to_pil(image: Pixels, bit_depth: int = 8) -> Image.Image:
    """PIL image from pixels (H, W, C), in mode L, LA, RGB or RGBA for C = 1, 2, 3, 4.

    Args:
        image: floats in [0, 1], uint8, or uint16 with C = 1.
        bit_depth: bits per channel for floats; 8 for more than one channel, because PIL has 16 bits
            only for greyscale.

    Raises:
        ValueError: if C > 4.
    """
    num_channels = image.shape[-1]
    if num_channels > MAX_PICTURE_CHANNELS:
        raise ValueError(
            f"`image` must have 1 to {MAX_PICTURE_CHANNELS} channels, got {num_channels}"
        )
    is_quantised = image.dtype.kind == "u"
    pixels = image if is_quantised else quantised(image, bit_depth if num_channels == 1 else 8)
    return Image.fromarray(pixels[..., 0] if num_channels == 1 else pixels)


def image_grid(
    images: Sequence[Image.Image | Pixels | None],
    columns: int | None = None,
    row_names: Sequence[str] | None = None,
    max_name_length: int = MAX_NAME_LENGTH,
    column_names: Sequence[str] | None = None,
) -> Image.Image:
    """Image grid in row-major order; small images are enlarged without interpolation.

    Args:
        images: PIL images in any mode, or pixels (H, W, C) in [0, 1], all of one size. Transparent
            images are shown on light grey; with more than four channels, each channel is a grey
            tile. None leaves a cell empty.
        columns: images per row; by default the grid is about square.
        row_names: labels to the left of the rows, such as class names.
        max_name_length: number of characters after which row names are truncated.
        column_names: labels above the columns.
    Returns:
        an RGB image.
    Raises:
        ValueError: if there is no image, or `columns` is not positive.
    """
    if not images:
        raise ValueError("`images` must contain at least one image, got none")
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cells = {i: to_rgb(image) for i, image in enumerate(images) if image is not None}
    size = next(iter(cells.values())).size
    factor = _enlargement(max(size), max(rows, columns))
    width, height = (side * factor for side in size)
    gap = 2
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new("RGB", size, BACKGROUND)
    for i, cell in cells.items():
        cell = cell.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(cell, (i % columns * (width + gap), i // columns * (height + gap)))
    if row_names:
        grid = _with_row_names(grid, row_names, height + gap, max_name_length)
    if column_names:
        grid = _with_column_names(grid, column_names, width + gap, columns)
    return grid


def _enlargement(cell: int, count: int) -> int:
    """Integer factor for cells of `cell` pixels, `count` side by side."""
    by_grid = min(MAX_GRID_PIXELS // (count * cell), MAX_CELL_PIXELS // cell)
    return max(1, math.ceil(MIN_CELL_PIXELS / cell), by_grid)


def grid_by_row(
    images: Sequence[Pixels], labels: Sequence[int], class_names: Sequence[str]
) -> Image.Image:
    """Image grid with one row per class, in the order of their first images, and its name.

    A class whose name no installed font can draw has its number; a warning lists these names.

    Args:
        images: as for `image_grid`.
        labels: class number of each image.
        class_names: names of the classes by number.
    """
    by_row: dict[int, list[Pixels | None]] = {}
    for image, label in zip(images, labels, strict=True):
        by_row.setdefault(int(label), []).append(image)
    columns = max(map(len, by_row.values()))
    cells = [cell for row in by_row.values() for cell in [*row, *[None] * (columns - len(row))]]
    names = {label: class_names[label] for label in by_row}
    undrawable = {n: name for n, name in names.items() if not fonts.font_with(_shortened(name))}
    if undrawable:
        legend = ", ".join(f"{n} = {name}" for n, name in undrawable.items())
        warnings.warn(
            f"no installed font has the characters of these classes; their rows show the numbers: "
            f"{legend}",
            stacklevel=2,
        )
    return image_grid(cells, columns, [str(n) if n in undrawable else names[n] for n in names])


def _shortened(name: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """The name, normalized to composed characters and cut to a number of characters."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    return name if len(name) <= max_length else name[: max_length - 3] + "..."


def _with_row_names(
    grid: Image.Image, names: Sequence[str], row_height: int, max_length: int
) -> Image.Image:
    """The grid with the names in a left margin, vertically centred on the rows."""
    names = [_shortened(name, max_length) for name in names]
    drawn = [fonts.font_with(name) or fonts.default_font() for name in names]
    widths = [font.getlength(name) for name, font in zip(names, drawn, strict=True)]
    margin = math.ceil(max(widths)) + 12
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, (name, font) in enumerate(zip(names, drawn, strict=True)):
        draw.text((6, row * row_height + row_height // 2), name, "black", font, anchor="lm")
    return picture


def _with_column_names(
    grid: Image.Image, names: Sequence[str], column_width: int, columns: int
) -> Image.Image:
    """The grid with the names above its columns, which are at its right end."""
    font, height = fonts.default_font(), 24
    picture = Image.new("RGB", (grid.width, grid.height + height), "white")
    picture.paste(grid, (0, height))
    draw, left = ImageDraw.Draw(picture), grid.width - columns * column_width
    for column, name in enumerate(names):
        x = left + column * column_width + column_width // 2
        draw.text((x, height // 2), name, "black", font, anchor="mm")
    return picture


def to_rgb(image: Image.Image | Pixels) -> Image.Image:
    """The image as 8-bit RGB."""
    if not isinstance(image, Image.Image):
        height, _, num_channels = image.shape
        if num_channels > MAX_PICTURE_CHANNELS:
            image = image.transpose(0, 2, 1).reshape(height, -1, 1)  # channels side by side
        image = to_pil(image)
    if image.mode.startswith("I;16"):
        # Pillow converts 16 bits to 8 by clipping.
        return image.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode in ("LA", "RGBA"):
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_picture(path: Path) -> bool:
    """Whether the suffix belongs to an image format that Pillow can write, such as "grid.png"."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
