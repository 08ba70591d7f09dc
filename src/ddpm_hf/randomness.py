"""Counter-based randomness of training: a function of position, not of history.

The images of an update, their noise and their timesteps are functions of (seed, update, row of the
batch). A resumed run therefore continues exactly, and a global batch does not depend on the number
of processes and accumulation steps.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, ClassVar

import torch
from torch import Tensor


def seed_of(*position: int | str) -> int:
    """A 63-bit seed, hashed from a position such as (seed, "noise", step, row)."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


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
            permutation = _permutation(self._num_images, self._seed, "order", epoch)
            self._permutations = before | {epoch: permutation}
        return self._permutations[epoch][place]


class ShardOrder:
    """Order of the images of a stream, which reads few shards at a time.

    The shards are shuffled in each epoch. The images of `NUM_MIXED` consecutive ones are then
    shuffled together. Images of different groups are never in each other's place.

    Args:
        seed: seed of the run.
        sizes: number of images of each shard.
    """

    NUM_MIXED: ClassVar[int] = 8

    def __init__(self, seed: int, sizes: Sequence[int]) -> None:
        self._seed, self._sizes = seed, list(sizes)
        self._starts = [0, *accumulate(sizes)]
        self._groups: dict[int, list[list[int]]] = {}
        self._ends: dict[int, list[int]] = {}
        self._rows: dict[tuple[int, int], list[int]] = {}

    def index(self, epoch: int, place: int) -> int:
        """The image at a place of an epoch, numbered through all shards."""
        groups, ends = self.groups(epoch), self._ends[epoch]
        number = bisect_right(ends, place)
        if (epoch, number) not in self._rows:
            last = dict([*self._rows.items()][-1:])  # a batch may span two groups
            self._rows = last | {(epoch, number): self._shuffled(epoch, number, groups[number])}
        start = ends[number - 1] if number else 0
        return self._rows[epoch, number][place - start]

    def groups(self, epoch: int) -> list[list[int]]:
        """The shards of an epoch, in groups that are read together."""
        if epoch not in self._groups:
            shards = _permutation(len(self._sizes), self._seed, "shards", epoch)
            groups = [shards[i : i + self.NUM_MIXED] for i in range(0, len(shards), self.NUM_MIXED)]
            ends = [*accumulate(sum(self._sizes[shard] for shard in group) for group in groups)]
            before = {e: (g, self._ends[e]) for e, g in self._groups.items() if abs(e - epoch) == 1}
            known = before | {epoch: (groups, ends)}
            self._groups = {e: g for e, (g, _) in known.items()}
            self._ends = {e: ends for e, (_, ends) in known.items()}
        return self._groups[epoch]

    def _shuffled(self, epoch: int, number: int, group: list[int]) -> list[int]:
        ranges = (range(*self._starts[shard : shard + 2]) for shard in group)
        rows = [*chain.from_iterable(ranges)]
        order = _permutation(len(rows), self._seed, "rows", epoch, number)
        return [rows[place] for place in order]


def _permutation(count: int, *position: int | str) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(*position))
    return torch.randperm(count, generator=generator).tolist()


def timestep_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Generator of the timesteps of the global batch of update `step`."""
    return torch.Generator(device).manual_seed(seed_of(seed, "timesteps", step))


def dropped_labels(seed: int, step: int, batch_size: int, share: float, device: Any) -> Tensor:
    """Class dropout: mask of the rows of update `step` without label, (batch_size,) bool."""
    generator = torch.Generator(device).manual_seed(seed_of(seed, "class dropout", step))
    return torch.rand(batch_size, generator=generator, device=device) < share


def noise_of_rows(seed: int, step: int, rows: range, like: Tensor) -> Tensor:
    """Standard normal noise for some rows of the global batch of update `step`.

    Args:
        seed: seed of the run.
        step: the update.
        rows: rows of the global batch, one per image of `like`.
        like: images with the shape and device of the float32 result, (B, C, H, W).
    """
    generator = torch.Generator(like.device)
    noise = torch.empty(like.shape, device=like.device)
    for image, row in zip(noise, rows, strict=True):
        image.normal_(generator=generator.manual_seed(seed_of(seed, "noise", step, row)))
    return noise
