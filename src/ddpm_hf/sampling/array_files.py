"""Images in .npz and .npy files, memory-mapped where possible."""

import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
PIXEL_TYPES = "uint8, uint16 or floating point in [0, 1]"
_CHUNK_BYTES = 2**24
_MAGIC = (np.lib.format.MAGIC_PREFIX, b"PK\x03\x04")


def read_array_file(path: Path) -> tuple[Array, Labels | None]:
    """The images (N, H, W, C), and their labels (N,) if the file has some.

    Args:
        path: a `.npy` file, or a `.npz` file with `arr_0` and optional labels `arr_1`.
    Raises:
        ValueError: if the file is damaged or of another kind, or the images or labels are invalid.
        OSError: if it cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start.startswith(_MAGIC):
        raise ValueError(f"{path} {_content(start)}")
    names: list[str] = []
    try:
        images, labels = _load(path, names)
    except MemoryError:
        raise
    except Exception as error:  # NumPy and zipfile raise all kinds of errors for damaged files
        # The messages of NumPy recommend loading the file unsafely.
        is_object = isinstance(error, ValueError) and "object" in str(error).lower()
        problem = "holds Python objects instead of pixels" if is_object else "is cut or damaged"
        if names and "arr_0" not in names:
            problem = f"must hold images as arr_0, but holds {', '.join(names)}"
        raise ValueError(f"{path} {problem}") from None
    check_pixels(images, str(path))
    return images, None if labels is None else _checked_labels(labels, len(images), path)


def check_pixels(images: Array, name: str) -> None:
    """Check the shape, type and range of images.

    Raises:
        ValueError: with `name`, and with the range of the values or the shape.
    """
    is_float = images.dtype.kind == "f"
    if images.ndim != 4 or not (is_float or images.dtype in (np.uint8, np.uint16)):
        raise ValueError(
            f"{name} must hold images (N, height, width, channels) of {PIXEL_TYPES}, got"
            f" {images.dtype} of shape {images.shape}"
        )
    if not images.size:
        raise ValueError(f"{name} must hold at least one image, got shape {images.shape}")
    if not is_float:
        return
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1:  # NaN compares false
        is_signed, is_byte = -1.01 < low < 0 and high < 1.01, low >= 0 and 1 < high <= 255
        hint = "; use (x + 1) / 2" if is_signed else "; use x / 255" if is_byte else ""
        raise ValueError(
            f"{name} must hold images of {PIXEL_TYPES}, got {images.dtype} in {low:.7g}..{high:.7g}"
            f"{hint}"
        )


def _content(start: bytes) -> str:
    """What a file is that is neither .npy nor .npz, by its first bytes."""
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not an array file; download the file again"
    return "is not a .npy or .npz file"


def _load(path: Path, names: list[str]) -> tuple[Array, Array | None]:
    """Images and labels; adds the names in a .npz file to `names`."""
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded, None
    with loaded as arrays:
        names += [*arrays] or ["nothing"]
        labels = arrays.get("arr_1")
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as content:
                while content.read(_CHUNK_BYTES):  # compares the checksum at the end
                    pass
        if member.compress_type != zipfile.ZIP_STORED:
            return arrays["arr_0"], labels
    return _memory_mapped(path, member), labels


def _memory_mapped(path: Path, member: zipfile.ZipInfo) -> Array:
    """An array that is stored in a zip file without compression."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # lengths of the name and of the extra field
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
        order: Literal["C", "F"] = "F" if is_fortran else "C"
        if dtype.hasobject:
            raise ValueError("the array holds objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, order)


def _checked_labels(labels: Array, num_images: int, path: Path) -> Labels:
    numbers = labels.astype(np.int64) if labels.dtype.kind in "biuf" else None
    if numbers is None or labels.size != num_images or not np.array_equal(numbers, labels):
        raise ValueError(
            f"{path} must hold the class numbers of its {num_images:,} images as arr_1, got"
            f" {labels.dtype} of shape {labels.shape}"
        )
    return numbers.reshape(-1)
