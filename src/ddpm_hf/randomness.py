"""Randomness that depends on position and not on history.

Which images an update sees, their noise and their time steps are functions of (seed, update, row of
the batch). A resumed run therefore continues exactly, and a batch is the same batch however many
processes and accumulation steps share it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def seed_of(*position: int | str) -> int:
    """A 63-bit seed for a position such as (seed, "noise", step, row); unrelated for neighbours."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class Batches:
    """The share of one process in every batch, as lists of (epoch, index), one per micro-batch.

    The images form one endless sequence of epochs, each in an order of its own; update `s` takes
    the next `batch_size` of it, so no epoch ends in a short batch and any update can be started
    from. A batch sampler for `torch.utils.data.DataLoader`.
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
        """Rows of the batch that this process takes in its `micro_step`-th micro-batch."""
        size = self.batch_size // (self.num_processes * self.accumulation)
        first = (micro_step * self.num_processes + self.rank) * size
        return range(first, first + size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of: dict[int, list[int]] = {}
        for step in range(self.start, self.stop):
            for micro_step in range(self.accumulation):
                places = (step * self.batch_size + row for row in self.rows(micro_step))
                batch = []
                for epoch, place in (divmod(p, self.num_images) for p in places):
                    if epoch not in order_of:
                        order_of = {e: o for e, o in order_of.items() if e == epoch - 1}
                        order_of[epoch] = self._order(epoch)
                    batch.append((epoch, order_of[epoch][place]))
                yield batch

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()


def timestep_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """What the timesteps of update `step` are drawn from, those of the whole batch at once."""
    return torch.Generator(device).manual_seed(seed_of(seed, "timesteps", step))


def dropped_labels(seed: int, step: int, batch_size: int, share: float, device: Any) -> Tensor:
    """Which rows of the batch of update `step` do not show their class, (batch_size,) bool."""
    generator = torch.Generator(device).manual_seed(seed_of(seed, "class dropout", step))
    return torch.rand(batch_size, generator=generator, device=device) < share


def noise_of_rows(seed: int, step: int, rows: range, like: Tensor) -> Tensor:
    """Standard normal noise for some rows of the batch of update `step`.

    Args:
        seed: the run's seed.
        step: the update.
        rows: which rows of the whole batch `like` holds.
        like: the images, (B, C, H, W); gives shape and device.
    Returns:
        float32, shaped like `like`.
    """
    generator = torch.Generator(like.device)
    noise = torch.empty(like.shape, device=like.device)
    for image, row in zip(noise, rows, strict=True):
        image.normal_(generator=generator.manual_seed(seed_of(seed, "noise", step, row)))
    return noise
