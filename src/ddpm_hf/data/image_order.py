"""Order of the images of a training run: which image is at which place of an epoch."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ddpm_hf.randomness import seed_of


@dataclass(frozen=True)
class Batches:
    """Batch sampler for `torch.utils.data.DataLoader`: micro-batches of one process.

    Yields lists of (epoch, index). The images form an endless sequence of epochs, each with its own
    permutation, and every update takes the next `batch_size` images. So no batch is smaller than
    the others, and iteration can start at any update.

    Attributes:
        batch_size: images in a global batch, a multiple of `num_processes * accumulation`.
        start, stop: range of the updates.
        accumulation: micro-batches per update.
        order: order of the images of a stream; None for a permutation of all images.
    """

    num_images: int
    seed: int
    batch_size: int
    start: int
    stop: int
    rank: int = 0
    num_processes: int = 1
    accumulation: int = 1
    order: "ShardOrder | None" = None

    def rows(self, micro_step: int) -> range:
        """Rows of the global batch in the `micro_step`-th micro-batch of this process."""
        size = self.batch_size // (self.num_processes * self.accumulation)
        first = (micro_step * self.num_processes + self.rank) * size
        return range(first, first + size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order or _FullOrder(self.seed, self.num_images)
        for step in range(self.start, self.stop):
            for micro_step in range(self.accumulation):
                positions = (step * self.batch_size + row for row in self.rows(micro_step))
                places = (divmod(position, self.num_images) for position in positions)
                yield [(epoch, order.index(epoch, place)) for epoch, place in places]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation


class _FullOrder:
    """A permutation of all images for each epoch."""

    def __init__(self, seed: int, num_images: int) -> None:
        self._seed, self._num_images = seed, num_images
        self._permutations: dict[int, list[int]] = {}

    def index(self, epoch: int, place: int) -> int:
        """The image at a place of an epoch."""
        if epoch not in self._permutations:
            before = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            order = permutation(self._num_images, self._seed, "order", epoch)
            self._permutations = before | {epoch: order}
        return self._permutations[epoch][place]


class ShardOrder:
    """Order of the images of a stream, which reads few shards at a time.

    The shards are shuffled in each epoch and pass through a window of `NUM_MIXED` shards. The rows
    of a shard are shuffled and divided into as many parts, one for each stage that the shard is in
    the window. The parts of a stage are shuffled together. The window starts and ends full: the
    first stage also takes the earlier parts of its shards, the last stage the later ones.

    Args:
        seed: seed of the run.
        sizes: number of images of each shard.
    """

    NUM_MIXED: ClassVar[int] = 16

    def __init__(self, seed: int, sizes: Sequence[int]) -> None:
        self._seed, self._sizes = seed, list(sizes)
        self._starts = [0, *accumulate(sizes)]
        self._width = min(self.NUM_MIXED, len(self._sizes))
        self._last_stage = len(self._sizes) - self._width
        self._epochs: dict[int, _ShardEpoch] = {}
        self._stage = _Stage(0, range(0), [])

    def index(self, epoch: int, place: int) -> int:
        """The image at a place of an epoch, numbered through all shards."""
        stage = self._stage
        if epoch != stage.epoch or place not in stage.places:
            stage = self._stage = self._stage_at(epoch, place)
        return stage.images[place - stage.places.start]

    def needed_shards(self, epoch: int, index: int) -> list[int]:
        """The shards in the window of an image, and as many that enter it next, in this order."""
        shard = bisect_right(self._starts, index) - 1
        position = int((self._rows(epoch, shard) == index - self._starts[shard]).nonzero())
        part = ((position + 1) * self._width - 1) // self._sizes[shard]  # see `_parts`
        stage = self._epoch(epoch).places[shard] + part - self._width + 1
        stage = min(max(stage, 0), self._last_stage)
        count = 2 * self._width
        needed = self._epoch(epoch).shards[stage : stage + count]
        if len(needed) < count:
            needed = [*needed, *self._epoch(epoch + 1).shards[: count - len(needed)]]
        return [*dict.fromkeys(needed)]

    def _epoch(self, epoch: int) -> "_ShardEpoch":
        if epoch not in self._epochs:
            shards = permutation(len(self._sizes), self._seed, "shards", epoch)
            stages = range(self._last_stage + 1)
            sizes = (sum(stop - start for _, start, stop in self._parts(shards, s)) for s in stages)
            places = {shard: place for place, shard in enumerate(shards)}
            kept = {e: known for e, known in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs = kept | {epoch: _ShardEpoch(shards, places, [0, *accumulate(sizes)])}
        return self._epochs[epoch]

    def _parts(self, shards: list[int], stage: int) -> Iterator[tuple[int, int, int]]:
        """Shard, start and stop in its shuffled rows of all that is read in a stage."""
        for entered in range(self._width):
            part = self._width - 1 - entered
            first = 0 if stage == 0 else part
            last = self._width - 1 if stage == self._last_stage else part
            shard = shards[stage + entered]
            size = self._sizes[shard]
            yield shard, size * first // self._width, size * (last + 1) // self._width

    def _stage_at(self, epoch: int, place: int) -> "_Stage":
        shards, starts = self._epoch(epoch).shards, self._epoch(epoch).starts
        stage = bisect_right(starts, place) - 1
        parts = [
            self._starts[shard] + self._rows(epoch, shard)[start:stop]
            for shard, start, stop in self._parts(shards, stage)
        ]
        images = torch.cat(parts)
        images = images[permutation(len(images), self._seed, "stage", epoch, stage)]
        return _Stage(epoch, range(*starts[stage : stage + 2]), images.tolist())

    def _rows(self, epoch: int, shard: int) -> Tensor:
        return _shuffled_rows(self._sizes[shard], self._seed, epoch, shard)


@dataclass(frozen=True)
class _ShardEpoch:
    """The shards of an epoch in their order, the place of each, and the starts of the stages."""

    shards: list[int]
    places: dict[int, int]
    starts: list[int]


@dataclass(frozen=True)
class _Stage:
    """The images at some places of an epoch."""

    epoch: int
    places: range
    images: list[int]


@lru_cache(2 * ShardOrder.NUM_MIXED)
def _shuffled_rows(count: int, seed: int, epoch: int, shard: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, "rows", epoch, shard))
    return torch.randperm(count, generator=generator)


def permutation(count: int, *position: int | str) -> list[int]:
    """A random order of 0, 1, ... `count` - 1, which depends on the position only."""
    generator = torch.Generator().manual_seed(seed_of(*position))
    return torch.randperm(count, generator=generator).tolist()
