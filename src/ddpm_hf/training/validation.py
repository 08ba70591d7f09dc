"""Bits/dim of held-out images during training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import default_collate

from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.evaluation.figures import finite
from ddpm_hf.likelihood import bits_per_dim, standard_error
from ddpm_hf.randomness import seed_of
from ddpm_hf.run_record import BoundSetup, MetricRecord
from ddpm_hf.training.dataset_setup import RunImages, held_out_fraction
from ddpm_hf.training.run import Run
from ddpm_hf.utils.text import counted


@dataclass(frozen=True)
class ValidationResult:
    """Bits/dim of held-out images, an upper bound.

    Attributes:
        bits_per_dim: mean over the images.
        standard_error: of the mean; NaN for one image.
        setup: how they were measured.
    """

    bits_per_dim: float
    standard_error: float
    setup: BoundSetup

    def log_values(self) -> dict[str, float]:
        """The values in metrics.jsonl."""
        return {
            "validation_bits_per_dim": self.bits_per_dim,
            "validation_standard_error": self.standard_error,
        }

    def records(self) -> list[MetricRecord]:
        """The values in the model card."""
        setup = self.setup
        name = f"bits/dim of {counted(setup.num_images, 'held-out image')} (bound)"
        K, M, error = setup.num_inference_steps, setup.num_timesteps, finite(self.standard_error)
        precision = "" if error is None else f", standard error {error:.2g}"
        measured = f", {M:,} of them measured per image" if M < K else ""
        variances = ", calibrated variances" if setup.is_calibrated else ""
        how = (
            f"{setup.images}{precision}; K = {K:,} steps{measured}{variances}; decoder exact; "
            "measured by the trainer"
        )
        record = MetricRecord(
            type="bits-per-dim",
            name=name,
            value=self.bits_per_dim,
            standard_error=error,
            how=how,
            args={"bound": setup},
        )
        return [record]


class Validation:
    """Measures the EMA weights on the same held-out images, with the same noise, each time.

    Two measurements therefore differ by the weights alone. Every rank measures a share.

    Args:
        run: its network and diffusion are measured.
        images: held-out images; the first `validation_images` are used.
    """

    def __init__(self, run: Run, images: RunImages) -> None:
        self.run, self.images = run, images
        self.num_images = min(len(images), run.config.validation_images)
        self.every = run.config.validation_steps
        self.num_timesteps = min(run.config.validation_timesteps, len(run.components.scheduler))

    def logged(self, entry: Mapping[str, object]) -> ValidationResult | None:
        """The result in an entry of the log; None without one."""
        mean, error = (
            entry.get(f"validation_{name}") for name in ("bits_per_dim", "standard_error")
        )
        if not isinstance(mean, float):
            return None
        error = error if isinstance(error, float) else math.nan
        return ValidationResult(mean, error, self._setup())

    def measure(self) -> ValidationResult:
        """Bits/dim and its standard error, the same on all ranks."""
        run = self.run
        mine = range(run.accelerator.process_index, self.num_images, run.accelerator.num_processes)
        totals: list[tuple[int, float]] = []
        if mine:
            with run.state.ema_weights() as unet, evaluating(unet):
                size = run.micro_batch_size
                for start in range(0, len(mine), size):
                    totals += self._totals(unet, mine[start : start + size])
        # In the order of the images: the sum is the same for any number of ranks.
        all_totals = torch.tensor([total for _, total in sorted(gather_object(totals))])
        return ValidationResult(all_totals.mean().item(), standard_error(all_totals), self._setup())

    def _setup(self) -> BoundSetup:
        components, split = self.run.components, self.run.config.validation_split
        is_held_out = held_out_fraction(split) is not None
        source = "that training held out" if is_held_out else f"of {split}"
        return BoundSetup(
            images=f"{counted(self.num_images, 'image')} {source}",
            num_images=self.num_images,
            num_inference_steps=len(components.scheduler),
            num_timesteps=self.num_timesteps,
            is_calibrated=components.scheduler.x_0_mse is not None,
        )

    def _totals(self, unet: torch.nn.Module, indices: range) -> list[tuple[int, float]]:
        """Index and bits/dim of each of the images `indices`."""
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

    @property
    def relative_cost(self) -> float:
        """Time of the measurements relative to that of the updates."""
        return self.run.relative_cost(self.num_images * self.num_timesteps, self.every)

    def describe(self) -> str:
        """A line of the plan: what is measured, and its cost relative to training."""
        return (
            f"validation {counted(self.num_images, 'image')}, {self.num_timesteps} network calls "
            f"each, every {counted(self.every, 'update')}: adds about {self.relative_cost:.0%} of "
            "the time"
        )

    def _generator(self, index: int) -> torch.Generator:
        seed = seed_of(self.run.config.seed, "validation", index)
        return torch.Generator(self.run.accelerator.device).manual_seed(seed)
