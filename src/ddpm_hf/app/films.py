"""Films of sampling as one small picture for the browser, and as GIF."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ddpm_hf.pictures import Pixels, image_grid, quantised, to_rgb

MAX_FRAMES, MIN_FRAMES = 60, 8
# Pixels of all images of a frame; larger frames are reduced.
MAX_FRAME_PIXELS = 2**16
# Size of the pixels of a film; PNG does not compress noise.
MAX_FILM_BYTES = 3_000_000
MAX_GIF_PIXELS = 384  # longer side of one of the two grids
FRAME_MS, LAST_FRAME_MS = 60, 2000


@dataclass(frozen=True)
class Frame:
    """One step of sampling.

    Attributes:
        step: number of the step, from 1; 0 for the noise.
        timestep: t.
        x_t: what the network sees, N reduced images (H, W, 3) uint8.
        x_0_hat: estimate of x_0, same shape.
    """

    step: int
    timestep: float
    x_t: Pixels
    x_0_hat: Pixels


def reduction(num_images: int, size: tuple[int, int]) -> int:
    """Factor by which the images in a frame are reduced; 1 for small ones."""
    pixels = num_images * size[0] * size[1]
    return max(1, math.ceil(math.sqrt(pixels / MAX_FRAME_PIXELS)))


def kept_steps(num_steps: int, frame: Frame) -> set[int]:
    """Numbers of the steps that a film of such frames keeps, from 1, evenly spaced."""
    count = min(MAX_FRAMES, MAX_FILM_BYTES // (2 * frame.x_t.nbytes))
    count = min(num_steps, max(MIN_FRAMES, count))
    return {round(step) for step in np.linspace(1, num_steps, count)}


def columns_of(num_images: int) -> int:
    """Columns of a grid: one row for few images, else about square."""
    return num_images if num_images <= 3 else math.ceil(math.sqrt(num_images))


def film_sheet(frames: Sequence[Frame]) -> Image.Image:
    """All frames below each other: x_t of each image in a row, followed by the estimates."""
    rows = [np.concatenate([*frame.x_t, *frame.x_0_hat], axis=1) for frame in frames]
    return Image.fromarray(np.concatenate(rows))


def sheet_of(images: Pixels) -> Image.Image:
    """Images (N, H, W, 3) uint8 in a row."""
    return Image.fromarray(np.concatenate([*images], axis=1))


def film_value(frames: Sequence[Frame], total: int, **facts: Any) -> dict[str, Any]:
    """Value of the film player.

    Args:
        frames: frames so far.
        total: number of steps of the whole film.
        **facts: further JSON values, such as captions.
    """
    num_images, height, width, _ = frames[0].x_t.shape
    return {
        "sheet": data_url(film_sheet(frames)),
        "size": [width, height],
        "num_images": num_images,
        "columns": columns_of(num_images),
        "frames": [[frame.step, frame.timestep] for frame in frames],
        "total": total,
        **facts,
    }


def film_gif(frames: Sequence[Frame]) -> bytes:
    """Animation of x_t beside the estimate of x_0, enlarged without interpolation."""
    pictures = [_side_by_side(frame) for frame in frames]
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    content = io.BytesIO()
    # One palette for all frames, from the last ones, which are the least noisy.
    palette = pictures[-1].quantize(256)
    first, *others = (p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures)
    first.save(
        content, "GIF", save_all=True, append_images=others, duration=durations, loop=0,
        optimize=False,
    )  # fmt: skip
    return content.getvalue()


def _side_by_side(frame: Frame) -> Image.Image:
    columns = columns_of(len(frame.x_t))
    grids = [image_grid(list(map(Image.fromarray, x)), columns) for x in (frame.x_t, frame.x_0_hat)]
    width, height = grids[0].size
    scale = min(1.0, MAX_GIF_PIXELS / max(width, height))
    width, height = (max(1, round(side * scale)) for side in (width, height))
    picture = Image.new("RGB", (2 * width + 8, height), "white")
    for i, grid in enumerate(grids):
        shrunk = grid.resize((width, height), Image.Resampling.NEAREST)
        picture.paste(shrunk, (i * (width + 8), 0))
    return picture


def rgb_pixels(images: Pixels) -> Pixels:
    """uint8 RGB pixels (N, H, W, 3) of images (N, H, W, C) in [0, 1]."""
    if images.shape[-1] == 3:
        return quantised(images, 8)
    return np.stack([np.asarray(to_rgb(image)) for image in images])


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()


def data_url(content: Image.Image | bytes, kind: str = "image/png") -> str:
    """A picture as URL that contains it; bytes need their `kind`."""
    data = content if isinstance(content, bytes) else png_bytes(content)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
