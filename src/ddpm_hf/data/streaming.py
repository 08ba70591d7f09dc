"""Images of a stream: datasets larger than the disk, in an order that is a function of position.

A stream reads the shards of `ddpm_hf.data.shards` through the bounded cache of
`ddpm_hf.data.shard_cache`. `ShardOrder` says which image is at which place of an epoch, so that a
resumed run and any number of processes and loader workers see the same sequence.
"""

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_conversion import Target
from ddpm_hf.data.image_order import ShardOrder, permutation
from ddpm_hf.data.labels import describe_unlabelled
from ddpm_hf.data.shard_cache import ShardCache
from ddpm_hf.data.shard_files import ShardFiles
from ddpm_hf.data.shard_index import ShardIndex
from ddpm_hf.data.shards import index_shards
from ddpm_hf.data.training_dataset import TrainingImages
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.diffusion.image_processor import to_unit_range

logger = logging.getLogger(__name__)

_NUM_FETCHERS = 2  # shards that a process fetches ahead at a time


def open_stream(
    files: ShardFiles,
    *,
    resolution: int,
    image_mode: str = "RGB",
    bit_depth: int = 8,
    image_column: str | None = None,
    label_column: str | Literal[True] | None = None,
    on_bad_image: str = "error",
    cache_gb: float = 20.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "StreamedImages":
    """Images of shards that are fetched while they are read.

    Args:
        files: the shards, from `find_shards` or `shards_of`.
        resolution: height and width of the images, which are cropped to a square in the center.
        image_mode, bit_depth: format of all images, which cannot be derived from the files as in
            preparation.
        image_column, label_column: of `index_shards`.
        on_bad_image: "error", or "skip" to replace an unusable image by the next one of its shard.
        cache_gb: disk space for decoded shards and downloads, in GB (1e9 bytes).
        cache_dir: parent folder; by default in the cache of `datasets`.
    Raises:
        DataError: if the shards cannot be read, or the cache is too small.
    """
    parent = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "ddpm_hf_streams"))
    parent = parent.expanduser()
    index = index_shards(files.locations, image_column, label_column, parent / "index")
    if index.labels is not None and (line := describe_unlabelled(index.labels)):
        logger.warning("%s", line)
    target = Target(image_mode, bit_depth, resolution, resolution)
    key = hashlib.sha256(repr((index, target, on_bad_image)).encode()).hexdigest()[:32]
    limit = int(cache_gb * 1e9)
    cache = ShardCache(parent / key, limit, index, target, on_bad_image)
    images = StreamedImages(cache, range(len(index.shards)))
    if limit < images.least_bytes:
        raise DataError(
            f"`streaming_cache_gb` must be at least {images.least_bytes / 1e9:.3g} for these "
            f"shards, got {cache_gb:g}"
        )
    return images


class StreamedImages:
    """An `ImageSource` of the images of a stream.

    Args:
        cache: the decoded shards.
        numbers: numbers of the shards of the stream in the cache.

    Attributes:
        index: these shards.
        num_images: N.
        labels: class of each image, (N,), or None; a replaced image has that of its replacement.
        facts: mode, size, bit depth and class names.
    """

    def __init__(self, cache: ShardCache, numbers: Sequence[int]) -> None:
        self.cache, self.numbers = cache, list(numbers)
        self.index: ShardIndex = cache.index.select(self.numbers)
        self.num_images: int | None = self.index.num_images
        self.labels = self.index.labels
        target, names = cache.target, self.index.class_names
        self.facts = ImageFacts(target.mode, target.height, target.width, target.bit_depth, names)
        self._fetchers: _Fetchers | None = None
        self._needed: list[int] = []

    def __len__(self) -> int:
        return self.index.num_images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetchers": None}

    @property
    def least_bytes(self) -> int:
        """Smallest useful limit of the cache: the shards in the window, two more, and downloads.

        Processes and loader workers read at different places, so that some need one shard more.
        A process downloads one shard per fetcher, and one that is read now: without room for all of
        them, the one that is read would displace shards of the window.
        """
        numbers = range(len(self.cache.index.shards))
        decoded = sorted((self.cache.decoded_bytes(number) for number in numbers), reverse=True)
        fetched = max(self.cache.needed_bytes(number) for number in numbers)
        return sum(decoded[: ShardOrder.NUM_MIXED + 2]) + (_NUM_FETCHERS + 1) * fetched

    def dataset_index(self, position: int) -> int:
        """Index of an image among those of all shards of the dataset."""
        shard, row = self.index.locate(position)
        return self.cache.index.starts[self.numbers[shard]] + row

    def split(self, fraction: float, seed: int) -> tuple["StreamedImages", "StreamedImages"]:
        """Random shards for training, and others with at least a fraction of the images.

        Raises:
            DataError: if there is only one shard.
        """
        count = len(self.numbers)
        if count == 1:
            raise DataError(
                "`validation_split` holds out whole shards of a stream, which has only one; write "
                "the images to several shards, or name a split"
            )
        order, held_out = permutation(count, seed, "held-out shards"), 1
        while held_out < count - 1 and self._num_images(order[:held_out]) < fraction * len(self):
            held_out += 1
        parts = sorted(order[held_out:]), sorted(order[:held_out])
        training, validation = ([self.numbers[place] for place in part] for part in parts)
        return StreamedImages(self.cache, training), StreamedImages(self.cache, validation)

    def _num_images(self, places: Sequence[int]) -> int:
        return sum(self.index.shards[place].num_rows for place in places)

    def read(self, positions: Sequence[int], offsets: NDArray[np.float32]) -> Tensor:
        """Images at these positions; see `ImageSource`."""
        return self.read_labelled(positions)[0]

    def read_labelled(self, positions: Sequence[int]) -> tuple[Tensor, list[int] | None]:
        """Images at these positions, (B, C, H, W), and their classes if the stream has labels."""
        records = self._records(positions)
        images = to_unit_range(torch.from_numpy(records["pixels"]))
        if self.labels is None:
            return images, None
        starts = [self.index.starts[self.index.locate(position)[0]] for position in positions]
        return images, self.labels[np.array(starts) + records["row"]].tolist()

    def _records(self, positions: Sequence[int]) -> NDArray[Any]:
        """Records of the cache at these positions, (B,)."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, position in enumerate(positions):
            shard, row = self.index.locate(position)
            by_shard.setdefault(shard, []).append((place, row))
        found = np.empty(len(positions), self.cache.dtype)
        size, content = found.itemsize, found.view(np.uint8).data
        for shard, entries in by_shard.items():
            rows = [row for _, row in entries]
            output = [content[place * size : (place + 1) * size] for place, _ in entries]
            self.cache.read(self.numbers[shard], rows, output, self._needed)
        return found

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, in this order, and keep them in the cache.

        Errors are raised when the shard is read.
        """
        self._needed = [self.numbers[shard] for shard in shards]
        # Threads do not survive a fork.
        if self._fetchers is None or self._fetchers.pid != os.getpid():
            self._fetchers = _Fetchers(self.cache)
        self._fetchers.submit(self._needed)


class _Fetchers:
    """Threads of this process that fetch shards; they end with the process."""

    def __init__(self, cache: ShardCache) -> None:
        self.pid, self._cache = os.getpid(), cache
        self._needed: list[int] = []
        self._pending: deque[int] = deque()
        self._changed = threading.Condition()
        for _ in range(_NUM_FETCHERS):
            threading.Thread(target=self._work, name="fetch shards", daemon=True).start()

    def submit(self, needed: list[int]) -> None:
        """Fetch these shards next, in place of the pending ones."""
        if self._needed != needed:
            with self._changed:
                self._needed, self._pending = needed, deque(needed)
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending)
                shard, needed = self._pending.popleft(), self._needed
            with suppress(DataError):
                self._cache.fetch(shard, needed, wait=False)


class StreamedTrainingImages(TrainingImages):
    """Images of a stream as the network sees them; see `TrainingImages`.

    Args:
        images: the stream.
        seed, random_flip, size_multiple: of `TrainingImages`.
    """

    order: ShardOrder
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
        """A batch, for `DataLoader`; the shards that are needed next are fetched ahead."""
        self.source.fetch_ahead(self.order.needed_shards(*positions[0]))
        return super().__getitems__(positions)

    def dataset_index(self, index: int) -> int:
        """Index of an image among those of all shards of the dataset."""
        return self.source.dataset_index(index)

    def _first_image(self) -> Tensor:
        """An image of the right shape, without fetching a shard."""
        facts = self.source.facts
        return torch.zeros(1, len(facts.mode), facts.height, facts.width)

    def _read(
        self, indices: Sequence[int], offsets: NDArray[np.float32]
    ) -> tuple[Tensor, list[int] | None]:
        return self.source.read_labelled(indices)

    def _draws_of(self, epoch: int, index: int) -> NDArray[np.float32]:
        """Drawn for each shard: an array for a whole epoch of a stream could be too large."""
        shard, row = self.source.index.locate(index)
        count = self.source.index.shards[shard].num_rows
        return _shard_draws(count, self.seed, epoch, shard)[row]  # type: ignore[no-any-return]


@lru_cache(2 * ShardOrder.NUM_MIXED)
def _shard_draws(count: int, *position: int) -> NDArray[np.float32]:
    return np.random.default_rng(position).random((count, 3), np.float32)
