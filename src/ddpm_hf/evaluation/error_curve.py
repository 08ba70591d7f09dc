"""Error curve of a network on a dataset, and what follows from it."""

from dataclasses import replace
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
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.likelihood_timesteps import MAX_TIMESTEPS
from ddpm_hf.diffusion.scheduler_interface import num_outputs
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.evaluation.calibration_results import (
    CalibrationCurve,
    MeasuredBound,
    StepsRow,
    Timesteps,
)
from ddpm_hf.evaluation.dataset_likelihood import BoundMeasurement, finite
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.likelihood import BitsPerDim
from ddpm_hf.randomness import seed_of
from ddpm_hf.trajectory_timesteps import SAMPLERS, trajectory_matching_timesteps

NUM_TRAJECTORIES = 32
NUM_STEPS = (5, 10, 25, 50, 100, 250)


def measure_calibration(
    measurement: BoundMeasurement, folder: Path, state: PartialState, *, progress: bool = True
) -> Calibration | None:
    """Error at every timestep; independent of the number of ranks and of interruptions.

    Args:
        measurement: of the whole chain; the curve of its scheduler is ignored.
        folder: holds unfinished shards.
        state: the ranks, which share the work.
        progress: show progress bars.
    Returns:
        the calibration on the main rank, None on others.
    """
    scheduler = without_curve(GaussianDDPMScheduler.from_config(measurement.scheduler.config))

    def measure(**changes: Any) -> BitsPerDim | None:
        changed = replace(measurement, **changes)
        return changed.bound(folder / changed.key[:16], state, progress=progress)

    chain = measure(scheduler=scheduler)
    shared: list[Any] = [with_curve(scheduler, chain) if chain else None]
    broadcast_object_list(shared)  # the variance of the decoder depends on all images
    end = measure(scheduler=shared[0], options=replace(measurement.options, timesteps=(0,)))
    if chain is None or end is None:
        return None
    return calibration_of(scheduler, chain, end)


def predicted_steps(calibration: Calibration) -> tuple[StepsRow, ...]:
    """Predicted bits/dim of K steps, the fewest first, and of all T steps."""
    T = len(calibration.scheduler)
    return tuple(_predicted(calibration, K) for K in [K for K in NUM_STEPS if K < T] + [T])


def _predicted(calibration: Calibration, K: int) -> StepsRow:
    best, published = None, None
    even = calibration.bits_per_dim(K, timestep_spacing="linspace")
    if 2 <= len(calibration.scheduler) <= MAX_TIMESTEPS:
        best = calibration.bits_per_dim(K, timestep_spacing="likelihood").value
    if not calibration.scheduler.learns_variance:
        bound = calibration.bits_per_dim(K, timestep_spacing="linspace", published=True)
        published = bound.value
    return StepsRow(
        num_inference_steps=K,
        bits_per_dim=even.value,
        standard_error=finite(even.standard_error),
        at_best_timesteps=best,
        published=published,
    )


def calibration_curve(
    calibration: Calibration, images: EvaluationImages, seed: int, seconds: float
) -> CalibrationCurve:
    """The curve and its consequences as a result."""
    measured = calibration.measured
    return CalibrationCurve(
        num_images=len(images),
        indices=tuple(images.indices),
        seed=seed,
        x_0_mse=tuple(calibration.x_0_mse.tolist()),
        standard_error=tuple(map(finite, calibration.standard_error.tolist())),
        steps=predicted_steps(calibration),
        measured=MeasuredBound(
            value=measured.mean,
            standard_error=finite(measured.standard_error),
            variance_type=calibration.scheduler.config.variance_type,
        ),
        remarks=tuple(remarks(calibration)),
        seconds=seconds,
    )


def remarks(calibration: Calibration) -> list[str]:
    """Caveats: too few images, or signs of another schedule."""
    notes = []
    num_images = len(calibration.errors)
    relative = calibration.relative_error
    if num_images == 1:
        notes.append("one image gives no standard error: use 256 for a stable curve")
    elif relative.max() > STABLE_RELATIVE_ERROR:
        t = int(relative.argmax())
        notes.append(
            f"{num_images:,} images are few: the relative standard error at t={t} is"
            f" {relative.max():.0%}; {calibration.num_images_for():,} images would reduce it to"
            f" {STABLE_RELATIVE_ERROR:.0%} everywhere"
        )
    return notes + calibration.mismatch_warnings()


def search_timesteps(
    unet: UNet2DModel, scheduler: GaussianDDPMScheduler, images: EvaluationImages, seed: int
) -> Timesteps:
    """Timesteps by sampler and number of steps, searched on noise with all classes alike."""
    seeds = [seed_of(seed, "timesteps", i) for i in range(NUM_TRAJECTORIES)]
    shape, generators = images.images.shape, [torch.Generator().manual_seed(s) for s in seeds]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(unet.device)
    labels = None
    if images.labels is not None:
        classes = sorted({*images.labels.tolist()})
        in_turn = [classes[i % len(classes)] for i in range(NUM_TRAJECTORIES)]
        labels = torch.tensor(in_turn, device=unet.device)
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
