"""Bits/dim of held-out images while training goes on."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ddpm_hf.data import TrainingImages
from ddpm_hf.likelihood import bits_per_dim, standard_error
from ddpm_hf.randomness import seed_of
from ddpm_hf.training.config import required
from ddpm_hf.training.run import Run


class Selection(torch.utils.data.Dataset[Tensor]):
    """Some of the training images, under numbers of their own."""

    def __init__(self, images: TrainingImages, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: tuple[int, int]) -> Tensor:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A batch at once, for `DataLoader`."""
        return self.images.__getitems__([(epoch, self.indices[i]) for epoch, i in positions])


def hold_out(images: TrainingImages, share: float, seed: int) -> tuple[Selection, Selection]:
    """The images to train on, and a share of them, drawn by the seed, that is held out."""
    generator = torch.Generator().manual_seed(seed_of(seed, "validation"))
    order: list[int] = torch.randperm(len(images), generator=generator).tolist()
    count = max(1, round(share * len(images)))
    return Selection(images, sorted(order[count:])), Selection(images, sorted(order[:count]))


class Validation:
    """The bound of the averaged weights on held-out images, always the same ones, noise included.

    Every process measures its share. Two measurements therefore differ by the weights alone.

    Args:
        run: its network and diffusion are measured.
        images: held out; as many as the options say are used.
    """

    def __init__(self, run: Run, images: Selection | TrainingImages) -> None:
        self.run, self.images = run, images
        self.num_images = min(len(images), run.config.validation_images)
        self.num_timesteps = min(run.config.validation_timesteps, len(run.parts.scheduler))

    def measure(self) -> dict[str, float]:
        """Bits/dim and its standard error, the same on all processes."""
        run = self.run
        mine = range(run.accelerator.process_index, self.num_images, run.accelerator.num_processes)
        totals: list[tuple[int, float]] = []
        if mine:
            with run.state.ema_weights() as unet:
                bound = bits_per_dim(
                    unet,
                    copy.deepcopy(run.parts.scheduler),
                    torch.stack([self.images[0, index] for index in mine]),
                    num_timesteps=self.num_timesteps,
                    generator=[self._generator(index) for index in mine],
                    bit_depth=run.parts.facts.bit_depth,
                    batch_size=len(run.batches.rows(0)),
                    progress=False,
                )
            totals = list(zip(mine, bound.total.tolist(), strict=True))
        # In the order of the images, so that the sum is the same for any number of processes.
        everyones = torch.tensor([total for _, total in sorted(gather_object(totals))])
        return {
            "validation_bits_per_dim": everyones.mean().item(),
            "validation_standard_error": standard_error(everyones),
        }

    def _generator(self, index: int) -> torch.Generator:
        seed = seed_of(self.run.config.seed, "validation", index)
        return torch.Generator(self.run.accelerator.device).manual_seed(seed)
