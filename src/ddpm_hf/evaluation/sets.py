"""Sets of images to compare: drawn by a model, in files, in memory, and those of a data set."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_hf.data import DataError, ImageDataset, load_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.image_processor import MODE_CHANNELS, ImageFacts
from ddpm_hf.evaluation.model_images import prepared_like
from ddpm_hf.pictures import to_pil
from ddpm_hf.sampling import DrawnImages, open_drawn
from ddpm_hf.text import public_name

# What the split of images that a model was not trained on is called, as a rule.
HELD_OUT = ("test", "validation")
_MODES = {count: mode for mode, count in MODE_CHANNELS.items()}


class Part(NamedTuple):
    """Images of a split: all of them, or those of these rows once they are prepared."""

    split: str
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class DataSource:
    """A data set and how it is read.

    Attributes:
        dataset: what `load_images` takes; or rows of `datasets`, or a dictionary of them by split.
        split: of held-out images; by default "test" or "validation", where there is one.
        reference_split: of those that a model was trained on.
        config_name, revision: of a data set on the Hub.
        image_column, on_bad_image: as for `prepare_images`.
        hold_out: the images of the reference split that training held out; see
            `held_out_by_training`.
    """

    dataset: Any
    split: str | None = None
    reference_split: str = "train"
    config_name: str | None = None
    revision: str | None = None
    image_column: str | None = None
    on_bad_image: str = "error"
    hold_out: HoldOut | None = None
    # By split: a large folder takes long to list.
    _opened: dict[str, datasets.Dataset] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split.

        Raises:
            DataError: if there is none of that name.
        """
        if isinstance(self.dataset, datasets.Dataset):
            return self.dataset
        if isinstance(self.dataset, Mapping):
            if split not in self.dataset:
                raise DataError(
                    f"split {split!r} does not exist; choices: {', '.join(self.dataset)}"
                )
            return self.dataset[split]
        if split not in self._opened:
            self._opened[split] = load_images(
                self.dataset, config_name=self.config_name, split=split, revision=self.revision
            )
        return self._opened[split]

    @cached_property
    def held_out(self) -> str | None:
        """The split of held-out images; None where there is none."""
        return self._there(HELD_OUT if self.split is None else [self.split])

    def has_held_out_split(self) -> bool:
        """Whether a split of held-out images is asked for, or there."""
        return self.split is not None or not (
            isinstance(self.dataset, datasets.Dataset) or self.held_out is None
        )

    def measured(self) -> Part:
        """The images that a model explains; at worst, with a warning, those of its training."""
        if self.hold_out is not None:
            return Part(self.reference_split, self.hold_out.rows()[1])
        split = self.split or self.held_out
        if split is None:
            self.rows(self.reference_split)  # raises where there is none
            warnings.warn(
                f"there is no split {' or '.join(HELD_OUT)}: measured on"
                f" {self.reference_split!r}, and a model explains images that it was trained on"
                " better than others",
                stacklevel=2,
            )
        return Part(split or self.reference_split)

    def parts(self) -> tuple[Part, Part | None]:
        """The reference and the held-out images; there may be only one of them."""
        if self.hold_out is not None:
            trained_on, held_out = self.hold_out.rows()
            return Part(self.reference_split, trained_on), Part(self.reference_split, held_out)
        if isinstance(self.dataset, datasets.Dataset):
            return Part(self.reference_split), None
        held_out_split = self.held_out if self.held_out != self.reference_split else None
        if held_out_split is None or self._there([self.reference_split]):
            self.rows(self.reference_split)  # raises where there is none
            return Part(self.reference_split), Part(held_out_split) if held_out_split else None
        return Part(held_out_split), None

    def _there(self, splits: Iterable[str]) -> str | None:
        """The first of the splits that exists."""
        for split in splits:
            with suppress(DataError):
                self.rows(split)
                return split
        return None

    def facts(self) -> dict[str, Any]:
        """Which data set it is, as JSON values."""
        if not isinstance(self.dataset, str | os.PathLike):
            name, hub_id = "a data set in memory", {}
        else:
            name = public_name(os.fspath(self.dataset))
            is_of_hub = name == self.dataset and not os.path.exists(self.dataset)
            hub_id = {"hub_id": name} if is_of_hub else {}
        revisions = {"config_name": self.config_name, "revision": self.revision}
        if self.hold_out is not None:
            held_out = {"split": self.reference_split, "held_out": asdict(self.hold_out)}
            return {"name": name, **held_out, **revisions, **hub_id}
        split = self.split or self.held_out or self.reference_split
        return {"name": name, "split": split, **revisions, **hub_id}

    def images(
        self,
        part: Part,
        facts: ImageFacts,
        progress: bool,
        label_column: str | Literal[True] | None = None,
    ) -> DrawnImages:
        """The images of a part in the size, mode and depth of `facts`, and their classes if any
        column of these is given, or True for the one that is declared."""
        prepared = prepared_like(
            facts,
            self.rows(part.split),
            image_column=self.image_column,
            label_column=label_column,
            on_bad_image=self.on_bad_image,
            progress=progress,
        )
        return _as_set(prepared, range(len(prepared)) if part.rows is None else part.rows)


def _as_set(images: ImageDataset, indices: Sequence[int]) -> DrawnImages:
    facts = images.facts
    return DrawnImages(
        (len(indices), facts.height, facts.width, facts.num_channels),
        lambda rows: np.stack([images.window(indices[row]).transpose(1, 2, 0) for row in rows]),
        None if images.labels is None else images.labels[np.asarray(indices)],
        facts.class_names,
    )


def image_set(source: Any) -> DrawnImages:
    """Images that are there already.

    Args:
        source: what `open_drawn` reads; an array (N, H, W) or (N, H, W, C) of uint8, uint16, or of
            float in [0, 1]; a tensor (N, C, H, W) of float in [0, 1]; or a list of PIL images of
            one size and mode.
    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(source, DrawnImages):
        return source
    if isinstance(source, str | Path):
        return open_drawn(source)
    if isinstance(source, Tensor):
        source = source.detach().cpu().permute(0, 2, 3, 1).numpy()
    pixels = np.stack([np.asarray(image) for image in source])
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    is_float = pixels.dtype.kind == "f" and pixels.size and 0 <= pixels.min() <= pixels.max() <= 1
    if pixels.ndim != 4 or not (is_float or pixels.dtype in (np.uint8, np.uint16)):
        raise ValueError(
            "images must be (N, H, W, C) of uint8, uint16 or float in [0, 1], got"
            f" {pixels.dtype} of shape {pixels.shape}"
        )
    return DrawnImages(pixels.shape, lambda rows: pixels[rows.start : rows.stop : rows.step])


def facts_of_set(images: DrawnImages) -> ImageFacts:
    """Size, mode and depth of a set.

    Raises:
        ValueError: if pictures have no such number of channels.
    """
    _, height, width, channels = images.shape
    if channels not in _MODES:
        raise ValueError(f"images must have 1 to 4 channels, got {channels}")
    depth = 16 if images.read(range(1)).dtype == np.uint16 else 8
    return ImageFacts(mode=_MODES[channels], height=height, width=width, bit_depth=depth)


def picture(images: DrawnImages, row: int) -> Image.Image:
    """One image of a set, to look at."""
    (pixels,) = images.read(range(row, row + 1))
    return to_pil(pixels / np.iinfo(pixels.dtype).max)
