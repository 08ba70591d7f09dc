"""What a run is made of: images, network and diffusion, given, loaded or proposed, and checked."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages, load_images, prepare_images
from ddpm_hf.diffusion.files import read_json
from ddpm_hf.diffusion.images import IMAGE_MODES, image_facts, size_multiple
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.load import fetch, open_pipeline, open_unet
from ddpm_hf.losses import Loss
from ddpm_hf.training.checks import as_own_scheduler, check_runs, check_trainable, mode_with
from ddpm_hf.training.config import ConfigError, TrainingConfig
from ddpm_hf.training.held_out import HeldOut, Selection, hold_out, validation_share
from ddpm_hf.training.objective import Objective, build_objective, choose_objective
from ddpm_hf.training.processes import main_first
from ddpm_hf.training.proposals import (
    build_scheduler,
    build_unet,
    propose,
    rate_from_scratch,
    sample_size,
    unet_arguments,
    widen_for_learned_variance,
)


@dataclass(frozen=True)
class Parts:
    """What a run is made of; the configuration is complete."""

    config: TrainingConfig
    images: TrainingImages | Selection
    facts: ImageFacts
    num_skipped: int
    digest: str
    unet: UNet2DModel
    scheduler: GaussianDDPMScheduler
    objective: Objective
    held_out: HeldOut | None
    left_out: dict[str, int]
    base: dict[str, Any] | None = None  # training.json of the pretrained model
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a resumed run must share, as JSON values."""
        parts: dict[str, Any] = {"network": self.unet.config, "diffusion": self.scheduler.config}
        public = {
            part: {key: value for key, value in config.items() if key[0] != "_"}
            for part, config in parts.items()
        }
        images = {**self.facts.to_config()["image"], "number": len(self.images)}
        objective = {"name": self.objective.name}
        return {**public, "images": {**images, "digest": self.digest}, "objective": objective}


def assemble(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
    dataset: Any,
    loss: Loss | None,
) -> Parts:
    """The parts of a run: those given, the rest from the configuration.

    Raises:
        ConfigError, DataError: if one of them, or the way they fit together, cannot work.
    """
    device = accelerator.device.type
    pretrained_scheduler, base = None, None
    if config.pretrained is not None:
        if unet is not None:
            raise ConfigError("pretrained and unet= exclude each other: leave one out")
        unet, pretrained_scheduler, base = load_pretrained(config.pretrained, config.allow_pickle)
    if config.unet_config is not None:
        unet_arguments(config.unet_config)  # refused before images are prepared
    pretrained = unet if config.pretrained else None
    images, facts, digest = main_first(accelerator, lambda: _images(config, dataset, pretrained))
    shares = accelerator.num_processes * config.gradient_accumulation_steps
    scheduler = as_own_scheduler(scheduler) or build_scheduler(config, pretrained_scheduler)
    if unet is None:
        torch.manual_seed(config.seed)  # the same first weights on every process and every start
        unet = build_unet(facts, device, config.unet_config, scheduler)
    notes = _fit_to_variance(unet, scheduler, pretrained_scheduler) if config.pretrained else []
    check_trainable(unet, scheduler, facts)
    config = choose_objective(config, scheduler)
    if config.learning_rate is None:
        rate = 1e-4 if config.pretrained else rate_from_scratch(unet)
        config = dataclasses.replace(config, learning_rate=rate)
    config = propose(config, len(images), max(facts.height, facts.width), device, shares)
    # The network is convolutional: it is made for the size of these images from here on.
    unet.register_to_config(
        _ddpm_hf=facts.to_config(), sample_size=sample_size(facts, size_multiple(unet))
    )
    with accelerator.autocast():
        check_runs(unet.to(accelerator.device))
    training, held_out = _hold_out(config, images, facts, unet, dataset is None)
    return Parts(
        config,
        training,
        facts,
        len(getattr(images, "skipped", ())),
        digest,
        unet,
        scheduler,
        build_objective(config, scheduler, facts, loss),
        held_out,
        dict(getattr(images, "left_out", {})),
        base,
        tuple(notes),
    )


def _hold_out(
    config: TrainingConfig, images: Any, facts: ImageFacts, unet: UNet2DModel, has_splits: bool
) -> tuple[TrainingImages | Selection, HeldOut | None]:
    """The images to train on, as the network sees them, and those to measure, if any."""
    multiple = size_multiple(unet)
    training = TrainingImages(
        images, seed=config.seed, random_flip=config.random_flip, size_multiple=multiple
    )
    share = validation_share(config.validation_split)
    if config.validation_split is None:
        return training, None
    if share is not None:
        if not 0 < share < 1 or len(images) < 2:
            raise ConfigError(
                f"validation_split is {config.validation_split!r}: a share must be above 0 and "
                "below 1, of two images at least; or name a split"
            )
        return hold_out(training, share, config.seed)
    if not has_splits:
        raise ConfigError(
            f"validation_split {config.validation_split!r} names a split, which images passed in "
            "Python do not have; give a share such as 0.05"
        )
    measured = build_images(dataclasses.replace(config, split=config.validation_split), None, unet)
    if measured.facts != facts:
        raise ConfigError(
            f"the images of validation_split {config.validation_split!r} are {measured.facts}, "
            f"those of the training {facts}; set resolution and image_mode"
        )
    return training, TrainingImages(measured, seed=config.seed, size_multiple=multiple)


def _fit_to_variance(
    unet: UNet2DModel, scheduler: GaussianDDPMScheduler, before: GaussianDDPMScheduler | None
) -> list[str]:
    """Widen a pretrained network where its variance shall be learned from now on."""
    channels, now = unet.config.in_channels, scheduler.config.variance_type
    if now != "learned_range" or unet.config.out_channels != channels:
        return []
    fixed = before.config.variance_type if before is not None else "fixed_small"
    widen_for_learned_variance(unet, fixed)
    return [
        f"the network gets {channels} more channels, which predict its variance; they start so "
        f"that it samples as with {fixed}"
    ]


def _images(
    config: TrainingConfig, dataset: Any, pretrained: torch.nn.Module | None
) -> tuple[Any, ImageFacts, str]:
    """The images, what they are, and a digest that tells them from others.

    They are sized and coloured for the pretrained network, if any.
    """
    if dataset is None or isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)):
        dataset = build_images(config, dataset, pretrained)
    if isinstance(dataset, ImageDataset):
        # Some images, evenly spread: a large data set shall not be read for this.
        some = range(0, len(dataset), max(1, len(dataset) // 64))
        return dataset, dataset.facts, _digest(dataset.window(index) for index in some)
    if not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise ConfigError(
            "dataset must be a datasets.Dataset, what prepare_images() returns, or a map-style set "
            f"of at least one float tensor (C, H, W) in [-1, 1]; got {type(dataset).__name__}"
        )
    first = dataset[0]
    if not isinstance(first, torch.Tensor) or first.ndim != 3 or not 1 <= len(first) <= 4:
        got = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise ConfigError(
            f"dataset must hold float tensors (C, H, W) with 1 to 4 channels; the first is {got}"
        )
    channels, height, width = first.shape
    facts = ImageFacts(mode=IMAGE_MODES[channels - 1], height=height, width=width)
    return dataset, facts, _digest([first.detach().cpu().numpy()])


def _digest(images: Iterable[Any]) -> str:
    sums = hashlib.sha256()
    for image in images:
        sums.update(np.ascontiguousarray(image).tobytes())
    return sums.hexdigest()[:16]


def build_images(
    config: TrainingConfig, dataset: Any = None, pretrained: torch.nn.Module | None = None
) -> ImageDataset:
    """The images that the options name, decoded and resized once.

    Args:
        config: the options.
        dataset: a `datasets.Dataset` in place of the one that `config` names.
        pretrained: network whose size and mode are taken where the options leave them open.
    Raises:
        ConfigError, DataError: if the images cannot be used.
    """
    if dataset is None:
        if config.dataset is None:
            raise ConfigError("dataset is missing: name one, or pass dataset= to train()")
        dataset = load_images(
            config.dataset,
            config_name=config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
        )
    mode, resolution = _wanted_by(pretrained)
    return prepare_images(
        dataset,
        image_column=config.image_column,
        resolution=config.resolution or resolution,
        image_mode=config.image_mode or mode,
        bit_depth=config.bit_depth,
        crop=config.crop,
        on_bad_image=config.on_bad_image,
    )


def _wanted_by(unet: torch.nn.Module | None) -> tuple[str | None, int | None]:
    """Mode and resolution of the images that a pretrained network was made for."""
    if unet is None:
        return None, None
    if facts := image_facts(unet):
        return facts.mode, max(facts.height, facts.width)
    config: Any = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    return mode_with(config.in_channels), size


def load_pretrained(
    source: str, allow_pickle: bool = False
) -> tuple[UNet2DModel, GaussianDDPMScheduler | None, dict[str, Any]]:
    """Network with its weights, scheduler, and what is known of its training.

    A bare UNet2DModel brings no scheduler; what is known may be nothing.

    Args:
        source: Hub repository or local folder.
        allow_pickle: open the weights in pickled .bin files.
    Raises:
        ConfigError: if nothing of the kind is there.
    """
    try:
        folder = fetch(source, use_safetensors=not allow_pickle)
        if not (folder / "model_index.json").is_file():
            return open_unet(folder, source, use_safetensors=not allow_pickle), None, {}
        pipeline = open_pipeline(folder, source, use_safetensors=not allow_pickle)
        with contextlib.suppress(ValueError):
            return pipeline.unet, pipeline.scheduler, read_json(folder / "training.json")
        return pipeline.unet, pipeline.scheduler, {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"pretrained={source!r} cannot be loaded: {error}") from error
