"""Subjects of an evaluation: models and sets of images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.model_images import facts_of
from ddpm_hf.evaluation.options import BITS, METRIC_NAMES, public_name_of
from ddpm_hf.evaluation.sets import facts_of_set, image_set
from ddpm_hf.hub.load import load
from ddpm_hf.hub.options import LoadOptions
from ddpm_hf.paths import ModelPaths, model_of_run, run_of_checkpoint


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
