"""Counter-based randomness of training: a function of position, not of history.

The images of an update, their noise and their timesteps are functions of (seed, update, row of the
batch). A resumed run therefore continues exactly, and a global batch does not depend on the number
of processes and accumulation steps.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    """

    num_images: int
    seed: int
    batch_size: int
    start: int
    stop: int
    rank: int = 0
    num_processes: int = 1
    accumulation: int = 1

    def rows(self, micro_step: int) -> range:
        """Rows of the global batch in the `micro_step`-th micro-batch of this process."""
        size = self.batch_size // (self.num_processes * self.accumulation)
        first = (micro_step * self.num_processes + self.rank) * size
        return range(first, first + size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutations: dict[int, list[int]] = {}
        for step in range(self.start, self.stop):
            for micro_step in range(self.accumulation):
                positions = (step * self.batch_size + row for row in self.rows(micro_step))
                batch = []
                for epoch, i in (divmod(position, self.num_images) for position in positions):
                    if epoch not in permutations:
                        permutations = {e: p for e, p in permutations.items() if e == epoch - 1}
                        permutations[epoch] = self._permutation(epoch)
                    batch.append((epoch, permutations[epoch][i]))
                yield batch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()


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
