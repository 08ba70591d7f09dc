"""Batches of images, each image from its own noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import Pixels
from ddpm_hf.randomness import seed_of
from ddpm_hf.sampling.options import DrawOptions


def image_generators(device: torch.device, seed: int, indices: range) -> list[torch.Generator]:
    """A generator for each image, seeded with a hash of `seed` and its index."""
    seeds = [seed_of(seed, "sample", i) for i in indices]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def draw_batch(
    pipeline: GaussianDDPMPipeline,
    indices: range,
    *,
    seed: int,
    class_labels: Sequence[int | str] | None = None,
    **call: Any,
) -> Pixels:
    """The images with these indices, (B, H, W, C), float32 in [0, 1].

    Args:
        pipeline: pipeline that samples them, on its device.
        indices: the generator of image i is seeded with a hash of `seed` and i.
        seed: seed of the noise.
        class_labels: class numbers or names; image i gets number i modulo their count.
        **call: further arguments of the pipeline, such as `num_inference_steps` and `eta`.
    """
    generators = image_generators(pipeline.device, seed, indices)
    if class_labels is not None:
        call["class_labels"] = [class_labels[i % len(class_labels)] for i in indices]
    output: Any = pipeline(len(indices), generators, output_type="np", **call)
    images: Pixels = output.images
    return images


def pipeline_arguments(options: DrawOptions) -> Mapping[str, Any]:
    """The options that are arguments of the pipeline's call, without those that are None."""
    names = ("num_inference_steps", "timesteps", "eta", "guidance_scale", "guidance_interval",
             "guide")  # fmt: skip
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


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
    """Sample a few images in memory; `draw_to` samples many to disk.

    Args:
        pipeline: pipeline that samples them, on its device.
        num_images: number of images.
        first: index of the first image.
        batch_size: images per batch. The last batch is filled up with the images that follow, so
            that its bits do not depend on `num_images`.
        seed: the generator of image i is seeded with a hash of `seed` and i.
        class_labels: class numbers or names; image i gets number i modulo their count.
        progress: show progress bars; that of the batches only if there are several.
        **call: further arguments of the pipeline, such as `num_inference_steps` and `eta`.
    Returns:
        arrays (H, W, C), float32 in [0, 1].
    """
    batch_size = min(batch_size, num_images)
    images: list[Pixels] = []
    disable = None if progress else True  # None: only without a terminal
    pipeline.set_progress_bar_config(leave=False, desc="denoising", disable=disable)
    starts = range(first, first + num_images, batch_size)
    disable = disable if len(starts) > 1 else True
    for start in tqdm(starts, desc="batches", leave=False, disable=disable):
        indices = range(start, start + batch_size)
        batch = draw_batch(pipeline, indices, seed=seed, class_labels=class_labels, **call)
        images += list(batch)
    return images[:num_images]
