"""Held-out images of a training run, determined by two counts and the seed of the run."""

import hashlib
from dataclasses import dataclass

import torch

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset
from ddpm_hf.randomness import seed_of


@dataclass(frozen=True)
class HoldOut:
    """Random subset of a dataset, determined by the seed of a run.

    Attributes:
        num_held_out: number of held-out images, at least 1.
        num_images: number of images in the dataset, more than `num_held_out`.
        seed: seed of the run.
    Raises:
        ValueError: if a number is not an integer or out of range.
    """

    num_held_out: int
    num_images: int
    seed: int

    def __post_init__(self) -> None:
        if not all(isinstance(value, int) for value in vars(self).values()):
            raise ValueError(f"the fields of HoldOut must be integers, got {self}")
        if not 0 < self.num_held_out < self.num_images:
            raise ValueError(
                f"`num_held_out` must be in [1, {self.num_images - 1}], got {self.num_held_out}"
            )

    def rows(self) -> tuple[list[int], list[int]]:
        """Indices of the training images and of the held-out images, ascending."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "validation"))
        order: list[int] = torch.randperm(self.num_images, generator=generator).tolist()
        return sorted(order[self.num_held_out :]), sorted(order[: self.num_held_out])

    def digest(self, images: ImageDataset) -> str:
        """Hash of the pixels of the held-out images.

        Raises:
            DataError: if the number of images differs from that of the run.
        """
        if len(images) != self.num_images:
            raise DataError(f"the training run had {self.num_images:,} images, got {len(images):,}")
        sha256 = hashlib.sha256(repr(images.facts.to_config()["image"]).encode())
        for row in self.rows()[1]:
            sha256.update(images.window(row).tobytes())
        return sha256.hexdigest()[:32]
