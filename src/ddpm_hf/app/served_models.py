"""Models of the application, and their properties that the page depends on."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from ddpm_hf.diffusion.image_format import image_facts, size_and_window
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.hub.download import fetch
from ddpm_hf.hub.load import open_pipeline
from ddpm_hf.image_batches import recorded_bit_depth
from ddpm_hf.sampling.class_labels import class_names_of, label_cycle
from ddpm_hf.sampling.sampler_choice import SamplerSetting, recommended_setting
from ddpm_hf.utils.text import public_name

# Of one request; a batch of 256x256 images then takes a few GB of memory.
MAX_IMAGES, MAX_PIXELS = 64, 2**20
USUAL_STEPS = 50


@dataclass(frozen=True)
class ServedModel:
    """A model that visitors can use.

    Attributes:
        name: unique name on the page.
        source: what `load` opens, as shown in lines of code.
        folder: the checkpoint.
        pipeline: its pipeline. Requests work on copies that share its network.
    """

    name: str
    source: str
    folder: Path
    pipeline: GaussianDDPMPipeline = field(repr=False)

    @property
    def num_train_timesteps(self) -> int:
        """Number of training timesteps T."""
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of its images in pixels."""
        _, window = size_and_window(self.pipeline.unet, image_facts(self.pipeline.unet))
        height, width = (side.stop - side.start for side in window)
        return width, height

    @property
    def bit_depth(self) -> int:
        """Bits per channel of its images."""
        return recorded_bit_depth(self.pipeline.unet)

    @property
    def max_images(self) -> int:
        """Largest number of images in a request."""
        width, height = self.size
        return max(1, min(MAX_IMAGES, MAX_PIXELS // (width * height)))

    @cached_property
    def class_labels(self) -> list[int] | None:
        """Numbers of the trained classes; None for an unconditional model."""
        return label_cycle(self.pipeline.unet, None)

    def class_name(self, number: int) -> str:
        """Name of a class, or its number without one."""
        names = class_names_of(self.pipeline.unet)
        return names[number] if names and number < len(names) else str(number)

    @cached_property
    def recommended(self) -> SamplerSetting | None:
        """The setting that `ddpm-hf calibrate --sweep` stored; None without a usable one."""
        try:
            return recommended_setting(self.pipeline)
        except ValueError:
            return None

    def working_pipeline(self, scheduler: Any) -> GaussianDDPMPipeline:
        """A pipeline with the network of the model and its own copy of a scheduler."""
        pipeline = GaussianDDPMPipeline(self.pipeline.unet, copy.deepcopy(scheduler))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load_models(
    sources: Sequence[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    use_safetensors: bool = True,
    hide_paths: bool = False,
) -> list[ServedModel]:
    """Load the models of the application onto the GPU if there is one.

    Args:
        sources: folders or names on the Hub, as for `ddpm_hf.load`.
        revision, variant, use_safetensors: as for `ddpm_hf.load`.
        hide_paths: show only the last part of local paths.
    Raises:
        ValueError, HubError: as `ddpm_hf.load`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: list[ServedModel] = []
    for source in sources:
        folder = fetch(source, revision=revision, use_safetensors=use_safetensors)
        pipeline = open_pipeline(folder, source, variant=variant, use_safetensors=use_safetensors)
        name = _unique(_short_name(source), [model.name for model in models])
        shown = public_name(source) if hide_paths else source
        models.append(ServedModel(name, shown, folder, pipeline.to(device)))
    return models


def _short_name(source: str) -> str:
    """`faces` for runs/faces/model, and the name of a repository unchanged."""
    name = public_name(source)
    parent = os.path.basename(os.path.dirname(os.path.abspath(os.path.expanduser(source))))
    return parent if name == "model" and parent else name


def _unique(name: str, others: Sequence[str]) -> str:
    names = chain([name], (f"{name} {number}" for number in count(2)))
    return next(unique for unique in names if unique not in others)
