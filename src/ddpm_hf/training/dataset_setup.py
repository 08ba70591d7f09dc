"""Images of a run: loaded, identified by a digest, and split into training and held-out images."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages, load_images, prepare_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.data.image_source import MapStyleImages, TensorSource
from ddpm_hf.data.shard_files import ShardFiles, find_shards, shards_of
from ddpm_hf.data.splits import split_named_by
from ddpm_hf.data.streaming import StreamedImages, StreamedTrainingImages, open_stream
from ddpm_hf.data.training_dataset import Selection
from ddpm_hf.diffusion.image_format import IMAGE_MODES, image_facts, size_multiple
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.options import DataOptions

TrainingData: TypeAlias = (
    datasets.Dataset
    | datasets.DatasetDict
    | datasets.IterableDataset
    | ImageDataset
    | MapStyleImages
)
"""What `train(dataset=...)` takes."""
RunImages: TypeAlias = TrainingImages | Selection
"""Training or validation images of a run."""


def build_images(
    config: DataOptions,
    dataset: datasets.Dataset | datasets.DatasetDict | None = None,
    pretrained: UNet2DModel | None = None,
) -> ImageDataset:
    """Load, decode and resize the images of the options.

    Args:
        config: the options.
        dataset: a `datasets.Dataset` instead of the dataset named in `config`.
        pretrained: network that sets size and mode of the images where the options leave them open.
    Raises:
        ConfigError, DataError: if the images cannot be used.
    """
    if dataset is None:
        if config.dataset is None:
            raise ConfigError("`dataset` is missing: name one, or pass dataset= to train()")
        dataset = load_images(
            config.dataset,
            config_name=config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
        )
    mode, resolution = _mode_and_resolution(pretrained)
    return prepare_images(
        dataset,
        image_column=config.image_column,
        label_column=_label_column(config),
        resolution=config.resolution or resolution,
        image_mode=config.image_mode or mode,
        bit_depth=config.bit_depth,
        crop=config.crop,
        on_bad_image=config.on_bad_image,
    )


def _mode_and_resolution(unet: UNet2DModel | None) -> tuple[str | None, int | None]:
    """Mode and resolution of the images that a pretrained network was trained on."""
    if unet is None:
        return None, None
    if facts := image_facts(unet):
        return facts.mode, max(facts.height, facts.width)
    size = unet.config.sample_size
    size = size if isinstance(size, int) else max(size)
    return mode_of_channels(unet.config.in_channels), size


def mode_of_channels(num_channels: int) -> str | None:
    """The image mode with this number of channels, or None."""
    return IMAGE_MODES[num_channels - 1] if num_channels <= len(IMAGE_MODES) else None


@dataclass(frozen=True)
class LoadedImages:
    """All images of a run before the split.

    Attributes:
        images: decoded images, or any sequence of tensors (C, H, W) in [-1, 1].
        facts: mode, size, bit depth and class names.
        digest: identifies the images when a run is resumed.
        revision: commit of the shards of a dataset of the Hub; None for other images.
    """

    images: ImageDataset | StreamedImages | MapStyleImages
    facts: ImageFacts
    digest: str
    revision: str | None = None


def open_images(
    config: DataOptions, dataset: TrainingData | None, pretrained: UNet2DModel | None
) -> LoadedImages:
    """Like `build_images`; `dataset` may also be any other `TrainingData`."""
    if isinstance(dataset, datasets.IterableDataset):
        config = dataclasses.replace(config, streaming=True)  # checks what a stream needs
        return _open_stream(config, shards_of(dataset))
    if config.streaming:
        return _open_stream(config, _named_shards(config, dataset))
    if dataset is None or isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)):
        dataset = build_images(config, dataset, pretrained)
    if isinstance(dataset, ImageDataset):
        return _open_prepared(dataset, config.class_conditional)
    return _open_tensors(dataset, config.class_conditional)


def _named_shards(config: DataOptions, dataset: TrainingData | None) -> ShardFiles:
    if dataset is not None or config.dataset is None:
        raise ConfigError(
            "`streaming` reads the shards that the option `dataset` names, or those of an "
            "IterableDataset; leave it out for other images passed in Python"
        )
    return find_shards(config.dataset, config.dataset_config, config.split, config.dataset_revision)


def _open_stream(config: DataOptions, files: ShardFiles) -> LoadedImages:
    images = open_stream(
        files,
        resolution=config.resolution or 0,  # `TrainingConfig` requires it
        image_mode=config.image_mode or "RGB",
        bit_depth=config.bit_depth or 8,
        image_column=config.image_column,
        label_column=_label_column(config),
        on_bad_image=config.on_bad_image,
        cache_gb=config.streaming_cache_gb,
    )
    return LoadedImages(images, images.facts, images.index.digest, files.revision)


def _label_column(config: DataOptions) -> str | Literal[True] | None:
    return config.class_column or (True if config.class_conditional else None)


def _open_prepared(images: ImageDataset, needs_labels: bool) -> LoadedImages:
    if needs_labels and images.labels is None:
        raise ConfigError(
            "`class_conditional` needs labels: pass label_column=True to prepare_images()"
        )
    # About 64 evenly spaced images: reading a large dataset completely would take too long.
    some = range(0, len(images), max(1, len(images) // 64))
    labels = [] if images.labels is None else [images.labels]
    digest = _digest([*(images.window(index) for index in some), *labels])
    return LoadedImages(images, images.facts, digest)


def _open_tensors(images: MapStyleImages, needs_labels: bool) -> LoadedImages:
    if needs_labels:
        raise ConfigError(
            "`class_conditional` needs the labels of a dataset: pass a datasets.Dataset with a "
            "label column, or the result of prepare_images(label_column=...)"
        )
    if not hasattr(images, "__getitem__") or len(images) == 0:
        raise ConfigError(
            "`dataset` must be a datasets.Dataset, the result of prepare_images(), or a map-style "
            f"dataset of at least one float tensor (C, H, W) in [-1, 1]; got "
            f"{type(images).__name__}"
        )
    first = TensorSource(images).image(0)
    channels, height, width = first.shape
    if not 1 <= channels <= len(IMAGE_MODES):
        raise ConfigError(
            f"`dataset` must hold tensors (C, H, W) with 1 to {len(IMAGE_MODES)} channels, got "
            f"{channels} channels"
        )
    facts = ImageFacts(mode=IMAGE_MODES[channels - 1], height=height, width=width)
    return LoadedImages(images, facts, _digest([first.detach().cpu().numpy()]))


def _digest(arrays: Iterable[Any]) -> str:
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()[:16]


def in_few_shards(images: RunImages, count: int) -> RunImages:
    """The first `count` images that training reads from a stream; other images unchanged."""
    if images.order is None:
        return images
    places = range(min(count, len(images)))
    return Selection(images, sorted(images.order.index(0, place) for place in places))


def hold_out(images: TrainingImages, fraction: float, seed: int) -> tuple[Selection, Selection]:
    """Training images and a random fraction that is held out, at least one image of each."""
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    training, held_out = HoldOut(count, len(images), seed).rows()
    return Selection(images, training), Selection(images, held_out)


def split_off_validation(
    config: TrainingConfig,
    images: ImageDataset | StreamedImages | MapStyleImages,
    facts: ImageFacts,
    unet: UNet2DModel,
) -> tuple[RunImages, RunImages | None]:
    """Training images and validation images, padded for the network.

    Args:
        config: the options.
        images, facts: images to train on; without class names for an unconditional model.
        unet: sets the padding.
    Raises:
        ConfigError: if `validation_split` is neither a valid fraction nor a usable split.
    """

    def padded(images: Any) -> TrainingImages:
        kind = StreamedTrainingImages if isinstance(images, StreamedImages) else TrainingImages
        return kind(
            images,
            seed=config.seed,
            random_flip=config.random_flip,
            size_multiple=size_multiple(unet),
        )

    split = str(config.validation_split)
    fraction = held_out_fraction(config.validation_split)
    if isinstance(images, StreamedImages) and fraction is not None:
        train, held_out = map(padded, images.split(fraction, config.seed))
        return train, held_out
    training = padded(images)
    if config.validation_split is None:
        return training, None
    if fraction is None and config.dataset is None:
        raise ConfigError(
            f"`validation_split` {split!r} is a split of `dataset`, which is missing; for images "
            "passed in Python use a fraction, such as 0.05"
        )
    if fraction is None:
        return training, _validation_images(config, split, facts, unet)
    if len(training) < 2:
        raise ConfigError(f"`validation_split` {split} needs at least two images, got 1")
    return hold_out(training, fraction, config.seed)


def held_out_fraction(validation_split: str | float | None) -> float | None:
    """The number in `validation_split`; None without one, and for the name of a split."""
    try:
        return None if validation_split is None else float(validation_split)
    except ValueError:
        return None


def _validation_images(
    config: TrainingConfig, split: str, facts: ImageFacts, unet: UNet2DModel
) -> TrainingImages:
    """The images of another split, which must look like those of the training split."""
    with split_named_by("validation_split"):
        images = build_images(dataclasses.replace(config, split=split), None, unet)
    names = images.facts.class_names if config.class_conditional else None
    split_facts = dataclasses.replace(images.facts, class_names=names)
    if split_facts != facts:
        raise ConfigError(
            f"`validation_split` {split!r} has other images ({split_facts}) than the training "
            f"split ({facts}); set `resolution` and `image_mode`"
        )
    return TrainingImages(images, seed=config.seed, size_multiple=size_multiple(unet))
