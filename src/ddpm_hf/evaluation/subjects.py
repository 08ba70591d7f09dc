"""Subjects of an evaluation: models, and sets of images in files and in memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_hf.diffusion.image_format import MODE_CHANNELS, ImageFacts
from ddpm_hf.evaluation.model_images import facts_of
from ddpm_hf.evaluation_options import BITS, METRIC_NAMES, public_name_of
from ddpm_hf.hub.load import load
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.paths import ModelPaths, model_of_run, run_of_checkpoint
from ddpm_hf.sampling import DrawnImages, open_drawn
from ddpm_hf.sampling.array_files import check_pixels
from ddpm_hf.utils.digests import weights_digest

_MODES = {count: mode for mode, count in MODE_CHANNELS.items()}


@dataclass(frozen=True)
class Subject:
    """A model or a set of images.

    Attributes:
        source: a pipeline on the device of this rank, or images.
        name: shown in reports.
        weights: digest of a model's weights; None for images.
    """

    source: Any
    name: str
    weights: str | None = None

    @property
    def is_model(self) -> bool:
        """Whether this is a model."""
        return self.weights is not None

    @property
    def image_facts(self) -> ImageFacts:
        """Size, mode and bit depth of its images."""
        return facts_of(self.source.unet) if self.is_model else facts_of_set(self.source)


def is_model(source: Any) -> bool:
    """Whether this is a pipeline, the folder of one or of a run, or not a local path."""
    if not isinstance(source, str | os.PathLike):
        return hasattr(source, "unet")
    path = model_of_run(Path(source).expanduser())
    has_weights = ModelPaths(path).index.is_file() or run_of_checkpoint(path) is not None
    return has_weights or not path.exists()


def default_metrics(sources: Sequence[Any], has_scheduler: bool) -> tuple[str, ...]:
    """Bits/dim for models with their own schedulers, else the metrics that compare images."""
    if not has_scheduler and all(map(is_model, sources)):
        return (BITS,)
    return tuple(name for name in METRIC_NAMES if name != BITS)


def load_subject(
    source: Any, options: LoadOptions, device: Any, on_bad_image: str = "error"
) -> Subject:
    """A model on the device, or a set of images.

    Raises:
        ValueError, OSError: if it does not exist or cannot be loaded.
    """
    if not is_model(source):
        return Subject(image_set(source, on_bad_image), public_name_of(source))
    is_loaded = hasattr(source, "unet")
    pipeline = source if is_loaded else load(os.fspath(source), **options.keywords(LoadOptions))
    pipeline = pipeline.to(device)
    return Subject(pipeline, public_name_of(source), weights_digest(pipeline.unet))


def image_set(source: Any, on_bad_image: str = "error") -> DrawnImages:
    """A set of existing images.

    Args:
        source: what `open_drawn` reads; an array (N, H, W) or (N, H, W, C) of uint8, uint16, or
            float in [0, 1]; a float tensor (N, C, H, W) in [0, 1]; or PIL images of one size and
            mode.
        on_bad_image: see `open_drawn`.
    Raises:
        ValueError: for anything else.
    """
    if isinstance(source, DrawnImages):
        return source
    if isinstance(source, str | os.PathLike):
        return open_drawn(os.fspath(source), on_bad_image)
    if isinstance(source, Tensor):
        if source.ndim != 4:
            raise ValueError(f"images must be (N, C, H, W), got shape {tuple(source.shape)}")
        source = source.detach().cpu().permute(0, 2, 3, 1).numpy()
    if not isinstance(source, np.ndarray):
        source = list(source)
        _check_alike(source)
        source = np.stack([np.asarray(image) for image in source])
    pixels: np.ndarray = source
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    check_pixels(pixels, "the set")
    return DrawnImages(pixels.shape, lambda rows: pixels[rows.start : rows.stop : rows.step])


def _check_alike(images: Sequence[Any]) -> None:
    """Check that images have one shape, and PIL images one mode whose values are pixels."""
    if not images:
        raise ValueError("the set must hold at least one image, got none")
    kinds = [_kind(image) for image in images]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"images must be alike, but image 0 is {kinds[0]} and image {i} is {kind}"
            )
    mode = getattr(images[0], "mode", None)
    if isinstance(images[0], Image.Image) and mode not in (*MODE_CHANNELS, "I;16"):
        raise ValueError(
            f"images must have mode {', '.join(MODE_CHANNELS)} or I;16, got {mode}; use"
            ' image.convert("RGB")'
        )


def _kind(image: Any) -> str:
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.width}x{image.height}"
    array = np.asarray(image)
    return f"{array.dtype} of shape {array.shape}"


def facts_of_set(images: DrawnImages) -> ImageFacts:
    """Size, mode and bit depth of a set.

    Raises:
        ValueError: for more than 4 channels.
    """
    _, height, width, channels = images.shape
    if channels not in _MODES:
        raise ValueError(
            f"images must be (N, height, width, channels) with 1 to 4 channels, got {images.shape}"
        )
    depth = 16 if images.read(range(1)).dtype == np.uint16 else 8
    return ImageFacts(mode=_MODES[channels], height=height, width=width, bit_depth=depth)
