"""Cache of prepared images: one folder per set of rows, files and options."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
from filelock import FileLock

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.preprocessing import Plan, Source
from ddpm_hf.diffusion.atomic_files import read_json, replacing_folder
from ddpm_hf.digests import file_digest

logger = logging.getLogger(__name__)

_CACHE_VERSION = 4
_CHECKSUMS = "checksums.json"
_MAX_HASHED_BYTES = 2**30


def cached_folder(
    source: Source,
    plan: Plan,
    cache_dir: str | os.PathLike[str] | None,
    prepare: Callable[[Path], object],
) -> Path:
    """The folder with the prepared images.

    Args:
        source: undecoded images.
        plan: requested format.
        cache_dir: parent folder; None for a folder in the cache of `datasets`.
        prepare: writes the images to a given folder if they are not in the cache.
    Raises:
        DataError: if the folder cannot be written, or a row names a file outside the root.
    """
    cache = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf")).expanduser()
    folder = cache / _key(source, plan)
    if _is_intact(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits here, then uses the folder
            if not _is_intact(folder):
                if folder.exists():
                    logger.warning("%s is damaged: the images are prepared again", folder)
                with replacing_folder(folder) as temporary:
                    prepare(temporary)
                    (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary)))
    except OSError as error:
        raise DataError(
            f"the images cannot be prepared in {str(cache)!r}: {error}; set HF_DATASETS_CACHE to a"
            " writable folder"
        ) from None
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether a folder exists and its files equal their checksums.

    Folders of older versions have no checksums.
    """
    try:
        expected = read_json(folder / _CHECKSUMS)
        return folder.exists() and expected in ({}, _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, object]:
    """Size and SHA-256 of each file; the sizes alone if SHA-256 would take seconds."""
    files = [path for path in sorted(folder.iterdir()) if path.name != _CHECKSUMS]
    sizes = {path.name: path.stat().st_size for path in files}
    is_large = sum(sizes.values()) > _MAX_HASHED_BYTES
    return dict(sizes) if is_large else {path.name: file_digest(path) for path in files}


def _key(source: Source, plan: Plan) -> str:
    """Hash of the rows, the options and the state of files that rows refer to."""
    rows = (source.cells._fingerprint, _files_by_path(source))
    text = repr((_CACHE_VERSION, plan, rows))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _files_by_path(source: Source) -> list[tuple[str, int, int]]:
    """Path, size and modification time of the files that rows name instead of holding bytes.

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
        reason = (
            f"to a file that is not under {source.root!r}"
            if source.root
            else "to a file, which is read only under `image_root`"
        )
        raise DataError(
            f"{len(refused)} of {len(source.cells)} rows contain no image but a path {reason}, such"
            f" as {refused[0]}: embed the bytes, or pass the folder as `image_root` to"
            " prepare_images()"
        )
    return files


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0  # reported when the image is decoded
    return status.st_size, status.st_mtime_ns


def _paths_without_bytes(source: Source) -> Iterator[tuple[int, str]]:
    """Row number and path of the cells that contain only a path."""
    first = 0
    for table in source.cells.with_format("arrow").iter(batch_size=1000):
        for cells in table.column(source.column).chunks:
            is_missing = cells.field("bytes").is_null().to_numpy(zero_copy_only=False)
            for offset in np.flatnonzero(is_missing).tolist():
                path = cells.field("path")[offset].as_py()
                if path:
                    yield first + offset, path
            first += len(cells)
