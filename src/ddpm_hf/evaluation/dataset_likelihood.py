"""Bits/dim of a model on a dataset: the bound in shards, with the noise of each image fixed."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import remove_folder
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.figures import BoundPart, BoundParts, BoundResult
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.evaluation.sharded_tensors import Shard, compute_shards
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim
from ddpm_hf.randomness import seed_of
from ddpm_hf.statistics import standard_error


@dataclass(frozen=True)
class BoundOptions:
    """Options of the bound; see `likelihood.bits_per_dim`.

    Attributes:
        num_inference_steps: K; None for the whole chain.
        num_timesteps: network calls per image; None for K.
        timesteps: explicit timesteps in place of `num_inference_steps`.
        eta: noise of the sampler, in (0, 1].
        decoder: "exact" or "tanh".
        seed: of the noise, which depends on the seed and the index of an image.
        batch_size: images per batch.
    """

    num_inference_steps: int | None = None
    num_timesteps: int | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float = 1.0
    decoder: str = "exact"
    seed: int = 0
    batch_size: int = 64


def measure_bits_per_dim(
    unet: UNet2DModel,
    scheduler: Any,
    images: EvaluationImages,
    options: BoundOptions,
    folder: Path,
    state: PartialState,
    *,
    known: BoundResult | None = None,
    progress: bool = True,
) -> BoundResult | None:
    """Variational bound of the images; independent of the number of ranks and of interruptions.

    Args:
        unet: network on the device of this rank.
        scheduler: a DDPM scheduler.
        images: images to measure.
        options: options of the bound.
        folder: holds unfinished shards.
        state: the ranks, which share the work.
        known: an earlier result, returned if it is of the same measurement.
        progress: show progress bars.
    Returns:
        the bound on the main rank, None on others.
    Raises:
        TypeError: for another scheduler.
        ValueError: if the options do not fit; see `bits_per_dim`.
    """
    scheduler = GaussianDDPMScheduler.from_config(as_gaussian_scheduler(scheduler).config)
    key = bound_key(unet, scheduler, images, options)
    if known and known.key == key:
        return known if state.is_main_process else None
    unfinished = folder / f".unfinished-{key[:16]}"
    bound = sharded_bound(unet, scheduler, images, options, unfinished, state, progress=progress)
    return None if bound is None else _bound_result(key, bound, images, scheduler, options)


def sharded_bound(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    images: EvaluationImages,
    options: BoundOptions,
    folder: Path,
    state: PartialState,
    *,
    progress: bool = True,
) -> BitsPerDim | None:
    """The bound of each image on the main rank; None on others.

    Args:
        folder: holds the shards of this measurement only.
        unet, scheduler, images, options, state, progress: see `measure_bits_per_dim`.
    """
    starts = range(0, len(images), options.batch_size)
    rows = [range(start, min(start + options.batch_size, len(images))) for start in starts]

    def compute(shard: int) -> Shard:
        shown = progress and state.is_main_process
        bound = _bound_of_rows(unet, scheduler, images, rows[shard], options, shown)
        return {field.name: getattr(bound, field.name) for field in dataclasses.fields(bound)}

    sizes = [len(of_shard) for of_shard in rows]
    shards = compute_shards(state, folder, sizes, compute, progress=progress)
    return BitsPerDim.concatenate([BitsPerDim(**shard) for shard in shards]) if shards else None


def remove_shards(folder: Path, result: BoundResult) -> None:
    """Remove the shards of a result that is written."""
    remove_folder(folder / f".unfinished-{result.key[:16]}")


def _bound_of_rows(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    images: EvaluationImages,
    rows: range,
    options: BoundOptions,
    progress: bool,
) -> BitsPerDim:
    labels, device = images.labels_of(rows), unet.device
    channels = unet.config.in_channels * (2 if scheduler.learns_variance else 1)
    labels = None if labels is None else labels.to(device)
    return bits_per_dim(
        denoiser_of(unet, labels, channels),
        scheduler,
        images.batch(rows).to(device),
        num_inference_steps=options.num_inference_steps,
        num_timesteps=options.num_timesteps,
        timesteps=options.timesteps,
        generator=[
            torch.Generator(device).manual_seed(seed_of(options.seed, "bound", images.indices[row]))
            for row in rows
        ],
        decoder=options.decoder,
        bit_depth=images.facts.bit_depth,
        eta=options.eta,
        batch_size=len(rows),
        progress=progress,
    )


def bound_key(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    images: EvaluationImages,
    options: BoundOptions,
) -> str:
    """Digest of everything that determines the result."""
    config = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    curve = None if scheduler.x_0_mse is None else scheduler.x_0_mse.tolist()
    chosen = dataclasses.asdict(options)
    if options.eta == 1:  # results without `eta` keep their keys
        del chosen["eta"]
    facts = [chosen, config, curve, str(unet.dtype), images.digest()]
    sums = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    sums.update(weights_digest(unet).encode())
    return sums.hexdigest()


def _bound_result(
    key: str,
    bound: BitsPerDim,
    images: EvaluationImages,
    scheduler: GaussianDDPMScheduler,
    options: BoundOptions,
) -> BoundResult:
    terms, num_steps = bound.terms, len(bound.timesteps)
    channels, height, width = images.images.shape
    return BoundResult(
        key=key,
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
        is_calibrated=scheduler.x_0_mse is not None,
        num_train_timesteps=len(scheduler),
        num_inference_steps=num_steps,
        num_timesteps=min(options.num_timesteps or num_steps, num_steps),
        eta=None if options.eta == 1 else options.eta,
        decoder=options.decoder,
        seed=options.seed,
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
    error = finite(standard_error(values))
    return BoundPart(value=values.mean().item(), standard_error=error)


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
