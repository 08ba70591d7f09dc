"""Bounded cache on disk of decoded shards, shared by all processes of a machine.

A shard is downloaded, decoded and resized once, and stored as one array (N, C, H, W) without a
header. The least recently used shards make room for others. Sizes are reserved before anything is
written, so that the cache never exceeds its limit. Correctness does not depend on what the cache
holds: a shard that is missing is fetched again.
"""

import json
import logging
import math
import os
import shutil
import tarfile
import time
from bisect import bisect_left
from collections.abc import Collection, Sequence
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

    def read(
        self,
        shard: int,
        rows: Sequence[int],
        output: Sequence[NDArray[Any]],
        keep: Collection[int] = (),
    ) -> None:
        """Read images of a shard; the shard is fetched if it is missing.

        Args:
            shard: its number.
            rows: rows of the images in the shard.
            output: arrays that get the images, each (C, H, W) in the type of the cache.
            keep: shards that are not removed to make room.
        Raises:
            DataError: if the shard cannot be fetched or decoded.
        """
        path, expected = self._path(shard), self.decoded_bytes(shard)
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    if size == expected:
                        os.utime(file.fileno())
                        for row, image in zip(rows, output, strict=True):
                            file.seek(row * image.nbytes)
                            file.readinto(image.data.cast("B"))
                        return
                path.unlink(missing_ok=True)  # incomplete, after a power failure
            except FileNotFoundError:
                self.fetch(shard, keep)

    def fetch(self, shard: int, keep: Collection[int] = (), wait: bool = True) -> bool:
        """Put a shard into the cache.

        Args:
            shard: its number.
            keep: shards that are not removed to make room.
            wait: whether to wait for room, or for another process that is fetching it.
        Returns:
            whether the shard is in the cache.
        Raises:
            DataError: if the shard cannot be fetched or decoded, or there is no space for it.
        """
        path = self._path(shard)
        if path.exists():
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_WAIT_S if wait else 0):
                return path.exists() or self._fetch(shard, path, keep, wait)
        except Timeout:
            if not wait:
                return False
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
        return self.index.shards[shard].num_rows * math.prod(self.shape) * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return len(self.target.mode), self.target.height, self.target.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return np.dtype(np.uint16 if self.target.bit_depth == 16 else np.uint8)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.bin"

    def _fetch(self, shard: int, path: Path, keep: Collection[int], wait: bool) -> bool:
        """Download and decode a shard; False without room. The caller holds its lock."""
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        kept = {self._path(number) for number in keep}
        if not self._reserve(part, self.needed_bytes(shard), kept, wait):
            return False
        try:
            facts = self.index.shards[shard]
            source = Path(facts.location)
            if is_url(facts.location):
                source = part / "download"
                download(facts.location, source, facts.num_bytes)
            self._decode(shard, source, part / path.name)
            sync(part / path.name)
            os.replace(part / path.name, path)
            return True
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _decode(self, shard: int, source: Path, output: Path) -> None:
        """Write the decoded images; the first pixels of an unusable image are zeros."""
        facts, row, problems = self.index.shards[shard], 0, dict[int, str]()
        location, num_rows = facts.location, facts.num_rows
        blank = bytes(math.prod(self.shape) * self.dtype.itemsize)
        try:
            with output.open("wb") as file:
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
                raise ValueError(f"it does not hold the expected {num_rows:,} images")
        except (ValueError, tarfile.TarError) as error:  # also of pyarrow
            raise DataError(f"{location} cannot be read: {error}") from error
        if problems:
            images = np.memmap(output, self.dtype, "r+", shape=(num_rows, *self.shape))
            self._replace_bad(location, images, problems)

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

    def _reserve(self, part: Path, num_bytes: int, kept: set[Path], wait: bool) -> bool:
        """Create the folder of a shard that is fetched, if there is room or can be made."""
        deadline = time.monotonic() + _SPACE_WAIT_S
        while True:
            with FileLock(self.folder / "space.lock"):
                if self._make_room(num_bytes, kept):
                    part.mkdir()
                    (part / "reserved.json").write_text(json.dumps(num_bytes))
                    return True
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder} has no room for {num_bytes / 1e9:.3g} GB within its limit of "
                    f"{self.limit / 1e9:.3g} GB; increase `streaming_cache_gb`"
                )
            time.sleep(_POLL_S)

    def _make_room(self, num_bytes: int, kept: set[Path]) -> bool:
        """Remove the least recently used shards, if that makes enough room."""
        used = {path: _last_use_and_size(path) for path in self.folder.glob("*.bin")}
        excess = num_bytes - self.limit + sum(size for _, size in used.values())
        excess += sum(self._reserved(part) for part in self.folder.glob("*.part"))
        removable = sorted(used.keys() - kept, key=lambda path: used[path])
        if excess > sum(used[path][1] for path in removable):
            return False
        for path in removable:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= used[path][1]
        return True

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


def _last_use_and_size(path: Path) -> tuple[int, int]:
    """Nanoseconds and bytes; zeros if the file is gone."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size
    return 0, 0
