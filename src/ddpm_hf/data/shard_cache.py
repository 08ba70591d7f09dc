"""Bounded cache on disk of decoded shards, shared by all processes of a machine.

A shard is downloaded, decoded and resized once, and stored as one array (N, C, H, W). The least
recently used shards make room for others. Sizes are reserved before anything is written, so that
the cache never exceeds its limit. Correctness does not depend on what the cache holds: a shard that
is missing is fetched again.
"""

import json
import logging
import os
import shutil
import tarfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ddpm_hf.data.decoding import decode_images
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_conversion import Target
from ddpm_hf.data.remote_files import download, is_url
from ddpm_hf.data.shards import ShardIndex, read_cells
from ddpm_hf.diffusion.atomic_files import sync

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SPACE_WAIT_S = 600.0
_LOCK_WAIT_S = 3600.0  # for another process that fetches the same shard; it has limits of its own
_HEADER_BYTES = 256  # of a .npy file, or more
_MAX_REPORTED = 10


@dataclass(frozen=True)
class ShardCache:
    """Decoded shards in a folder.

    Attributes:
        folder: holds only this cache, for these shards and this format.
        limit: bytes that its files may take.
        index: the shards.
        target: format of the images.
        on_bad_image: "error", or "skip" to replace an unusable image by the next one of its shard.
    """

    folder: Path
    limit: int
    index: ShardIndex
    target: Target
    on_bad_image: str

    def read(self, shard: int, rows: Sequence[int]) -> NDArray[Any]:
        """Images of a shard, (B, C, H, W), in new memory; the shard is fetched if missing.

        Raises:
            DataError: if the shard cannot be fetched or decoded.
        """
        path = self._path(shard)
        while True:
            self.fetch(shard)
            try:
                images = np.load(path, mmap_mode="r", allow_pickle=False)
                os.utime(path)
            except FileNotFoundError:  # removed in between to make room
                continue
            except ValueError:  # incomplete, after a power failure
                path.unlink(missing_ok=True)
                continue
            return np.asarray(images[list(rows)])

    def fetch(self, shard: int, wait: bool = True) -> None:
        """Put a shard into the cache.

        Args:
            shard: its number.
            wait: whether to wait for another process that is fetching it.
        Raises:
            DataError: if the shard cannot be fetched or decoded, or there is no space for it.
        """
        path = self._path(shard)
        if path.exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_WAIT_S if wait else 0):
                if not path.exists():
                    self._fetch(shard, path)
        except Timeout:
            if wait:
                raise DataError(f"{path} is locked by another process for an hour") from None
        except OSError as error:
            raise DataError(
                f"{self.index.shards[shard].location} cannot be stored in {self.folder}: {error}"
            ) from error

    def needed_bytes(self, shard: int) -> int:
        """Bytes on disk while a shard is fetched: the file, if remote, and the decoded images."""
        facts = self.index.shards[shard]
        remote = facts.num_bytes if is_url(facts.location) else 0
        return remote + self.decoded_bytes(shard)

    def decoded_bytes(self, shard: int) -> int:
        """Bytes of a decoded shard."""
        shape, dtype = self._layout(shard)
        return int(np.prod(shape)) * dtype.itemsize + _HEADER_BYTES

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npy"

    def _layout(self, shard: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        target, rows = self.target, self.index.shards[shard].num_rows
        shape = (rows, len(target.mode), target.height, target.width)
        return shape, np.dtype(np.uint16 if target.bit_depth == 16 else np.uint8)

    def _fetch(self, shard: int, path: Path) -> None:
        """Download and decode a shard; the caller holds its lock."""
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        self._reserve(part, self.needed_bytes(shard))
        try:
            facts = self.index.shards[shard]
            source = Path(facts.location)
            if is_url(facts.location):
                source = part / "download"
                download(facts.location, source, facts.num_bytes)
            self._decode(shard, source, part / path.name)
            sync(part / path.name)
            os.replace(part / path.name, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _decode(self, shard: int, source: Path, output: Path) -> None:
        """Write the decoded images; the first pixels of an unusable image are zeros."""
        (num_rows, *shape), dtype = self._layout(shard)
        location, row, problems = self.index.shards[shard].location, 0, dict[int, str]()
        blank = bytes(int(np.prod(shape)) * dtype.itemsize)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows, *shape)}
        try:
            with output.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for cells in read_cells(source, self.index.column):
                    decoded = decode_images(cells, None, self.target)
                    row += len(cells)
                    if row > num_rows:
                        break
                    for n, problem in enumerate(decoded["problem"], row - len(cells)):
                        if problem is not None:
                            problems[n] = problem
                    file.write(b"".join(pixels or blank for pixels in decoded["pixels"]))
            if row != num_rows:
                raise ValueError(f"it has not the expected {num_rows:,} images")
        except (ValueError, tarfile.TarError) as error:  # also of pyarrow
            raise DataError(f"{location} cannot be read: {error}") from error
        if problems:
            self._replace_bad(location, np.load(output, mmap_mode="r+"), problems)

    def _replace_bad(self, location: str, images: Any, problems: dict[int, str]) -> None:
        """Put the next usable image of the shard in the place of each unusable one."""
        lines = [f"row {row}: {text}" for row, text in problems.items()][:_MAX_REPORTED]
        found = f"{location}: {len(problems):,} of {len(images):,} images cannot be used"
        if self.on_bad_image == "error" or len(problems) == len(images):
            hint = "set `on_bad_image` to 'skip' to use the next image of the shard instead"
            raise DataError("\n  ".join([f"{found}; {hint}:", *lines]))
        usable = sorted({*range(len(images))} - problems.keys())
        for row in problems:
            images[row] = images[usable[bisect_left(usable, row) % len(usable)]]
        images.flush()
        logger.warning("%s and are replaced by the next one; %s", found, "; ".join(lines))

    def _reserve(self, part: Path, num_bytes: int) -> None:
        """Create the folder of a shard that is fetched, after making room for it."""
        deadline = time.monotonic() + _SPACE_WAIT_S
        while True:
            with FileLock(self.folder / "space.lock"):
                if self._make_room(num_bytes):
                    part.mkdir()
                    (part / "reserved.json").write_text(json.dumps(num_bytes))
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder} has no room for {num_bytes / 1e9:.3g} GB within its limit of "
                    f"{self.limit / 1e9:.3g} GB; increase `streaming_cache_gb`"
                )
            time.sleep(_POLL_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the least recently used shards; whether there is enough room."""
        used = {path: _size(path) for path in self.folder.glob("*.npy")}
        parts = sum(self._reserved(part) for part in self.folder.glob("*.part"))
        for path in sorted(used, key=lambda path: used[path][0]):
            if parts + sum(size for _, size in used.values()) + num_bytes <= self.limit:
                break
            path.unlink(missing_ok=True)
            del used[path]
        return parts + sum(size for _, size in used.values()) + num_bytes <= self.limit

    def _reserved(self, part: Path) -> int:
        """Bytes that another process has reserved; what a killed process left is removed."""
        try:
            with FileLock(part.with_suffix(".lock"), timeout=0):
                shutil.rmtree(part, ignore_errors=True)
                return 0
        except Timeout:
            pass
        with suppress(OSError, ValueError):
            return int(json.loads((part / "reserved.json").read_text()))
        return 0


def _size(path: Path) -> tuple[int, int]:
    """Time of the last use, and size; zeros if the file is gone."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size
    return 0, 0
