"""Calibration of a model on a data set: in parts, as a table, as JSON and as a picture."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel

from ddpm_hf.calibration import (
    STABLE_RELATIVE_ERROR,
    Calibration,
    calibration_of,
    with_curve,
    without_curve,
)
from ddpm_hf.diffusion.atomic_files import read_json, write_text
from ddpm_hf.diffusion.checkpoint_limits import component_folder
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.config_extension import extension_of, with_extension
from ddpm_hf.diffusion.likelihood_timesteps import MAX_TIMESTEPS
from ddpm_hf.diffusion.scheduler_interface import num_outputs
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.evaluation.dataset_likelihood import BoundOptions, bound_in_parts, bound_key
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.likelihood import BitsPerDim
from ddpm_hf.randomness import seed_of
from ddpm_hf.text import counted
from ddpm_hf.trajectory_timesteps import SAMPLERS, trajectory_matching_timesteps

FILE_NAME = "calibration.json"
NUM_TRAJECTORIES = 32
NUM_STEPS = (5, 10, 25, 50, 100, 250)


def measure_calibration(
    unet: UNet2DModel,
    scheduler: Any,
    images: EvaluationImages,
    options: BoundOptions,
    folder: Path,
    state: PartialState,
    *,
    progress: bool = True,
) -> Calibration | None:
    """The error at every t; the same for any number of processes and restarts.

    Args:
        unet, scheduler, images, options, folder, state, progress: as for `measure_bits_per_dim`.
    Returns:
        what was measured; None on all but the main process.
    """
    scheduler = without_curve(GaussianDDPMScheduler.from_config(scheduler.config))

    def measure(scheduler: GaussianDDPMScheduler, options: BoundOptions) -> BitsPerDim | None:
        parts = folder / bound_key(unet, scheduler, images, options)[:16]
        return bound_in_parts(unet, scheduler, images, options, parts, state, progress=progress)

    chain = measure(scheduler, options)
    shared: list[Any] = [with_curve(scheduler, chain) if chain else None]
    broadcast_object_list(shared)  # the decoder's variance comes from all of the images
    end = measure(shared[0], dataclasses.replace(options, timesteps=(0,)))
    if chain is None or end is None:
        return None
    return calibration_of(scheduler, chain, end)


def rows_of(calibration: Calibration) -> list[dict[str, Any]]:
    """Predicted bits/dim of K steps, as JSON values, the fewest first.

    Evenly spaced from T - 1 to 0, with calibrated variances and, where they are fixed, with the
    published ones; and at the best timesteps for the bound.
    """
    T = len(calibration.scheduler)
    rows = []
    for K in [K for K in NUM_STEPS if K < T] + [T]:
        even = calibration.bits_per_dim(K, timestep_spacing="linspace")
        row = {
            "num_inference_steps": K,
            "bits_per_dim": even.value,
            "standard_error": finite(even.standard_error),
        }
        if 2 <= T <= MAX_TIMESTEPS:
            best = calibration.bits_per_dim(K, timestep_spacing="likelihood")
            row["at_best_timesteps"] = best.value
        if not calibration.scheduler.learns_variance:
            published = calibration.bits_per_dim(K, timestep_spacing="linspace", published=True)
            row["published"] = published.value
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Bits/dim against K as people read it, each with what it loses against all steps.

    Args:
        result: of `described`.
    """
    rows = result["rows"]
    columns = {
        "bits_per_dim": "evenly spaced",
        "at_best_timesteps": "best timesteps",
        "published": "as published",
    }
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    lines = ["bits/dim of K steps, predicted, and what they lose against all:", ""]
    lines += [f"{'K':>6}" + "".join(f"  {title:>18}" for title in columns.values())]
    whole = rows[-1]["bits_per_dim"]
    for row in rows:
        cells = [f"{row[key]:9.3f} {row[key] - whole:+8.3f}" for key in columns]
        lines.append(f"{row['num_inference_steps']:>6,}" + "".join(f"  {cell}" for cell in cells))
    error = rows[-1]["standard_error"]
    of_all = "" if error is None else f"; standard error of the last line {error:.3f}"
    lines += [
        "",
        f"{counted(result['num_images'], 'image')}{of_all}; took {result['seconds']:,.0f} s",
        "best timesteps are best for the bound alone: sample at evenly spaced ones",
    ]
    if "published" in columns:
        lines.append("as published: evenly spaced, variances not calibrated but in the last step")
    else:
        lines.append("a learned variance shares the error out over an image: it loses less")
    return "\n".join(lines)


def remarks(calibration: Calibration) -> list[str]:
    """What a person should know before relying on the curve: too few images, another schedule."""
    said = []
    num_images = len(calibration.errors)
    relative = calibration.relative_error
    if num_images == 1:
        said.append("one image tells no standard error: 256 make a stable curve")
    elif relative.max() > STABLE_RELATIVE_ERROR:
        t = int(relative.argmax())
        said.append(
            f"{num_images:,} images are few: the error at t={t} is known to {relative.max():.0%};"
            f" {calibration.num_images_for():,} images would bring all of the curve to"
            f" {STABLE_RELATIVE_ERROR:.0%}"
        )
    return said + calibration.mismatch_warnings()


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def described(
    calibration: Calibration, images: EvaluationImages, options: BoundOptions
) -> dict[str, Any]:
    """What was measured and what follows, as JSON values."""
    measured = calibration.measured
    return {
        "name": "calibration",
        "num_images": len(images),
        "indices": list(images.indices),
        "seed": options.seed,
        "x_0_mse": calibration.x_0_mse.tolist(),
        "standard_error": [finite(value) for value in calibration.standard_error.tolist()],
        "rows": rows_of(calibration),
        "measured": {
            "value": measured.mean,
            "standard_error": finite(measured.standard_error),
            "variance_type": calibration.scheduler.config.variance_type,
        },
        "remarks": remarks(calibration),
    }


def timesteps_of(
    unet: UNet2DModel, scheduler: GaussianDDPMScheduler, images: EvaluationImages, seed: int
) -> dict[str, dict[int, list[int]]]:
    """Timesteps by sampler and number of steps, found on noise by the seed; every class alike."""
    generators = [
        torch.Generator().manual_seed(seed_of(seed, "timesteps", i))
        for i in range(NUM_TRAJECTORIES)
    ]
    noise = torch.stack([torch.randn(images.images.shape, generator=g) for g in generators])
    noise = noise.to(unet.device)
    labels = None
    if images.labels is not None:
        classes = sorted({*images.labels.tolist()})
        each = [classes[i % len(classes)] for i in range(NUM_TRAJECTORIES)]
        labels = torch.tensor(each, device=unet.device)
    T, channels = len(scheduler), num_outputs(unet.config, scheduler)
    return {
        sampler: trajectory_matching_timesteps(
            denoiser_of(unet, labels, channels),
            scheduler,
            noise,
            sampler=sampler,
            max_num_steps=min(25, T),
            num_fine_steps=min(100, T),
        )
        for sampler in SAMPLERS
    }


def keep_calibration(scheduler: GaussianDDPMScheduler, model: Path, output: Path) -> Path:
    """Put what was measured into the model's scheduler_config.json, all else as it was.

    Args:
        scheduler: with the curve.
        model: folder of the model; if it is none, the whole configuration goes to `output`.
        output: a folder.
    Returns:
        the path of the configuration.
    """
    if not model.is_dir():
        path = output / "scheduler_config.json"
        write_text(path, scheduler.to_json_string())
        return path
    path = component_folder(model, "scheduler") / "scheduler_config.json"
    config = with_extension(read_json(path), extension_of(scheduler.config))
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
