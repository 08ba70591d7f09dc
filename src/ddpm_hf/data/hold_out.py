"""Which images of a set a run of training holds out, and how others know them again."""

import hashlib
from dataclasses import dataclass

import torch

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_dataset import ImageDataset
from ddpm_hf.randomness import seed_of


@dataclass(frozen=True)
class HoldOut:
    """Some images of a set, drawn by the seed of a run.

    Attributes:
        num_held_out: how many, at least 1.
        num_images: of the whole set, more than these.
        seed: of the run.
    Raises:
        ValueError: if one of them is not such a number.
    """

    num_held_out: int
    num_images: int
    seed: int

    def __post_init__(self) -> None:
        if not all(isinstance(value, int) for value in vars(self).values()):
            raise ValueError(f"a draw of held-out images must be of whole numbers, got {self}")
        if not 0 < self.num_held_out < self.num_images:
            raise ValueError(f"some images must be held out, and some left, got {self}")

    def rows(self) -> tuple[list[int], list[int]]:
        """The indices of the images to train on, and of those held out, ascending."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "validation"))
        order: list[int] = torch.randperm(self.num_images, generator=generator).tolist()
        return sorted(order[self.num_held_out :]), sorted(order[: self.num_held_out])

    def digest(self, images: ImageDataset) -> str:
        """Tells the pixels of the images that are held out of these from others.

        Raises:
            DataError: if there are more images, or fewer.
        """
        if len(images) != self.num_images:
            raise DataError(f"the run had {self.num_images:,} images, and here are {len(images):,}")
        sums = hashlib.sha256(repr(images.facts.to_config()["image"]).encode())
        for row in self.rows()[1]:
            sums.update(images.window(row).tobytes())
        return sums.hexdigest()[:32]
