"""Bits/dim of a model on a dataset: the bound in shards, with the noise of each image fixed."""

import dataclasses
import hashlib
import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import remove_folder
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.scheduler_interface import num_outputs
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.evaluation.figures import BoundPart, BoundParts, BoundResult, finite
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.evaluation.result_files import known_results
from ddpm_hf.evaluation_options import BITS, EvaluationOptions
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim, standard_error
from ddpm_hf.randomness import seed_of
from ddpm_hf.utils.digests import weights_digest
from ddpm_hf.utils.shared_work import Shard, compute_shards


@dataclass(frozen=True)
class BoundOptions:
    """Options of the bound, as keywords of `likelihood.bits_per_dim`.

    `seed` is that of the noise, which depends on the seed and the index of an image.
    """

    num_inference_steps: int | None = None
    num_timesteps: int | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float = 1.0
    decoder: str = "exact"
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def of(cls, options: EvaluationOptions, eta: float) -> Self:
        """The options of `evaluate` that concern the bound."""
        names = ("num_inference_steps", "num_timesteps", "decoder", "seed", "batch_size")
        return cls(eta=eta, **{name: getattr(options, name) for name in names})


@dataclass(frozen=True)
class BoundMeasurement:
    """Variational bound of images, measured in shards by all ranks.

    The result is independent of the number of ranks and of interruptions.

    Attributes:
        unet: network on the device of this rank.
        scheduler: a `GaussianDDPMScheduler`.
        images: images to measure.
        options: of the bound.
    """

    unet: UNet2DModel
    scheduler: GaussianDDPMScheduler
    images: EvaluationImages
    options: BoundOptions

    @cached_property
    def key(self) -> str:
        """Digest of everything that determines the result."""
        config = {name: value for name, value in self.scheduler.config.items() if name[0] != "_"}
        curve = None if self.scheduler.x_0_mse is None else self.scheduler.x_0_mse.tolist()
        chosen = dataclasses.asdict(self.options)
        if self.options.eta == 1:  # results without `eta` keep their keys
            del chosen["eta"]
        facts = [chosen, config, curve, str(self.unet.dtype), self.images.digest()]
        sums = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        sums.update(weights_digest(self.unet).encode())
        return sums.hexdigest()

    def bound(
        self, folder: Path, state: PartialState, *, progress: bool = True
    ) -> tuple[BitsPerDim, float] | None:
        """The bound of each image, and the median over shards of the seconds per image.

        Args:
            folder: holds the shards of this measurement only.
            state: the ranks, which share the work.
            progress: show progress bars.
        Returns:
            the bound on the main rank, None on others.
        Raises:
            ValueError: if the options do not fit; see `bits_per_dim`.
        """
        size, num_images = self.options.batch_size, len(self.images)
        rows = [range(i, min(i + size, num_images)) for i in range(0, num_images, size)]

        def compute(shard: int) -> Shard:
            start = time.perf_counter()
            bound = self._bound_of(rows[shard], progress and state.is_main_process)
            seconds = (time.perf_counter() - start) / len(rows[shard])
            return {**vars(bound), "seconds_per_image": torch.tensor(seconds)}

        sizes = [len(of_shard) for of_shard in rows]
        shards = compute_shards(state, folder, sizes, compute, progress=progress)
        if shards is None:
            return None
        seconds = statistics.median(shard.pop("seconds_per_image").item() for shard in shards)
        return BitsPerDim.concatenate([BitsPerDim(**shard) for shard in shards]), seconds

    def result(
        self, folder: Path, state: PartialState, *, progress: bool = True
    ) -> BoundResult | None:
        """The mean over the images with its parts, on the main rank; None on others.

        Args:
            folder: of an evaluation; its result is reused if it is of the same measurement.
            state, progress: see `bound`.
        """
        known = [r for r in known_results(folder) if isinstance(r, BoundResult)]
        if known and known[0].key == self.key:
            return known[0] if state.is_main_process else None
        timed = self.bound(_unfinished(folder, self.key), state, progress=progress)
        return None if timed is None else _bound_result(self, *timed)

    def _bound_of(self, rows: range, progress: bool) -> BitsPerDim:
        images, labels, device = self.images, self.images.labels_of(rows), self.unet.device
        options = {**vars(self.options), "batch_size": len(rows)}
        seeds = [seed_of(options["seed"], "bound", images.indices[row]) for row in rows]
        del options["seed"]
        return bits_per_dim(
            denoiser_of(
                self.unet,
                None if labels is None else labels.to(device),
                num_outputs(self.unet.config, self.scheduler),
            ),
            self.scheduler,
            images.batch(rows).to(device),
            generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
            bit_depth=images.facts.bit_depth,
            progress=progress,
            **options,
        )


def scheduler_of_bound(scheduler: Any, eta: float) -> GaussianDDPMScheduler:
    """The scheduler whose bound is measured.

    Args:
        scheduler: any scheduler of diffusers.
        eta: noise of the sampler.
    Raises:
        ValueError: if the sampler has no bound.
    """
    name = type(scheduler).__name__.removesuffix("Scheduler").removeprefix("Gaussian")
    reason = "which is deterministic"
    try:
        own = as_gaussian_scheduler(scheduler)
        if eta > 0:
            return GaussianDDPMScheduler.from_config(own.config)
    except TypeError:
        reason = "whose steps define no bound"
    noise = "" if eta == 1 else f":eta={eta:g}"
    raise ValueError(
        f"`metrics`: {BITS} needs the scheduler DDPM with eta above 0, got {name}{noise}, {reason}"
    )


def remove_shards(folder: Path, result: BoundResult) -> None:
    """Remove the shards of a result that is written."""
    remove_folder(_unfinished(folder, result.key))


def _unfinished(folder: Path, key: str) -> Path:
    return folder / f".unfinished-{key[:16]}"


def _bound_result(
    measurement: BoundMeasurement, bound: BitsPerDim, seconds_per_image: float
) -> BoundResult:
    images, options = measurement.images, measurement.options
    terms, K = bound.terms, len(bound.timesteps)
    channels, height, width = images.images.shape
    return BoundResult(
        key=measurement.key,
        value=bound.mean,
        standard_error=finite(bound.standard_error),
        parts=BoundParts(
            prior=_part(bound.prior),
            diffusion=_part(terms[:, :-1].sum(1)),
            decoder=_part(terms[:, -1]),
            total=_part(bound.total),
        ),
        num_images=len(images),
        shape=(channels, height, width),
        bit_depth=images.facts.bit_depth,
        is_calibrated=measurement.scheduler.x_0_mse is not None,
        num_train_timesteps=len(measurement.scheduler),
        num_inference_steps=K,
        num_timesteps=min(options.num_timesteps or K, K),
        eta=None if options.eta == 1 else options.eta,
        decoder=options.decoder,
        seed=options.seed,
        seconds_per_image=seconds_per_image,
        timesteps=tuple(bound.timesteps.tolist()),
        terms=tuple(terms.mean(0).tolist()),
        x_0_mse=tuple(map(finite, bound.x_0_mse.tolist())),
        eps_mse=tuple(map(finite, bound.eps_mse.tolist())),
        num_measured=tuple(bound.num_measured.tolist()),
        num_expected=tuple(bound.num_expected.tolist()),
        indices=tuple(images.indices),
        total=tuple(bound.total.tolist()),
    )


def _part(values: Tensor) -> BoundPart:
    return BoundPart(value=values.mean().item(), standard_error=finite(standard_error(values)))
