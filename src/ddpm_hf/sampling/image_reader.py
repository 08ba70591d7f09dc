"""Drawn images in files, read a batch at a time: parts, npz, npy, pictures, parquet."""

import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.image_processor import IMAGE_MODES
from ddpm_hf.pictures import quantised

OPTIONS_NAME = "options.json"
Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DrawnImages:
    """Images in the order of their indices; in memory only while they are looked at.

    Attributes:
        shape: (N, H, W, C).
        stored: `stored(range(a, b))` reads images a to b - 1 as they lie in the file,
            (B, H, W, C): uint8, uint16, or float32 in [0, 1].
        labels: the class of each image, (N,) int64, or None where that is not known.
        class_names: of the classes by their numbers, or None.
        options: how they were drawn: seed, steps, weights and the like; {} where nobody kept it.
        seconds_per_image: that a process took, the median over batches; None where not known.
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
        """The images of these indices as pixels, (B, H, W, C), uint8 or uint16."""
        images = self.stored(rows)
        return images if images.dtype.kind == "u" else quantised(images, 8)

    def batches(self, batch_size: int = 64, rows: range | None = None) -> Iterator[Array]:
        """All images, or those of `rows`, as `read` gives them: (B, H, W, C), the last one short.

        Args:
            batch_size: B.
            rows: which, such as `range(1000, 2000)` for one process of several.
        """
        rows = range(len(self)) if rows is None else rows
        for start in range(0, len(rows), batch_size):
            yield self.read(rows[start : start + batch_size])


def open_drawn(path: str | Path) -> DrawnImages:
    """Drawn images, whoever drew them.

    Args:
        path: a folder of `draw_to`; a `.npz` with pixels (N, H, W, C) as `arr_0` and perhaps labels
            as `arr_1`, as guided-diffusion's evaluator reads it; a `.npy` of pixels, or of float32
            in [0, 1]; a folder of pictures, or a parquet file of them, all of one size.
    Raises:
        ValueError: if it is none of these, or holds something else.
        OSError: if it cannot be read.
    """
    path = Path(path).expanduser()
    if (path / OPTIONS_NAME).is_file():
        return open_parts(path)
    if path.suffix == ".npz":
        images, labels = _read_npz(path)
    elif path.suffix == ".npy":
        images, labels = np.load(path, mmap_mode="r", allow_pickle=False), None
    else:
        return _open_pictures(path)
    if images.ndim != 4 or images.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(
            f"{path} must hold images (N, height, width, channels) of uint8, uint16 or float32, "
            f"got {images.dtype} of shape {images.shape}"
        )
    about = read_json(options_path(path))
    settings = about.get("settings", {})
    return DrawnImages(
        images.shape,
        lambda rows: np.asarray(images[rows.start : rows.stop : rows.step]),
        _labels(settings) if labels is None else labels,
        _names(about),
        settings,
    )


def options_path(output: Path) -> Path:
    """Where the options of the images in `output` are kept."""
    return output.with_name(f"{output.name}.json")


def part_paths(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The files of a folder of `draw_to`, one for each batch."""
    num_parts = -(-settings["num_images"] // settings["batch_size"])
    return [folder / f"part-{i:06d}.npy" for i in range(num_parts)]


def open_parts(folder: Path) -> DrawnImages:
    """The images in a folder of `draw_to`.

    Raises:
        ValueError: if some are missing.
    """
    about = read_json(folder / OPTIONS_NAME)
    settings = about["settings"]
    paths, size = part_paths(folder, settings), settings["batch_size"]
    num_missing = sum(not path.exists() for path in paths)
    if num_missing:
        raise ValueError(
            f"{folder}: {num_missing:,} of {len(paths):,} parts are not drawn yet; the call that "
            "draws them goes on when it is made again"
        )

    def stored(rows: range) -> Array:
        if not len(rows):
            return np.empty((0, *shape[1:]), dtype)
        first, last = rows[0] // size, rows[-1] // size
        joined = np.concatenate([np.load(path, mmap_mode="r") for path in paths[first : last + 1]])
        images: Array = joined[rows.start - first * size : rows.stop - first * size : rows.step]
        return images

    one = np.load(paths[0], mmap_mode="r")
    shape, dtype = (settings["num_images"], *one.shape[1:]), one.dtype
    seconds = about.get("seconds_per_image")
    return DrawnImages(shape, stored, _labels(settings), _names(about), settings, seconds)


def _open_pictures(path: Path) -> DrawnImages:
    """A folder of pictures or a parquet file of them: decoded once, then read from the cache."""
    # Libraries that drawing does not need, and that take seconds to load.
    import datasets

    from ddpm_hf.data import load_images, prepare_images
    from ddpm_hf.data.image_dataset import find_image_column
    from ddpm_hf.data.labels import known_class_names

    about = read_json(options_path(path))
    rows = load_images(path)
    column, names = find_image_column(rows, None), known_class_names(rows)
    first = rows.select([0]).cast_column(column, datasets.Image())[0][column]
    images = prepare_images(
        rows,
        image_column=column,
        resolution=min(first.size),
        image_mode=first.mode if first.mode in IMAGE_MODES else None,
        crop="none",
        label_column=True if names else None,
        progress=False,
    )

    def stored(rows: range) -> Array:
        return np.stack([images.window(row).transpose(1, 2, 0) for row in rows])

    facts, settings = images.facts, about.get("settings", {})
    shape = (len(images), facts.height, facts.width, facts.num_channels)
    labels = _labels(settings) if images.labels is None else images.labels
    return DrawnImages(shape, stored, labels, names or _names(about), settings)


def _labels(settings: Mapping[str, Any]) -> Labels | None:
    """The class of each image, given to them in turn."""
    labels = settings.get("class_labels")
    return np.resize(labels, settings["num_images"]).astype(np.int64) if labels else None


def _names(about: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = about.get("class_names")
    return tuple(names) if names else None


def _read_npz(path: Path) -> tuple[Array, Labels | None]:
    """`arr_0`, mapped where it is not compressed, and the labels in `arr_1`, if there are any."""
    with np.load(path, allow_pickle=False) as arrays:
        if "arr_0" not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise ValueError(f"{path} must hold images as arr_0, but holds {found}")
        labels = arrays["arr_1"].astype(np.int64) if "arr_1" in arrays else None
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return arrays["arr_0"], labels
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # the lengths of the name and of what follows it
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
        order: Literal["C", "F"] = "F" if is_fortran else "C"
        return np.memmap(path, dtype, "r", file.tell(), shape, order), labels
