"""The images of a run: decoded once, known by a digest, some of them held out."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages, load_images, prepare_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.image_processor import IMAGE_MODES, image_facts, size_multiple
from ddpm_hf.training.component_checks import mode_with
from ddpm_hf.training.config import ConfigError, TrainingConfig


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
        label_column=config.class_column or (True if config.class_conditional else None),
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


def open_images(
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
        if config.class_conditional and dataset.labels is None:
            raise ConfigError(
                "class_conditional needs labels: pass label_column=True to prepare_images()"
            )
        labels = [] if dataset.labels is None else [dataset.labels]
        digest = _digest([*(dataset.window(index) for index in some), *labels])
        return dataset, dataset.facts, digest
    if config.class_conditional:
        raise ConfigError(
            "class_conditional needs the labels of a data set: pass a datasets.Dataset with a "
            "column of them, or what prepare_images(label_column=...) returns"
        )
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


class Selection(torch.utils.data.Dataset[Any]):
    """Some of the training images, under numbers of their own."""

    def __init__(self, images: TrainingImages, indices: Sequence[int]) -> None:
        self.images, self.indices, self.shape = images, indices, images.shape
        self.labels = None if images.labels is None else images.labels[list(indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch at once, for `DataLoader`."""
        return self.images.__getitems__([(epoch, self.indices[i]) for epoch, i in positions])


def hold_out(images: TrainingImages, share: float, seed: int) -> tuple[Selection, Selection]:
    """The images to train on, and a share of them, drawn by the seed, that is held out."""
    count = min(max(1, round(share * len(images))), len(images) - 1)
    training, held_out = HoldOut(count, len(images), seed).rows()
    return Selection(images, training), Selection(images, held_out)


HeldOut = Selection | TrainingImages


def validation_share(text: str | None) -> float | None:
    """The share of the training images that `validation_split` names, or None if it is a split."""
    try:
        return float(text or "")
    except ValueError:
        return None


def split_off_validation(
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
