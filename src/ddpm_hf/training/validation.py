"""Bits/dim of held-out images while training goes on."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import default_collate

from ddpm_hf.diffusion.pipeline import evaluating
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.randomness import seed_of
from ddpm_hf.statistics import standard_error
from ddpm_hf.text import counted
from ddpm_hf.training.dataset_setup import HeldOut
from ddpm_hf.training.run import Run


class Validation:
    """The bound of the averaged weights on held-out images, always the same ones, noise included.

    Every process measures its share. Two measurements therefore differ by the weights alone.

    Args:
        run: its network and diffusion are measured.
        images: held out; as many as the options say are used.
    """

    def __init__(self, run: Run, images: HeldOut) -> None:
        self.run, self.images = run, images
        self.num_images = min(len(images), run.config.validation_images)
        self.num_timesteps = min(run.config.validation_timesteps, len(run.components.scheduler))

    def measure(self) -> dict[str, float]:
        """Bits/dim and its standard error, the same on all processes."""
        run = self.run
        mine = range(run.accelerator.process_index, self.num_images, run.accelerator.num_processes)
        totals: list[tuple[int, float]] = []
        if mine:
            with run.state.ema_weights() as unet, evaluating(unet):
                size = len(run.batches.rows(0))  # what training fits into memory
                for start in range(0, len(mine), size):
                    totals += self._totals(unet, mine[start : start + size])
        # In the order of the images, so that the sum is the same for any number of processes.
        everyones = torch.tensor([total for _, total in sorted(gather_object(totals))])
        return {
            "validation_bits_per_dim": everyones.mean().item(),
            "validation_standard_error": standard_error(everyones),
        }

    def _totals(self, unet: torch.nn.Module, indices: range) -> list[tuple[int, float]]:
        """The bound of each of these images, with its number."""
        run = self.run
        x_0, labels = default_collate(self.images.__getitems__([(0, i) for i in indices])), None
        if not isinstance(x_0, Tensor):
            x_0, labels = x_0
        bound = bits_per_dim(
            run.denoiser(labels, unet),
            run.components.scheduler,
            x_0.to(run.accelerator.device),
            num_timesteps=self.num_timesteps,
            generator=[self._generator(index) for index in indices],
            bit_depth=run.components.facts.bit_depth,
            progress=False,
        )
        return list(zip(indices, bound.total.tolist(), strict=True))

    def results(self, measured: dict[str, float]) -> list[dict[str, Any]]:
        """A measurement, as the card shows it."""
        return [
            {
                "type": "bits-per-dim",
                "name": f"bits/dim of {self.num_images} held-out images (bound)",
                "value": measured["validation_bits_per_dim"],
                "standard_error": measured["validation_standard_error"],
            }
        ]

    def describe(self) -> str:
        """What is measured, and what that costs beside the updates."""
        config, calls = self.run.config, self.num_images * self.num_timesteps
        every = config.validation_steps
        # An update calls the network forwards and backwards: about three times a call alone.
        cost = calls / (3 * every * config.batch_size)
        return (
            f"validation {counted(self.num_images, 'image')}, {self.num_timesteps} network calls "
            f"each, every {counted(every, 'update')}: about {cost:.0%} of the time on top"
        )

    def _generator(self, index: int) -> torch.Generator:
        seed = seed_of(self.run.config.seed, "validation", index)
        return torch.Generator(self.run.accelerator.device).manual_seed(seed)
