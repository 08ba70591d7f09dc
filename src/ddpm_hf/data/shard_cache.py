"""Bounded cache on disk of decoded shards, shared by all processes of a machine.

A shard is downloaded, decoded and resized once, and stored as an array of records without a header:
the pixels of an image and its row, which differs for a replaced image. Shards that are not needed
soon make room for others. Sizes are reserved before anything is written, so that the cache never
exceeds its limit. Correctness does not depend on what the cache holds: a shard that is missing is
fetched again.
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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ddpm_hf.data.decoding import decode_images
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_conversion import Target
from ddpm_hf.data.remote_files import download, is_url
from ddpm_hf.data.shard_index import ShardIndex
from ddpm_hf.data.shards import read_cells
from ddpm_hf.diffusion.atomic_files import sync

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SPACE_WAIT_S = 600.0
_LOCK_WAIT_S = 3600.0  # for another process that fetches the same shard, within its own limits
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
        output: Sequence[memoryview],
        needed: Sequence[int] = (),
    ) -> None:
        """Read images of a shard; the shard is fetched if it is missing.

        Args:
            shard: its number.
            rows: rows of the images in the shard.
            output: buffers of one record of type `dtype` each, which get the images.
            needed: see `fetch`.
        Raises:
            DataError: if the shard cannot be fetched or decoded.
        """
        name, size = self._name(shard), self.dtype.itemsize
        while True:
            try:
                file = os.open(name, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(shard, [shard, *needed])
                continue
            try:
                if os.fstat(file).st_size == self.decoded_bytes(shard):
                    os.utime(file)
                    for row, record in zip(rows, output, strict=True):
                        os.preadv(file, [record], row * size)
                    return
            finally:
                os.close(file)
            Path(name).unlink(missing_ok=True)  # incomplete, after a power failure

    def fetch(self, shard: int, needed: Sequence[int] = (), wait: bool = True) -> bool:
        """Put a shard into the cache.

        Args:
            shard: its number.
            needed: the shards that are needed next, in this order. To make room, those needed
                before `shard` are kept, and those needed after it are removed last.
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
                return path.exists() or self._fetch(shard, path, needed, wait)
        except Timeout:
            if not wait:
                return False
            raise DataError(
                f"another process has held the lock on {path} for an hour: end that process"
            ) from None
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
        return self.index.shards[shard].num_rows * self.dtype.itemsize

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Record of an image: "pixels" (C, H, W), and the "row" of the shard that they are from."""
        target = self.target
        shape = (len(target.mode), target.height, target.width)
        pixel = np.uint16 if target.bit_depth == 16 else np.uint8
        return np.dtype([("pixels", pixel, shape), ("row", "<i8")])

    def _name(self, shard: int) -> str:
        return f"{self.folder}/{shard:06d}.bin"  # composing a Path takes longer than reading

    def _path(self, shard: int) -> Path:
        return Path(self._name(shard))

    def _fetch(self, shard: int, path: Path, needed: Sequence[int], wait: bool) -> bool:
        """Download and decode a shard; False without room. The caller holds its lock."""
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        if not self._reserve(part, shard, needed, wait):
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
        """Write the records of a shard; the first pixels of an unusable image are zeros."""
        facts, row, problems = self.index.shards[shard], 0, dict[int, str]()
        location, num_rows = facts.location, facts.num_rows
        blank = bytes(self.dtype["pixels"].itemsize)
        try:
            with output.open("wb") as file:
                for cells in read_cells(source, self.index.column):
                    decoded = decode_images(cells, None, self.target)
                    for pixels, problem in zip(decoded["pixels"], decoded["problem"], strict=True):
                        if problem is not None:
                            problems[row] = problem
                        file.write((pixels or blank) + row.to_bytes(8, "little"))
                        row += 1
                    if row > num_rows:
                        break
            if row != num_rows:
                raise ValueError(f"it does not hold the expected {num_rows:,} images")
        except (ValueError, tarfile.TarError) as error:  # also of pyarrow
            raise DataError(f"{location} cannot be read: {error}") from error
        if problems:
            self._replace_bad(location, np.memmap(output, self.dtype, "r+"), problems)

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

    def _reserve(self, part: Path, shard: int, needed: Sequence[int], wait: bool) -> bool:
        """Create the folder of a shard that is fetched, if there is room or can be made."""
        num_bytes, deadline = self.needed_bytes(shard), time.monotonic() + _SPACE_WAIT_S
        while True:
            with FileLock(self.folder / "space.lock"):
                if self._make_room(num_bytes, shard, needed):
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

    def _make_room(self, num_bytes: int, shard: int, needed: Sequence[int]) -> bool:
        """Remove shards, if that makes enough room; see `fetch` for their order."""
        used = {path: _last_use_and_size(path) for path in self.folder.glob("*.bin")}
        excess = num_bytes - self.limit + sum(size for _, size in used.values())
        excess += sum(self._reserved(part) for part in self.folder.glob("*.part"))
        place = dict.fromkeys(used, len(needed)) | {
            self._path(number): place for place, number in enumerate(needed)
        }
        own_place = needed.index(shard) if shard in needed else -1
        removable = [path for path in used if place[path] > own_place]
        removable.sort(key=lambda path: (-place[path], used[path]))  # the least recently used first
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
