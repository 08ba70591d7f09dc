"""Pictures for people: drawn by a pipeline, side by side, large enough to see."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.randomness import seed_of

# A grid cell is enlarged by whole factors until its longer side has at least this many pixels.
_LEGIBLE_PIXELS = 64


def best_device() -> str:
    """The accelerator of this machine, or "cpu"."""
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    return accelerator.type if accelerator is not None else "cpu"


def draw_images(
    pipeline: GaussianDDPMPipeline,
    num_images: int,
    *,
    first: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> list[Image.Image]:
    """Draw images of which the i-th depends on (seed, i) alone, not on the batch it falls into.

    Args:
        pipeline: draws them, on its device.
        num_images: how many.
        first: i of the first of them.
        batch_size: images drawn at once.
        seed: image i comes from a generator seeded with a hash of `seed` and i.
        progress: show progress bars; that of batches only where there are several.
        **call: further arguments of the pipeline, such as `num_inference_steps` and `eta`.
    Returns:
        PIL images.
    """
    images: list[Image.Image] = []
    pipeline.set_progress_bar_config(leave=False, desc="denoising", disable=not progress)
    starts = range(first, first + num_images, batch_size)
    silent = None if progress and len(starts) > 1 else True  # None: where nobody watches
    for start in tqdm(starts, desc="batches", leave=False, disable=silent):
        places = range(start, min(start + batch_size, first + num_images))
        generators = [
            torch.Generator(pipeline.device).manual_seed(seed_of(seed, "sample", place))
            for place in places
        ]
        output: Any = pipeline(batch_size=len(places), generator=generators, **call)
        images += output.images
    return images


def save_images(images: Sequence[Image.Image], path: Path) -> Path:
    """Save one grid if `path` ends like an image file, else a folder of numbered PNG files."""
    if path.suffix.lower() in Image.registered_extensions():
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images).save(path)
        return path
    path.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(images):
        image.save(path / f"{place:05d}.png")
    return path


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of all images, row by row, small ones enlarged without smoothing.

    Args:
        images: PIL images of one size, in any mode; transparency is shown over a light grey.
        columns: images in a row, by default such that the grid is about square.
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
    factor = max(1, math.ceil(_LEGIBLE_PIXELS / max(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    gap = 2
    grid = Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (235, 235, 235)
    )
    for place, image in enumerate(images):
        cell = _opaque(image).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(cell, (place % columns * (width + gap), place // columns * (height + gap)))
    return grid


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16 bit to 8 instead of scaling.
        return image.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode in ("LA", "RGBA"):
        backdrop = Image.new("RGBA", image.size, (235, 235, 235, 255))
        return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
