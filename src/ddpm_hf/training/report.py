"""What a run tells: its plan, its losses and its pictures."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from PIL.Image import Image

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.extension import beta_schedule_of
from ddpm_hf.training.config import TrainingConfig


class Journal:
    """The losses of a run, in metrics.jsonl and, where it is installed, TensorBoard.

    Every process has one; only the main process writes.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int) -> None:
        self._accelerator = accelerator
        self._file = folder / "metrics.jsonl"
        self._since = time.monotonic()
        if accelerator.is_main_process:
            self._file.touch()
            self._forget_after(step)
        if accelerator.log_with:
            # What an interrupted run had logged beyond its checkpoint is drawn once, not twice.
            accelerator.init_trackers(
                "logs", init_kwargs={"tensorboard": {"purge_step": step + 1 if step else None}}
            )

    def _forget_after(self, step: int) -> None:
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        beside = self._file.with_suffix(".new")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self._file)

    def write(self, step: int, values: dict[str, float], num_images: int) -> None:
        """Log `values` for update `step`, with the speed since the last entry."""
        now = time.monotonic()
        values = {**values, "images_per_s": round(num_images / max(now - self._since, 1e-9), 1)}
        self._since = now
        self._accelerator.log(values, step=step)
        if self._accelerator.is_main_process:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")

    def show(self, step: int, grid: Image) -> None:
        """Give the sample grid of update `step` to TensorBoard."""
        if self._accelerator.log_with:
            pixels = np.asarray(grid.convert("RGB"))[None]
            tracker = self._accelerator.get_tracker("tensorboard")
            tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def close(self) -> None:
        """Flush and close the trackers."""
        self._accelerator.end_training()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the half-written last line of a run that was killed


def trackers() -> list[str]:
    """The experiment trackers that are installed."""
    return ["tensorboard"] if is_tensorboard_available() else []


def describe(
    config: TrainingConfig,
    facts: ImageFacts,
    num_images: int,
    unet: torch.nn.Module,
    scheduler: Any,
    accelerator: Accelerator,
) -> str:
    """The plan of a run in a few lines, every proposed value included."""
    parameters = sum(p.numel() for p in unet.parameters())
    channels = getattr(getattr(unet, "config", None), "block_out_channels", ())
    steps, batch = config.max_train_steps or 0, config.batch_size or 0
    diffusion = scheduler.config
    schedule, params = beta_schedule_of(diffusion)
    schedule += f" ({', '.join(f'{k} {v:g}' for k, v in params.items())})" * bool(params)
    split = f", {config.gradient_accumulation_steps} passes each" * (
        config.gradient_accumulation_steps > 1
    )
    return "\n".join(
        [
            f"images     {num_images:,} of {facts.width}x{facts.height}, {facts.mode}"
            + f" {facts.bit_depth} bit" * (facts.bit_depth != 8),
            f"network    {type(unet).__name__}, {parameters:,} parameters"
            + f", channels {'-'.join(map(str, channels))}" * bool(channels),
            f"diffusion  T={diffusion.num_train_timesteps}, {schedule}, "
            f"predicts {diffusion.prediction_type}",
            f"training   {steps:,} updates of {batch} images{split} "
            f"({steps * batch / num_images:,.0f} epochs), learning rate {config.learning_rate:g}",
            f"machine    {accelerator.num_processes} x {accelerator.device.type}, "
            f"mixed precision: {accelerator.mixed_precision}",
            f"output     {config.run_folder()}, losses in "
            + ("logs/ for TensorBoard" if trackers() else "metrics.jsonl (no TensorBoard here)"),
        ]
    )


def outcome(config: TrainingConfig, step: int, seconds: float, *, stopped: bool) -> str:
    """What a run left and what to do with it, in a few lines."""
    folder = config.run_folder()
    if stopped:
        return (
            f"stopped    after update {step:,}, saved in {folder / 'checkpoints'}; run the same "
            "command again to go on"
        )
    grids = f", sample grids in {folder / 'samples'}" * bool(config.num_samples)
    return (
        f"done       {step:,} updates, this run took {duration(seconds)}\n"
        f"model      {folder / 'model'}{grids}\n"
        f"next       ddpm-hf sample {folder / 'model'}\n"
        f"           ddpm-hf push {folder / 'model'} YOU/NAME"
    )


def duration(seconds: float) -> str:
    """Seconds for people: '45 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
