"""A dataset in the format of a model: size, mode, bit depth and classes."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.data import DataError, ImageDataset, TrainingImages, prepare_images
from ddpm_hf.data.decoding import read_headers
from ddpm_hf.data.encoded_images import EncodedImages, find_image_column
from ddpm_hf.data.errors import SeveralShapes
from ddpm_hf.data.sources import origin_of
from ddpm_hf.diffusion.image_format import MODE_CHANNELS, ImageFacts, image_facts, size_multiple
from ddpm_hf.randomness import seed_of
from ddpm_hf.utils.text import counted

# Facts in which images and model must agree.
_FACTS = ("mode", "height", "width", "bit_depth")
_MAX_ENLARGEMENT = 8


@dataclass(frozen=True)
class EvaluationImages:
    """Images to measure a model on, and their classes.

    Attributes:
        images: `TrainingImages` or a subset; `images[0, i]` is image i as network input, float32
            (C, H, W) in [-1, 1].
        indices: of the images to use, ascending.
        labels: class of every image of the set by the model's numbers, (N,); or None.
        facts: size, mode and bit depth before padding.
    """

    images: Any
    indices: Sequence[int]
    labels: Tensor | None
    facts: ImageFacts

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: range) -> Tensor:
        """Images at these positions of `indices`, (B, C, H, W)."""
        batch = self.images.__getitems__([(0, self.indices[row]) for row in rows])
        return torch.stack(batch if self.labels is None else [image for image, _ in batch])

    def labels_of(self, rows: range) -> Tensor | None:
        """Classes at these positions of `indices`, (B,)."""
        return None if self.labels is None else self.labels[[self.indices[row] for row in rows]]

    def digest(self) -> str:
        """Digest of the images, their order and their classes."""
        sums = hashlib.sha256(repr((list(self.indices), self.facts)).encode())
        for row in range(len(self)):
            sums.update(self.batch(range(row, row + 1)).numpy().tobytes())
        if self.labels is not None:
            sums.update(self.labels.numpy().tobytes())
        return sums.hexdigest()


def images_for(
    unet: UNet2DModel,
    dataset: Any,
    *,
    rows: Sequence[int] | None = None,
    num_images: int | None = None,
    at_most: int | None = None,
    seed: int = 0,
    label_column: str | Literal[True] = True,
    **options: Any,
) -> EvaluationImages:
    """Images of a dataset in the size, mode and bit depth of a model, padded as in training.

    Args:
        unet: network of the model.
        dataset: from `load_images` or `datasets`.
        rows: candidates, ascending; None for all images.
        num_images: number of images, chosen by the seed; None for all, or `at_most`.
        at_most: limit if `num_images` is None.
        seed: of the choice.
        label_column: column of the classes, for a class-conditional model; True for the declared
            one.
        **options: further options of `prepare_images`.
    Returns:
        the images; for a class-conditional model those with a label.
    Raises:
        DataError: if the data cannot be used, or does not fit the model.
    """
    facts = facts_of(unet)
    is_conditional = unet.config.num_class_embeds is not None
    columns = label_column if is_conditional else None
    prepared = prepared_like(facts, dataset, label_column=columns, **options)
    images = TrainingImages(prepared, size_multiple=size_multiple(unet))
    source = "the dataset has" if rows is None else "training held out"
    rows = candidates = range(len(images)) if rows is None else rows
    labels = _labels(prepared, facts.class_names) if is_conditional else None
    if labels is not None:
        rows = _labelled(candidates, labels)
    if num_images is not None and num_images > len(rows):
        which = "" if len(rows) == len(candidates) else " with a label"
        raise DataError(f"`num_images` is {num_images:,}, but {source} {len(rows):,}{which}")
    indices = [rows[i] for i in chosen_rows(len(rows), num_images or at_most, seed)]
    return EvaluationImages(images, indices, labels, facts)


def chosen_rows(num_rows: int, at_most: int | None, seed: int) -> list[int]:
    """Rows of a set that are chosen by the seed, ascending; all if `at_most` is None."""
    generator = torch.Generator().manual_seed(seed_of(seed, "evaluation images"))
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    return sorted(order[:at_most])


def prepared_like(
    facts: ImageFacts, dataset: Any, *, fits: str = "the model", **options: Any
) -> ImageDataset:
    """The images of a dataset in the size, mode and bit depth of `facts`, without padding.

    Args:
        facts: required format.
        dataset: from `load_images` or `datasets`.
        fits: owner of the format, for messages; 8-bit images are converted to 16 bits unless it is
            "the model".
        **options: further options of `prepare_images`.
    Raises:
        DataError: if the data cannot be used, or does not fit.
    """
    _check_enlargement(facts, dataset, options.get("image_column"), fits)
    is_fixed = facts.bit_depth == 8 or fits != "the model"  # bits/dim need the real bit depth
    try:
        images = prepare_images(
            dataset,
            resolution=min(facts.height, facts.width),
            image_mode=facts.mode,
            bit_depth=facts.bit_depth if is_fixed else None,
            crop="center" if facts.height == facts.width else "none",
            **options,
        )
    except SeveralShapes:
        raise DataError(
            f"the images do not fit {fits}: they have several shapes instead of"
            f" {facts.width}x{facts.height}"
        ) from None
    _check_fit(images.facts, facts, fits)
    return images


def _check_enlargement(
    facts: ImageFacts, dataset: Any, image_column: str | None, fits: str
) -> None:
    """Raise DataError for images that would be enlarged so much that they fill the disk."""
    if not isinstance(dataset, datasets.Dataset):
        return  # `prepare_images` reports it
    column = find_image_column(dataset, image_column)
    first = dataset.select(range(min(len(dataset), 64)))
    images = EncodedImages.of(first, column, origin_of(dataset, column).root)
    headers = read_headers(images.cells[column], images.root)
    largest = max(headers["height"] + headers["width"])
    side = max(facts.height, facts.width)
    if side > _MAX_ENLARGEMENT * largest > 0:
        raise DataError(
            f"the images do not fit {fits}: {facts.width}x{facts.height} would enlarge them more"
            f" than {_MAX_ENLARGEMENT} times; the largest one has {largest} pixels per side"
        )


def facts_of(unet: UNet2DModel) -> ImageFacts:
    """Format of a model's images: recorded by its training, or else inferred from its config.

    Raises:
        DataError: if the number of channels is not one of images.
    """
    if (facts := image_facts(unet)) is not None:
        return facts
    channels, size = unet.config.in_channels, unet.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    mode = next((mode for mode, number in MODE_CHANNELS.items() if number == channels), None)
    if mode is None or height is None:
        raise DataError(
            f"the model takes {channels} channels of size {size}, which is no format of images; use"
            " ddpm_hf.bits_per_dim"
        )
    return ImageFacts(mode=mode, height=height, width=width)


def _check_fit(images: ImageFacts, facts: ImageFacts, fits: str) -> None:
    owner = f"{fits}'" if fits.endswith("s") else f"{fits}'s"
    differing = [
        f"{name} is {getattr(images, name)} ({owner}: {getattr(facts, name)})"
        for name in _FACTS
        if getattr(images, name) != getattr(facts, name)
    ]
    if differing:
        raise DataError(f"the images do not fit {fits}: {', '.join(differing)}")


def _labelled(rows: Sequence[int], labels: Tensor) -> Sequence[int]:
    """The rows with a label; the others are left out with a warning."""
    kept = [row for row in rows if labels[row] >= 0]
    if not kept:
        raise DataError("no image has a label, which a class-conditional model needs")
    if missing := len(rows) - len(kept):
        text = counted(missing, "image without a label", "images without a label")
        warnings.warn(f"{text} left out: the model is class-conditional", stacklevel=3)
    return kept


def _labels(images: ImageDataset, names: Sequence[str] | None) -> Tensor:
    """Classes of the images by the model's numbers, matched by name if both have names.

    -1 for an image without a label.
    """
    labels, dataset_names = images.labels, images.facts.class_names
    if labels is None:
        raise DataError("the images have no labels, which a class-conditional model needs")
    if names is None or dataset_names is None:
        return torch.from_numpy(labels)
    present = np.unique(labels[labels >= 0])
    unknown = sorted({*(dataset_names[label] for label in present)} - {*names})
    if unknown:
        raise DataError(
            f"the model has no classes {', '.join(map(repr, unknown))}; its classes:"
            f" {', '.join(map(repr, names))}"
        )
    number_of = {name: number for number, name in enumerate(names)}
    return torch.tensor([-1 if n < 0 else number_of[dataset_names[n]] for n in labels])
