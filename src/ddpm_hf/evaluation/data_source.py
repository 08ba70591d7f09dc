"""The dataset of an evaluation: its splits, hold-out and images in the format of a model."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from diffusers import UNet2DModel

from ddpm_hf.data import DataError, ImageDataset, load_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.data.splits import split_named_by, unknown_split
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.evaluation.figures import DatasetFacts
from ddpm_hf.evaluation.model_images import EvaluationImages, images_for, prepared_like
from ddpm_hf.evaluation_options import DataOptions
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.utils.text import public_name

# Usual names of the held-out split, in order of preference.
HELD_OUT = ("test", "validation")


class ImageSubset(NamedTuple):
    """Images of a split; `rows` index the prepared images, None for all."""

    split: str
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class DataSource:
    """A dataset and how to read it.

    Attributes:
        dataset: what `load_images` accepts, a `datasets.Dataset`, or those by split.
        options: splits, columns and policy for unreadable images.
        hold_out: images of the reference split that training held out; see `recorded_hold_out`.
        trained_class_column: column that training read the classes from, if it was named.
    """

    dataset: Any
    options: DataOptions
    hold_out: HoldOut | None = None
    trained_class_column: str | None = None
    # By split: listing a large folder is slow.
    _opened: dict[str, datasets.Dataset] = field(default_factory=dict, repr=False, compare=False)

    @property
    def reference_split(self) -> str:
        """Split of the training images."""
        return self.options.reference_split

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split.

        Raises:
            DataError: if the split does not exist.
        """
        if isinstance(self.dataset, datasets.Dataset):
            return self.dataset
        if isinstance(self.dataset, Mapping):
            if split not in self.dataset:
                raise unknown_split(split, self.dataset)
            return self.dataset[split]
        if split not in self._opened:
            self._opened[split] = load_images(
                self.dataset,
                config_name=self.options.dataset_config,
                split=split,
                revision=self.options.dataset_revision,
            )
        return self._opened[split]

    def label_column(self, split: str) -> str | Literal[True]:
        """Column of the classes in a split; True for the declared one."""
        if self.options.class_column is not None:
            return self.options.class_column
        trained = self.trained_class_column
        return trained if trained and trained in self.rows(split).features else True

    @cached_property
    def held_out_split(self) -> str | None:
        """The held-out split, None if it does not exist."""
        split = self.options.split
        return self._first_existing(HELD_OUT if split is None else [split])

    def has_held_out_split(self) -> bool:
        """Whether a held-out split is requested or exists."""
        return self.options.split is not None or not (
            isinstance(self.dataset, datasets.Dataset) or self.held_out_split is None
        )

    def likelihood_subset(self) -> ImageSubset:
        """The held-out images; without any, the training images, with a warning."""
        if self.hold_out is not None:
            return ImageSubset(self.reference_split, self.hold_out.rows()[1])
        split = self.options.split or self.held_out_split
        if split is None:
            self.check_reference_split()
            warnings.warn(
                f"there is no split {' or '.join(HELD_OUT)}: measured on"
                f" {self.reference_split!r}; the likelihood of training images is higher than that"
                " of others; train with `validation_split` to hold images out",
                stacklevel=2,
            )
        return ImageSubset(split or self.reference_split)

    def likelihood_images(
        self,
        unet: UNet2DModel,
        *,
        default: int | None = None,
        may_be_fewer: bool = False,
        progress: bool = True,
    ) -> EvaluationImages:
        """The images of `likelihood_subset` in the format of a model, chosen by the seed.

        Args:
            unet: network of the model.
            default: number of images if none is requested; None for all.
            may_be_fewer: whether the dataset may have fewer images than requested.
            progress: show progress bars.
        """
        split, rows = self.likelihood_subset()
        requested = self.options.num_images
        return images_for(
            unet,
            self.rows(split),
            rows=rows,
            num_images=None if may_be_fewer else requested,
            at_most=requested or default,
            seed=self.options.seed,
            label_column=self.label_column(split),
            progress=progress,
            image_column=self.options.image_column,
            on_bad_image=self.options.on_bad_image,
        )

    def num_likelihood_images(self) -> int:
        """Number of rows of `likelihood_subset`, without its warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subset = self.likelihood_subset()
        return len(self.rows(subset.split) if subset.rows is None else subset.rows)

    def reference_and_held_out(self) -> tuple[ImageSubset, ImageSubset | None]:
        """The reference images, and the held-out ones; None if there is only one set of images."""
        if self.hold_out is not None:
            trained_on, held_out = self.hold_out.rows()
            split = self.reference_split
            return ImageSubset(split, trained_on), ImageSubset(split, held_out)
        if isinstance(self.dataset, datasets.Dataset):
            return ImageSubset(self.reference_split), None
        held_out_split = self.held_out_split
        if held_out_split == self.reference_split:
            held_out_split = None
        if held_out_split is None or self._first_existing([self.reference_split]):
            self.check_reference_split()
            others = ImageSubset(held_out_split) if held_out_split else None
            return ImageSubset(self.reference_split), others
        return ImageSubset(held_out_split), None

    def check_reference_split(self) -> None:
        """Raise DataError if the split of the training images does not exist."""
        with split_named_by("reference_split"):
            self.rows(self.reference_split)

    def _first_existing(self, splits: Iterable[str]) -> str | None:
        for split in splits:
            with suppress(DataError):
                self.rows(split)
                return split
        return None

    def facts(self) -> DatasetFacts:
        """Name and split of the dataset, for reports."""
        name, is_on_hub = "a dataset in memory", False
        if isinstance(self.dataset, str | os.PathLike):
            name = public_name(os.fspath(self.dataset))
            is_on_hub = name == self.dataset and not os.path.exists(self.dataset)
        split = self.options.split or self.held_out_split or self.reference_split
        return DatasetFacts(
            name=name,
            split=self.reference_split if self.hold_out else split,
            held_out=self.hold_out,
            config_name=self.options.dataset_config,
            revision=self.options.dataset_revision,
            hub_id=name if is_on_hub else None,
        )

    def images(
        self,
        subset: ImageSubset,
        facts: ImageFacts,
        progress: bool,
        label_column: str | Literal[True] | None = None,
    ) -> DrawnImages:
        """The images of a subset in the size, mode and bit depth of `facts`.

        Args:
            subset: of the dataset.
            facts: format of the images.
            progress: show progress bars.
            label_column: column of the classes; True for the declared one, None for no classes.
        """
        prepared = prepared_like(
            facts,
            self.rows(subset.split),
            fits="the drawn images",
            label_column=label_column,
            progress=progress,
            image_column=self.options.image_column,
            on_bad_image=self.options.on_bad_image,
        )
        return _as_set(prepared, range(len(prepared)) if subset.rows is None else subset.rows)


def _as_set(images: ImageDataset, indices: Sequence[int]) -> DrawnImages:
    facts = images.facts
    return DrawnImages(
        (len(indices), facts.height, facts.width, facts.num_channels),
        lambda rows: np.stack([images.window(indices[row]).transpose(1, 2, 0) for row in rows]),
        None if images.labels is None else images.labels[np.asarray(indices)],
        facts.class_names,
    )
