"""Bits/dim of a model on a data set: the bound in parts, with noise that is each image's own."""

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
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.evaluation.sharded_tensors import Part, compute_parts
from ddpm_hf.likelihood import BitsPerDim, bits_per_dim
from ddpm_hf.randomness import seed_of
from ddpm_hf.statistics import standard_error


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is measured; see `likelihood.bits_per_dim`.

    Attributes:
        num_inference_steps: K; None for the whole chain.
        num_timesteps: network calls per image; None for K.
        timesteps: in place of `num_inference_steps` the timesteps themselves.
        decoder: "exact" or "tanh".
        seed: of the noise; that of an image is drawn from this and its index.
        batch_size: images at once.
    """

    num_inference_steps: int | None = None
    num_timesteps: int | None = None
    timesteps: tuple[int, ...] | None = None
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
    known: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """The bound of the images, as JSON values; the same for any number of processes and restarts.

    Args:
        unet: the network, on the device of this process.
        scheduler: of its diffusion; another sampler than DDPM's is replaced by that.
        images: to measure.
        options: how.
        folder: where unfinished parts are kept.
        state: the processes, which share the work.
        known: an earlier result, which is returned if it is of the very same measurement.
        progress: show progress bars.
    Returns:
        "value", "standard_error", every term and each image's bound; None on all but the main
        process.
    Raises:
        ValueError: if something cannot be measured: see `bits_per_dim`.
    """
    scheduler = GaussianDDPMScheduler.from_config(scheduler.config)
    key = bound_key(unet, scheduler, images, options)
    if known and known.get("key") == key:
        return known if state.is_main_process else None
    unfinished = folder / f".unfinished-{key[:16]}"
    bound = bound_in_parts(unet, scheduler, images, options, unfinished, state, progress=progress)
    if bound is None:
        return None
    return {"name": "bits-per-dim", "key": key, **_described(bound, images, scheduler, options)}


def bound_in_parts(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    images: EvaluationImages,
    options: BoundOptions,
    folder: Path,
    state: PartialState,
    *,
    progress: bool = True,
) -> BitsPerDim | None:
    """The bound of the images; None on all but the main process.

    Args:
        folder: where the parts of this very measurement are kept.
        unet, scheduler, images, options, state, progress: as for `measure_bits_per_dim`.
    """
    starts = range(0, len(images), options.batch_size)
    rows = [range(start, min(start + options.batch_size, len(images))) for start in starts]

    def compute(part: int) -> Part:
        shown = progress and state.is_main_process
        bound = _bound(unet, scheduler, images, rows[part], options, shown)
        return {field.name: getattr(bound, field.name) for field in dataclasses.fields(bound)}

    parts = compute_parts(state, folder, [len(part) for part in rows], compute, progress=progress)
    return BitsPerDim.concatenate([BitsPerDim(**part) for part in parts]) if parts else None


def forget_parts(folder: Path, result: dict[str, Any]) -> None:
    """Remove what was kept in case of an interruption, once the result is safe."""
    remove_folder(folder / f".unfinished-{result['key'][:16]}")


def _bound(
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
        batch_size=len(rows),
        progress=progress,
    )


def bound_key(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    images: EvaluationImages,
    options: BoundOptions,
) -> str:
    """Hash of all that decides the result."""
    config = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    curve = None if scheduler.x_0_mse is None else scheduler.x_0_mse.tolist()
    facts = [dataclasses.asdict(options), config, curve, str(unet.dtype), images.digest()]
    sums = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    sums.update(weights_digest(unet).encode())
    return sums.hexdigest()


def _described(
    bound: BitsPerDim,
    images: EvaluationImages,
    scheduler: GaussianDDPMScheduler,
    options: BoundOptions,
) -> dict[str, Any]:
    terms = bound.terms
    parts = {
        "prior": bound.prior,
        "diffusion": terms[:, :-1].sum(1),
        "decoder": terms[:, -1],
        "total": bound.total,
    }
    num_steps = len(bound.timesteps)
    return {
        "value": bound.mean,
        "standard_error": _finite(bound.standard_error),
        "parts": {
            name: {"value": part.mean().item(), "standard_error": _finite(standard_error(part))}
            for name, part in parts.items()
        },
        "num_images": len(images),
        "shape": list(images.images.shape),
        "bit_depth": images.facts.bit_depth,
        "is_calibrated": scheduler.x_0_mse is not None,
        "num_train_timesteps": len(scheduler),
        "num_inference_steps": num_steps,
        "num_timesteps": min(options.num_timesteps or num_steps, num_steps),
        "decoder": options.decoder,
        "seed": options.seed,
        "timesteps": bound.timesteps.tolist(),
        "terms": terms.mean(0).tolist(),
        "x_0_mse": _finite_list(bound.x_0_mse),
        "eps_mse": _finite_list(bound.eps_mse),
        "num_measured": bound.num_measured.tolist(),
        "num_expected": bound.num_expected.tolist(),
        "indices": list(images.indices),
        "total": bound.total.tolist(),
    }


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _finite_list(values: Tensor) -> list[float | None]:
    return [_finite(value) for value in values.tolist()]
