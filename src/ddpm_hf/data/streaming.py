"""Images of a stream: datasets larger than the disk, in an order that is a function of position.

A stream reads the shards of `ddpm_hf.data.shards` through the bounded cache of
`ddpm_hf.data.shard_cache`. `ShardOrder` says which image is at which place of an epoch, so that a
resumed run and any number of processes and loader workers see the same sequence.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_conversion import Target
from ddpm_hf.data.labels import Labels
from ddpm_hf.data.shard_cache import ShardCache
from ddpm_hf.data.shards import ShardIndex, find_shards, index_shards
from ddpm_hf.data.training_dataset import TrainingImages
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.diffusion.image_processor import to_unit_range
from ddpm_hf.randomness import ShardOrder, seed_of

_NUM_FETCHERS = 2  # shards that a process fetches ahead at a time
_RETRY_S = 0.2


def open_stream(
    source: str,
    *,
    resolution: int,
    image_mode: str = "RGB",
    bit_depth: int = 8,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    image_column: str | None = None,
    on_bad_image: str = "error",
    cache_gb: float = 20.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "StreamedImages":
    """Images of shards that are fetched while they are read.

    Args:
        source: a folder or glob of .parquet or WebDataset .tar files, a URL such as
            "https://host/train-{000..123}.tar", or a dataset of the Hub that consists of them.
        resolution: height and width of the images, which are cropped to a square in the center.
        image_mode, bit_depth: format of all images; unlike prepared images, a stream cannot look at
            all of them before.
        config_name, revision: of a dataset of the Hub.
        split: split of a dataset of the Hub or of the file names in a folder.
        image_column: column of parquet files; None for the only image column.
        on_bad_image: "error", or "skip" to replace an unusable image by the next one of its shard.
        cache_gb: disk space for decoded shards and downloads, in GB (1e9 bytes).
        cache_dir: parent folder; by default in the cache of `datasets`.
    Raises:
        DataError: if the shards cannot be found or read, or the cache is too small.
    """
    index = index_shards(find_shards(source, config_name, split, revision), image_column)
    target = Target(image_mode, bit_depth, resolution, resolution)
    parent = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf_streams"))
    key = hashlib.sha256(repr((index, target, on_bad_image)).encode()).hexdigest()[:32]
    limit = int(cache_gb * 1e9)
    cache = ShardCache(parent.expanduser() / key, limit, index, target, on_bad_image)
    images = StreamedImages(cache)
    if limit < images.least_bytes:
        raise DataError(
            f"`streaming_cache_gb` must be at least {images.least_bytes / 1e9:.3g} for these "
            f"shards, got {cache_gb:g}"
        )
    return images


class StreamedImages:
    """An `ImageSource` of the images of a stream.

    Attributes:
        cache: the decoded shards.
        num_images: N.
        facts: mode, size and bit depth.
        digest: identifies the shards when a run is resumed.
    """

    labels: Labels | None = None

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.num_images: int | None = cache.index.num_images
        target = cache.target
        self.facts = ImageFacts(target.mode, target.height, target.width, target.bit_depth)
        self.digest = cache.index.digest
        self._fetchers: _Fetchers | None = None
        self._ahead: list[int] = []

    def __len__(self) -> int:
        return self.cache.index.num_images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetchers": None}

    @property
    def index(self) -> ShardIndex:
        """The shards."""
        return self.cache.index

    @property
    def least_bytes(self) -> int:
        """Smallest useful limit of the cache: two groups of shards, and what is being fetched."""
        count = range(len(self.index.shards))
        decoded = sorted((self.cache.decoded_bytes(shard) for shard in count), reverse=True)
        fetched = max(self.cache.needed_bytes(shard) for shard in count)
        return sum(decoded[: 2 * ShardOrder.NUM_MIXED]) + fetched

    def read(self, positions: Sequence[int], offsets: NDArray[np.float32]) -> Tensor:
        """Images at these positions; see `ImageSource`."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, position in enumerate(positions):
            shard, row = self.index.locate(position)
            by_shard.setdefault(shard, []).append((place, row))
        found = np.empty((len(positions), *self.cache.shape), self.cache.dtype)
        for shard, entries in by_shard.items():
            rows, output = [row for _, row in entries], [found[place] for place, _ in entries]
            self.cache.read(shard, rows, output, self._ahead)
        return to_unit_range(torch.from_numpy(found))

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, in this order, and keep them in the cache.

        An error shows when a shard is read.
        """
        self._ahead = list(shards)
        # Threads do not survive a fork.
        if self._fetchers is None or self._fetchers.pid != os.getpid():
            self._fetchers = _Fetchers(self.cache)
        self._fetchers.submit(shards)


class _Fetchers:
    """Threads of this process that fetch shards; they end with the process."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid, self._cache = os.getpid(), cache
        self._last: list[int] = []
        self._pending: deque[int] = deque()
        self._changed = threading.Condition()
        for _ in range(_NUM_FETCHERS):
            threading.Thread(target=self._work, name="fetch shards", daemon=True).start()

    def submit(self, shards: Sequence[int]) -> None:
        """Fetch these shards, instead of those that still wait to be fetched."""
        if self._last != list(shards):
            with self._changed:
                self._last, self._pending = list(shards), deque(shards)
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending)
                shard = self._pending.popleft()
                shards = self._last
            with suppress(DataError):
                if not self._cache.fetch(shard, shards, wait=False):
                    self._try_later(shard, shards)

    def _try_later(self, shard: int, shards: list[int]) -> None:
        """Queue a shard again that had no room, or that another process fetches."""
        time.sleep(_RETRY_S)
        with self._changed:
            if self._last is shards:
                self._pending.append(shard)


class StreamedTrainingImages(TrainingImages):
    """Images of a stream as the network sees them; see `TrainingImages`.

    Args:
        images: the stream.
        seed, random_flip, size_multiple: of `TrainingImages`.

    Attributes:
        order: which image is at which place of an epoch.
    """

    source: StreamedImages

    def __init__(
        self,
        images: StreamedImages,
        *,
        seed: int = 0,
        random_flip: bool = False,
        size_multiple: int = 1,
    ) -> None:
        super().__init__(images, seed=seed, random_flip=random_flip, size_multiple=size_multiple)
        self.order = ShardOrder(seed, [shard.num_rows for shard in images.index.shards])

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch, for `DataLoader`; the shards of the group after it are fetched ahead."""
        epoch, index = positions[-1]
        groups, (shard, _) = self.order.groups(epoch), self.source.index.locate(index)
        number = next(n for n, group in enumerate(groups) if shard in group)
        is_last = number + 1 == len(groups)
        following = self.order.groups(epoch + 1)[0] if is_last else groups[number + 1]
        self.source.fetch_ahead([*groups[number], *following])
        return super().__getitems__(positions)

    def _first_image(self) -> Tensor:
        """An image of the right shape, without fetching a shard."""
        facts = self.source.facts
        return torch.zeros(1, len(facts.mode), facts.height, facts.width)

    def _draws_of(self, epoch: int, index: int) -> NDArray[np.float32]:
        """Hashed for each image: an array for a whole epoch of a stream could be too large."""
        flip = seed_of(self.seed, "flip", epoch, index) / 2**63 if self.random_flip else 0.0
        return np.array([flip, 0.5, 0.5], np.float32)
