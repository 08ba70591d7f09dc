"""Images decoded and resized once, in memory-mapped Arrow files that are found again."""

import hashlib
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
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from ddpm_hf.data.decoding import how_to_read
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.labels import NO_LABEL, Labels, known_class_names, read_labels
from ddpm_hf.data.preprocessing import Plan, Source, bad_images, listed, prepare_into
from ddpm_hf.data.sources import origin_of
from ddpm_hf.diffusion.atomic_files import replacing_folder
from ddpm_hf.diffusion.image_processor import BIT_DEPTHS, IMAGE_MODES, MAX_SIZE, ImageFacts, is_size
from ddpm_hf.text import counted, did_you_mean

CROPS = ("center", "random", "none")
_MAX_KINDS = _MAX_NAMED = 10
_CACHE_VERSION = 3  # what another version prepared is not read


class ImageDataset:
    """Decoded images in their own bit depth, memory-mapped; made by `prepare_images`.

    `images[i]` is a new uint8 or uint16 tensor (C, H, W). Pickled as a folder name, not as data.

    Attributes:
        facts: mode, size, bit depth and label names.
        skipped: one line for each row that was left out, with the reason.
        left_out: number of files and rows that are not among the images, by kind or reason.
        labels: the class of each image, (N,), -1 where it has none; None unless asked for.
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
        bad = {"bad images": len(self.skipped)} if self.skipped else {}
        self.left_out = dict(Counter({**(files_left_out or {}), **bad}).most_common())
        # Colours may turn out to be grey and alphas opaque: then not all stored planes are used.
        self._planes = _used_planes(summary["stored_mode"], self.facts.mode)
        self._dtype = np.dtype(np.uint16 if self.facts.bit_depth == 16 else np.uint8)
        files = sorted(self.folder.glob("images*.arrow"))
        shards = [datasets.Dataset.from_file(str(file)) for file in files]
        columns = datasets.concatenate_datasets(shards).data
        self._pixels = columns.column("pixels")
        self._heights = columns.column("height").to_numpy()
        self._widths = columns.column("width").to_numpy()
        self._rows = np.flatnonzero(self._heights)  # a row that was left out has height 0
        self.labels = None if labels_of_rows is None else labels_of_rows[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.window(index).copy())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def window(self, index: int, top: float = 0.5, left: float = 0.5) -> NDArray[Any]:
        """The part of an image that has the size in `facts`: a read-only view, (C, H, W).

        Args:
            index: of the image.
            top: where it lies, from 0 at the upper edge to 1, exclusive, at the lower one. Only
                images prepared with crop="random" leave a choice.
            left: likewise.
        """
        row = self._rows[index]
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
    """Every image decoded, checked and resized once; the second time it comes from the cache.

    Args:
        dataset: rows with an image column, from `load_images` or from `datasets`; or a
            `DatasetDict` of one split.
        image_column: needed only if there are several.
        resolution: length of the shorter side, 1..8192. None keeps images of one size up to 256
            as they are; else 64, or the median shorter side if that is less, in steps of 8.
        image_mode: "L", "LA", "RGB" or "RGBA"; None takes it from the column's own declaration
            (`datasets.Image(mode="RGB")`) or else from the images.
        bit_depth: 8 or 16 bits per channel; None gives 16 where 16-bit images are grey and so are
            all others, else 8.
        crop: "center" cuts the centred square; "random" keeps room for `TrainingImages` to cut
            one anew in each epoch; "none" keeps the whole image and needs images of one shape.
            Images that keep their native size are never cut.
        on_bad_image: "error" lists all that cannot be used, "skip" leaves them out and says so.
        label_column: column of the class labels, or True for the one that is declared to hold them
            (the sub-folders of a folder); see `labels`. None reads none: only the names in a
            declared column are known.
        cache_dir: where prepared images are kept; None: beside the cache of `datasets`.
        image_root: folder from which rows that hold only a path may be read. It is known of the
            folders of `load_images` and of `datasets.load_dataset("imagefolder", ...)`; such rows
            of any other data set are refused without it.
        progress: show progress bars.

    Raises:
        DataError: if the data cannot be used.
        ValueError: if an option is not one of its choices.
    """
    _check_options(resolution, image_mode, bit_depth, crop, on_bad_image)
    if isinstance(dataset, datasets.DatasetDict) and len(dataset) == 1:
        (dataset,) = dataset.values()
    column = find_image_column(dataset, image_column)
    image_mode = image_mode or _declared_mode(dataset.features[column])
    cells = dataset.with_format(None).select_columns([column])
    cells = cells.cast_column(column, datasets.Image(decode=False))
    origin = origin_of(dataset, column)
    root = Path(image_root).expanduser() if image_root else origin.root
    source = Source(cells, column, os.path.realpath(root) if root else None)
    labels, class_names = None, known_class_names(dataset)
    if label_column is not None:
        labels, class_names = read_labels(dataset, label_column)
    plan = Plan(resolution, image_mode, bit_depth, crop)
    with _progress_bars(progress):
        folder = _prepared_folder(source, plan, cache_dir, on_bad_image)
    images = ImageDataset(folder, origin.left_out, class_names, labels)
    _report(images, len(cells), on_bad_image)
    return images


def _check_options(
    resolution: Any, image_mode: Any, bit_depth: Any, crop: Any, on_bad_image: Any
) -> None:
    if resolution is not None and not is_size(resolution):
        raise ValueError(f"resolution must be an int in 1..{MAX_SIZE}, got {resolution!r}")
    for name, value, choices in (
        ("image_mode", image_mode, (None, *IMAGE_MODES)),
        ("bit_depth", bit_depth, (None, *BIT_DEPTHS)),
        ("crop", crop, CROPS),
        ("on_bad_image", on_bad_image, ("error", "skip")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def find_image_column(dataset: Any, wanted: str | None) -> str:
    """The column of the images: the one that is wanted, or the only one.

    Raises:
        DataError: if there is no such column, or several and none is wanted.
    """
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"the data set has several splits, take one of {', '.join(dataset)}")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise DataError("the data set has no rows")
    if dataset.format["type"] == "custom":
        raise DataError(
            "the data set has a transform, which is not applied here: resizing, flips and scaling "
            "are options; call reset_format() on it"
        )
    columns = dataset.features
    images = [name for name in columns if isinstance(columns[name], datasets.Image)]
    encoded = [name for name in columns if _may_hold_files(columns[name])]
    if wanted is not None and wanted not in [*images, *encoded]:
        hint = did_you_mean(wanted, [*images, *encoded])
        raise DataError(f"image_column {wanted!r} is no column of images{hint}; {_kinds(columns)}")
    candidates = [wanted] if wanted is not None else images or encoded
    if len(candidates) != 1:
        what = "several columns" if candidates else "no column"
        hint = "; pass image_column" if candidates else ""
        raise DataError(f"{what} of images{hint}; {_kinds(columns)}")
    return candidates[0]


def _declared_mode(feature: Any) -> str | None:
    mode = getattr(feature, "mode", None)
    return mode if mode in IMAGE_MODES else None


def _may_hold_files(feature: Any) -> bool:
    """Encoded images whose parquet file does not say that they are some."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _kinds(columns: Any) -> str:
    kinds = [f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in columns.items()]
    return f"the columns are {', '.join(kinds)}"


def _prepared_folder(
    source: Source, plan: Plan, cache_dir: str | os.PathLike[str] | None, on_bad_image: str
) -> Path:
    """The folder that holds the prepared images; made now unless it exists."""
    cache = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf")).expanduser()
    folder = cache / _key(source, plan)
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of two processes the second waits, then finds the folder
            if not folder.exists():
                with replacing_folder(folder) as temporary:
                    prepare_into(source, plan, on_bad_image, temporary)
    except OSError as error:
        raise DataError(
            f"the images cannot be prepared in {str(cache)!r}: {error}; set HF_DATASETS_CACHE to a "
            "folder that can be written"
        ) from error
    return folder


def _key(source: Source, plan: Plan) -> str:
    """Hash of all that decides what is prepared, the state of the files that rows name included."""
    rows = (source.cells._fingerprint, _files_by_path(source))
    text = repr((_CACHE_VERSION, plan, rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _files_by_path(source: Source) -> list[tuple[str, int, int]]:
    """Path, size and time of the files that rows name instead of holding their bytes.

    Raises:
        DataError: if a row names a URL, or a file that is not under the root.
    """
    files, refused = [], []
    for row, path in _paths_without_bytes(source):
        real = os.path.realpath(os.path.join(source.root or "", path))
        is_inside = source.root is not None and real.startswith(source.root + os.sep)
        if is_inside and "://" not in path:
            files.append((path, *_size_and_time(real)))
        else:
            refused.append(f"row {row} ({path!r})")
    if refused:
        known = f"not a file under {source.root!r}" if source.root else "read only under image_root"
        raise DataError(
            f"{len(refused)} of {len(source.cells)} rows hold no image but a path that is {known}, "
            f"such as {refused[0]}: embed the bytes, or name the folder with "
            "prepare_images(..., image_root=FOLDER)"
        )
    return files


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0  # decoding reports it
    return status.st_size, status.st_mtime_ns


def _paths_without_bytes(source: Source) -> Iterator[tuple[int, str]]:
    first = 0
    for table in source.cells.with_format("arrow").iter(batch_size=1000):
        for cells in table.column(source.column).chunks:
            is_missing = cells.field("bytes").is_null().to_numpy(zero_copy_only=False)
            for offset in np.flatnonzero(is_missing).tolist():
                path = cells.field("path")[offset].as_py()
                if path:
                    yield first + offset, path
            first += len(cells)


def _report(images: ImageDataset, total: int, on_bad_image: str) -> None:
    if images.skipped and on_bad_image == "error":
        raise bad_images(images.skipped, total)
    remarks = list(images.remarks)
    if images.left_out:
        remarks.append("; ".join([_use_of(images), *listed(images.skipped, _MAX_NAMED)]))
    num_unlabelled = 0 if images.labels is None else int((images.labels == NO_LABEL).sum())
    if num_unlabelled:
        remarks.append(f"{num_unlabelled:,} of {counted(len(images), 'image')} have no label")
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)


def _use_of(images: ImageDataset) -> str:
    """How many images are used and what was left out, in one line."""
    kinds = [f"{kind} {count:,}" for kind, count in images.left_out.items()]
    more = [f"and {len(kinds) - _MAX_KINDS} more kinds"] if len(kinds) > _MAX_KINDS else []
    return (
        f"{counted(len(images), 'image')} used, {sum(images.left_out.values()):,} left out "
        f"({', '.join(kinds[:_MAX_KINDS] + more)}){how_to_read(images.left_out)}"
    )


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
