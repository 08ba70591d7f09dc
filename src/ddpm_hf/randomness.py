"""Counter-based randomness: a function of position, not of history.

The noise and the timesteps of an update are functions of (seed, update, row of the batch), and
`data.image_order` draws its images in the same way. A resumed run therefore continues exactly, and
a global batch does not depend on the number of processes and accumulation steps.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor


def seed_of(*position: int | str) -> int:
    """A 63-bit seed, hashed from a position such as (seed, "noise", step, row)."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


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
