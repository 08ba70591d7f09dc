"""Reader of sampled images: batch files of `draw_to`, npz, npy, image folders and parquet."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ddpm_hf.diffusion.atomic_files import check_regular, read_json
from ddpm_hf.pictures import quantised
from ddpm_hf.sampling.array_files import Array, Labels, check_pixels, read_array_file
from ddpm_hf.sampling.output_paths import record_path
from ddpm_hf.sampling.sampling_record import SamplingRecord, SamplingSettings
from ddpm_hf.utils.shared_work import unsealed

RECORD_NAME = "options.json"


@dataclass(frozen=True)
class DrawnImages:
    """Images in the order of their indices, read from disk on access.

    Attributes:
        shape: (N, H, W, C).
        stored: `stored(range(a, b))` reads images a to b - 1 with the pixel type of the file,
            (B, H, W, C): uint8, uint16, or floating point in [0, 1].
        labels: class number of each image, (N,) int64; None if unknown.
        class_names: names of the classes by number; None if unknown.
        options: recorded settings by name, such as seed, steps and weights; {} without a record.
        seconds_per_image: median over batches of the time per image in one process; None if
            unknown.
    """

    shape: tuple[int, int, int, int]
    stored: Callable[[range], Array]
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_image: float | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: range) -> Array:
        """The images with these indices, (B, H, W, C), uint8 or uint16."""
        images = self.stored(rows)
        return images if images.dtype.kind == "u" else quantised(images, 8)

    def batches(self, batch_size: int = 64, rows: range | None = None) -> Iterator[Array]:
        """Iterate over batches as `read` returns them: (B, H, W, C), the last one shorter.

        Args:
            batch_size: images per batch, B.
            rows: indices, such as `range(1000, 2000)` for one of several processes; by default all.
        """
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), batch_size):
            yield self.read(rows[start : start + batch_size])

    def select(self, indices: Sequence[int]) -> Self:
        """The images with these indices, in this order, and their labels."""

        def stored(rows: range) -> Array:
            return np.concatenate(
                [self.stored(range(i, i + 1)) for i in map(indices.__getitem__, rows)]
            )

        labels = None if self.labels is None else self.labels[np.asarray(indices)]
        return replace(self, shape=(len(indices), *self.shape[1:]), stored=stored, labels=labels)


def open_drawn(path: str | Path, on_bad_image: str = "error") -> DrawnImages:
    """Open sampled images, of this library or any other program.

    Args:
        path: a folder of `draw_to`; a `.npz` with pixels (N, H, W, C) as `arr_0` and optional
            labels as `arr_1`, the format of guided-diffusion's evaluator; a `.npy` with pixels, or
            with floating point in [0, 1]; an image folder or a parquet file, with images of one
            size in the smallest mode and bit depth that hold all of them. All splits of a folder
            are read.
        on_bad_image: "error" or "skip", for unreadable images in a folder or a parquet file.
    Raises:
        ValueError: if the path is none of these, or its images are not valid.
        OSError: if it cannot be read.
    """
    path = Path(path).expanduser()
    if (path / RECORD_NAME).is_file():
        drawn = open_batch_files(path)
        for file in batch_files(path, SamplingSettings.from_dict(drawn.options)):
            unsealed(file)
        return drawn
    if path.exists() and not path.is_dir():
        check_regular(path)
    if path.suffix.lower() not in (".npz", ".npy"):
        return _open_pictures(path, on_bad_image)
    images, labels = read_array_file(path)
    record = _record_beside(path)
    return DrawnImages(
        images.shape,
        lambda rows: np.asarray(images[rows.start : rows.stop : rows.step]),
        _labels(record) if labels is None else labels,
        record.class_names if record else None,
        record.settings.to_dict() if record else {},
    )


def _record_beside(output: Path) -> SamplingRecord | None:
    """The record of the images in `output`; None if there is no file, or one of another kind."""
    path = record_path(output)
    return SamplingRecord.read(path) if "settings" in read_json(path) else None


def batch_files(folder: Path, settings: SamplingSettings) -> list[Path]:
    """Files of a folder of `draw_to`, one per batch."""
    return [folder / f"part-{i:06d}.npy" for i in range(settings.num_batches)]


def open_batch_files(folder: Path) -> DrawnImages:
    """Open a folder of `draw_to`.

    Raises:
        ValueError: if batches are missing, or the first one is not as recorded.
    """
    record = SamplingRecord.read(folder / RECORD_NAME)
    if record is None:
        raise ValueError(f"{folder / RECORD_NAME} does not exist")
    settings = record.settings
    if num_missing := _num_missing(folder, settings):
        raise ValueError(
            f"{folder}: {num_missing:,} of {settings.num_batches:,} batches are missing; repeat the"
            " call of draw_to that was interrupted"
        )
    paths, size = batch_files(folder, settings), settings.batch_size

    def stored(rows: range) -> Array:
        if not len(rows):
            return np.empty((0, *shape[1:]), dtype)
        first, last = rows[0] // size, rows[-1] // size
        joined = np.concatenate([np.load(path, mmap_mode="r") for path in paths[first : last + 1]])
        images: Array = joined[rows.start - first * size : rows.stop - first * size : rows.step]
        return images

    batch = np.load(paths[0], mmap_mode="r")
    check_pixels(batch, str(paths[0]))
    if len(batch) != min(size, settings.num_images):
        raise ValueError(f"{paths[0]} holds {len(batch):,} images, which is not as recorded")
    shape, dtype = (settings.num_images, *batch.shape[1:]), batch.dtype
    return DrawnImages(
        shape,
        stored,
        _labels(record),
        record.class_names,
        settings.to_dict(),
        record.seconds_per_image,
    )


def _num_missing(folder: Path, settings: SamplingSettings) -> int:
    present = {path.name for path in folder.glob("part-*.npy")}
    if settings.num_batches > len(present):  # by any number, if a stranger wrote the record
        return settings.num_batches - len(present)
    return sum(path.name not in present for path in batch_files(folder, settings))


def _open_pictures(path: Path, on_bad_image: str) -> DrawnImages:
    """An image folder or a parquet file: decoded once, then read from the cache."""
    # These libraries take seconds to load, and sampling does not need them.
    from ddpm_hf.data import load_images, prepare_images
    from ddpm_hf.data.encoded_images import find_image_column
    from ddpm_hf.data.labels import declared_labels, known_class_names

    rows, record = load_images(path, split=None), _record_beside(path)
    images = prepare_images(
        rows,
        image_column=find_image_column(rows, None),
        crop="native",
        on_bad_image=on_bad_image,
        progress=False,
    )

    def stored(rows: range) -> Array:
        return np.stack([images.window(row).transpose(1, 2, 0) for row in rows])

    facts, labels, names = images.facts, declared_labels(rows), known_class_names(rows)
    if labels is None and record and record.settings.num_images == len(rows):
        labels = _labels(record)
    return DrawnImages(
        (len(images), facts.height, facts.width, facts.num_channels),
        stored,
        None if labels is None else labels[images.rows],
        names or (record.class_names if record else None),
        record.settings.to_dict() if record else {},
    )


def _labels(record: SamplingRecord | None) -> Labels | None:
    """The class number of each image: the recorded class labels, repeated in turn."""
    if record is None or not record.settings.class_labels:
        return None
    labels = np.resize(record.settings.class_labels, record.settings.num_images)
    return labels.astype(np.int64)
