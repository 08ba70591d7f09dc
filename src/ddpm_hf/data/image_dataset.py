"""Prepared images: decoded and resized once, in memory-mapped Arrow files in a cache."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_hf.data.encoded_images import EncodedImages, declared_mode, find_image_column
from ddpm_hf.data.image_reports import bad_images_error, describe_left_out
from ddpm_hf.data.labels import Labels, describe_unlabelled, known_class_names, read_labels
from ddpm_hf.data.preparation_cache import prepared_folder
from ddpm_hf.data.preprocessing import Plan
from ddpm_hf.data.sources import origin_of
from ddpm_hf.diffusion.image_format import BIT_DEPTHS, IMAGE_MODES, MAX_SIZE, ImageFacts, is_size

CROPS = ("center", "random", "none", "native")


class ImageDataset:
    """Decoded images in their own bit depth, memory-mapped; the result of `prepare_images`.

    `images[i]` is a new uint8 or uint16 tensor (C, H, W). Pickled as a folder name, without pixels.

    Attributes:
        facts: mode, size, bit depth and class names.
        skipped: one line for each skipped row, with the reason.
        left_out: number of files and rows that are not used, by kind or reason.
        sources: modes, bit depths and sizes of the image files.
        num_with_colour: number of images with colours in the file.
        num_with_alpha: number of images with pixels that are not opaque, in a mode with alpha.
        labels: class of each image, (N,), -1 for an image without label; None if not requested.
        rows: row of each image in the dataset, (N,).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        files_left_out: Mapping[str, int] | None = None,
        class_names: tuple[str, ...] | None = None,
        labels_of_rows: Labels | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._arguments = (folder, files_left_out, class_names, labels_of_rows)
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        facts = ImageFacts.from_config(summary["facts"])
        self.facts = replace(facts, class_names=class_names)
        self.skipped: list[str] = summary["skipped"]
        self.remarks: list[str] = summary["remarks"]
        self.sources: str = summary.get("sources", "")
        self.num_with_colour: int = summary["num_with_colour"]
        self.num_with_alpha: int = summary["num_with_alpha"]
        bad = {"bad images": len(self.skipped)} if self.skipped else {}
        self.left_out = dict(Counter({**(files_left_out or {}), **bad}).most_common())
        # Decoding may show that colours are grey and alphas opaque; unused planes are ignored.
        self._planes = _used_planes(summary["stored_mode"], self.facts.mode)
        self._dtype = np.dtype(np.uint16 if self.facts.bit_depth == 16 else np.uint8)
        files = sorted(self.folder.glob("images*.arrow"))
        shards = [datasets.Dataset.from_file(str(file)) for file in files]
        columns = datasets.concatenate_datasets(shards).data
        self._pixels = columns.column("pixels")
        self._heights = columns.column("height").to_numpy()
        self._widths = columns.column("width").to_numpy()
        self.rows = np.flatnonzero(self._heights)  # skipped rows have height 0
        self.labels = None if labels_of_rows is None else labels_of_rows[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.window(index).copy())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def window(self, index: int, top: float = 0.5, left: float = 0.5) -> NDArray[Any]:
        """Crop of an image with the size in `facts`: a read-only view, (C, H, W).

        Args:
            index: index of the image.
            top: vertical position in [0, 1): 0 at the upper edge, towards 1 at the lower one. Has
                an effect only on images prepared with crop="random".
            left: horizontal position in [0, 1), from the left edge.
        """
        row = self.rows[index]
        stored = np.frombuffer(self._pixels[row].as_buffer(), self._dtype)
        planes = stored.reshape(-1, self._heights[row], self._widths[row])[self._planes]
        y = int(top * (planes.shape[1] - self.facts.height + 1))
        x = int(left * (planes.shape[2] - self.facts.width + 1))
        return planes[:, y : y + self.facts.height, x : x + self.facts.width]


def _used_planes(stored_mode: str, mode: str) -> slice:
    is_grey_alpha = (stored_mode, mode) == ("RGBA", "LA")
    return slice(0, 4, 3) if is_grey_alpha else slice(len(mode))


def prepare_images(
    dataset: datasets.Dataset | datasets.DatasetDict,
    *,
    image_column: str | None = None,
    resolution: int | None = None,
    image_mode: str | None = None,
    bit_depth: int | None = None,
    crop: str = "center",
    on_bad_image: str = "error",
    label_column: str | Literal[True] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageDataset:
    """Decode, check and resize all images, or read them from the cache.

    Args:
        dataset: rows with an image column, from `load_images` or `datasets`, or a `DatasetDict`
            with one split.
        image_column: name of the column, needed if there are several.
        resolution: length of the shorter side, in [1, 8192]. By default, images of one size up to
            256 keep it; others get the median shorter side in steps of 8, at most 64.
        image_mode: "L", "LA", "RGB" or "RGBA"; by default the mode in the column's declaration
            (`datasets.Image(mode="RGB")`), else the smallest lossless mode.
        bit_depth: 8 or 16 bits per channel; by default 16 if there are 16-bit images and all images
            are grey, else 8.
        crop: "center" for the centred square; "random" for a new square in each epoch, cut by
            `TrainingImages`; "none" for the whole image, if all have one shape; "native" for images
            of one size, which they keep with all bits per channel. Images that keep their native
            size are not cropped.
        on_bad_image: "error" to raise an error that lists unusable images, "skip" to leave them out
            with a warning.
        label_column: column of the class labels, or True for the only `ClassLabel` column, such as
            the sub-folders of a folder; see `labels`. By default no labels are read, and only the
            names of a `ClassLabel` column are kept.
        cache_dir: cache of prepared images; by default next to the cache of `datasets`.
        image_root: folder from which images may be read for rows that contain only a path. Known
            for folders loaded by `load_images` or `datasets.load_dataset("imagefolder", ...)`; for
            any other dataset such rows raise an error without it.
        progress: show progress bars.

    Raises:
        DataError: if the data cannot be used.
        ValueError: if an option has an invalid value.
    """
    _check_options(resolution, image_mode, bit_depth, crop, on_bad_image)
    if isinstance(dataset, datasets.DatasetDict) and len(dataset) == 1:
        (dataset,) = dataset.values()
    column = find_image_column(dataset, image_column)
    image_mode = image_mode or declared_mode(dataset.features[column])
    origin = origin_of(dataset, column)
    encoded = EncodedImages.of(dataset, column, image_root or origin.root)
    labels, class_names = None, known_class_names(dataset)
    if label_column is not None:
        labels, class_names = read_labels(dataset, label_column, origin.label_problem)
    plan = Plan(resolution, image_mode, bit_depth, crop)
    with _progress_bars(progress):
        folder = prepared_folder(encoded, plan, on_bad_image, cache_dir)
    images = ImageDataset(folder, origin.left_out, class_names, labels)
    if images.skipped and on_bad_image == "error":
        raise bad_images_error(images.skipped, len(dataset))
    label_remarks = origin.label_remarks if label_column in (True, "label") else ()
    for remark in [*_remarks(images), *label_remarks]:
        warnings.warn(remark, stacklevel=2)
    return images


def _check_options(
    resolution: Any, image_mode: Any, bit_depth: Any, crop: Any, on_bad_image: Any
) -> None:
    if resolution is not None and not is_size(resolution):
        raise ValueError(f"`resolution` must be an int in [1, {MAX_SIZE}], got {resolution!r}")
    for name, value, choices in (
        ("image_mode", image_mode, (None, *IMAGE_MODES)),
        ("bit_depth", bit_depth, (None, *BIT_DEPTHS)),
        ("crop", crop, CROPS),
        ("on_bad_image", on_bad_image, ("error", "skip")),
    ):
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}"
            )


def _remarks(images: ImageDataset) -> list[str]:
    """Warnings about the prepared images."""
    remarks = list(images.remarks)
    if images.left_out:
        remarks.append(describe_left_out(len(images), images.left_out, images.skipped))
    unlabelled = None if images.labels is None else describe_unlabelled(images.labels)
    return [*remarks, unlabelled] if unlabelled else remarks


@contextmanager
def _progress_bars(enabled: bool) -> Iterator[None]:
    was_disabled = datasets.are_progress_bars_disabled()
    if not enabled:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
