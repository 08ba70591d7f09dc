"""Batches of images, each image from noise of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import Pixels
from ddpm_hf.randomness import seed_of


def draw_batch(
    pipeline: GaussianDDPMPipeline,
    indices: range,
    *,
    seed: int,
    class_labels: Sequence[int | str] | None = None,
    **call: Any,
) -> Pixels:
    """The images of these indices, (B, H, W, C), float32 in [0, 1].

    Args:
        pipeline: draws them, on its device.
        indices: image i comes from a generator seeded with a hash of `seed` and i.
        seed: see `indices`.
        class_labels: numbers or names of classes, given to the images in turn: image i has that at
            i mod their number.
        **call: further arguments of the pipeline, such as `num_inference_steps` and `eta`.
    """
    seeds = [seed_of(seed, "sample", i) for i in indices]
    generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
    if class_labels is not None:
        call["class_labels"] = [class_labels[i % len(class_labels)] for i in indices]
    output: Any = pipeline(len(indices), generators, output_type="np", **call)
    images: Pixels = output.images
    return images


def draw_images(
    pipeline: GaussianDDPMPipeline,
    num_images: int,
    *,
    first: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    progress: bool = True,
    **call: Any,
) -> list[Pixels]:
    """A few images, in memory; `draw_to` draws many.

    Args:
        pipeline: draws them, on its device.
        num_images: how many.
        first: index of the first of them.
        batch_size: images drawn at once. The last batch is filled up with the images that would
            follow, so that its bits are those of a longer row.
        seed: image i comes from a generator seeded with a hash of `seed` and i.
        class_labels: numbers or names of classes, given to the images in turn by their indices.
        progress: show progress bars; that of batches only where there are several.
        **call: further arguments of the pipeline, such as `num_inference_steps` and `eta`.
    Returns:
        arrays (H, W, C), float32 in [0, 1].
    """
    batch_size = min(batch_size, num_images)
    images: list[Pixels] = []
    silent = None if progress else True  # None: where nobody watches
    pipeline.set_progress_bar_config(leave=False, desc="denoising", disable=silent)
    starts = range(first, first + num_images, batch_size)
    silent = silent if len(starts) > 1 else True
    for start in tqdm(starts, desc="batches", leave=False, disable=silent):
        indices = range(start, start + batch_size)
        batch = draw_batch(pipeline, indices, seed=seed, class_labels=class_labels, **call)
        images += list(batch)
    return images[:num_images]
