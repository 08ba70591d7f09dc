"""Post-hoc EMA during training: when snapshots are written, and what they cost."""

import time

import torch
from safetensors.torch import save
from torch import Tensor

from ddpm_hf.post_hoc_ema.snapshots import compact, save_snapshot
from ddpm_hf.training.run import Run
from ddpm_hf.utils.text import counted, file_size


def is_snapshot_due(run: Run) -> bool:
    """Whether snapshots are due after this update."""
    every = run.config.post_hoc_ema_steps
    return every is not None and run.is_due(every)


def save_snapshots(run: Run) -> None:
    """Write a snapshot of each average.

    Raises:
        ValueError, OSError, SafetensorError: see `save_snapshot`.
    """
    for average in run.state.averages:
        weights = run.state.by_name(average.averages)
        save_snapshot(run.paths.ema_snapshots, run.state.step, average.sigma_rel, weights)


def snapshot_bytes(run: Run) -> int:
    """Size of all snapshots of the complete run."""
    every = run.config.post_hoc_ema_steps
    if every is None:
        return 0
    half = 2 * sum(p.numel() for average in run.state.averages for p in average.averages)
    return half * -(-run.config.max_train_steps // every)


def averaging_s(run: Run) -> float:
    """Seconds per update of averaging and writing, measured; waits for the disk are not included.

    Nothing is written, and the averages keep their values.
    """
    parameters: list[Tensor] = list(run.state.unet.parameters())
    seconds = 0.0
    for average in run.state.averages:
        start = time.monotonic()
        with torch.no_grad():
            torch._foreach_lerp_(average.averages, parameters, 0.0)
        average.averages[0].flatten()[0].item()  # waits for the device
        seconds += time.monotonic() - start
    start = time.monotonic()
    for average in run.state.averages:
        save(compact(run.state.by_name(average.averages)))
    return seconds + (time.monotonic() - start) / (run.config.post_hoc_ema_steps or 1)


def describe_averages(run: Run, share: float) -> str:
    """A line of the plan: number and size of the snapshots, and the time.

    Args:
        run: the run.
        share: `averaging_s` relative to the time of an update; 0 if unknown.
    """
    every, averages = run.config.post_hoc_ema_steps or 1, run.state.averages
    count = len(averages) * -(-run.config.max_train_steps // every)
    lengths = " and ".join(f"{average.sigma_rel:g}" for average in averages)
    cost = f"; adds about {share:.1%} of the time" * bool(share)
    return (
        f"averages   for post-hoc EMA, sigma_rel {lengths}: {count:,} snapshots, "
        f"{len(averages)} every {counted(every, 'update')}, {file_size(snapshot_bytes(run))} in "
        f"{run.paths.ema_snapshots}{cost}"
    )
