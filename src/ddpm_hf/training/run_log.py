"""What a run measures: summed up on the device, read when it is logged, kept and tracked."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import write_text

logger = logging.getLogger(__name__)


class RunningMetrics:
    """Loss and gradient norm of the updates since the last log entry.

    Kept on the device, because reading them would make the host wait for every update.

    Attributes:
        skipped: the updates without a finite gradient that `read` found, each with the timesteps of
            its batch; of the last thousand before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped: list[tuple[int, list[int]]] = []
        self._recent: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=1000)
        self._totals = torch.zeros(3, device=device)  # loss, gradient norm, finite updates
        self._skipped_in_a_row = torch.zeros((), device=device)

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, t: Tensor) -> None:
        """Take in an update, which counts as skipped where its gradient is not finite."""
        is_finite = torch.isfinite(grad_norm)
        self._recent.append((step, is_finite, t))
        measured = torch.stack([loss, grad_norm, torch.ones_like(loss)])
        self._totals += torch.where(is_finite, measured, 0.0)
        self._skipped_in_a_row = torch.where(is_finite, 0.0, self._skipped_in_a_row + 1)

    def read(self, accelerator: Accelerator, num_updates: int) -> dict[str, float]:
        """Means over the finite ones of `num_updates` updates and over the processes; NaN if none.

        Waits for the device, and begins anew.
        """
        loss, grad_norm, count = accelerator.reduce(self._totals, reduction="mean").tolist()
        self._totals.zero_()
        num_skipped = num_updates - round(count)
        self.skipped = self._find_skipped() if num_skipped else []
        self._recent.clear()
        return {
            "loss": loss / count if count else math.nan,
            "grad_norm": grad_norm / count if count else math.nan,
            "skipped_updates": num_skipped,
        }

    def _find_skipped(self) -> list[tuple[int, list[int]]]:
        were_finite = torch.stack([is_finite for _, is_finite, _ in self._recent]).tolist()
        recent = zip(were_finite, self._recent, strict=True)
        return [(step, t.tolist()) for was_finite, (step, _, t) in recent if not was_finite]

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last updates had no finite gradient; waits for the device."""
        return int(self._skipped_in_a_row)


class MetricsLog:
    """metrics.jsonl and, where it is installed, TensorBoard.

    Every process has one; only the main process writes. A tracker that fails is a warning.

    Args:
        file: one JSON object a line; entries after update `step` are cut.
        accelerator: has the trackers.
        step: updates that were done before.
    """

    def __init__(self, file: Path, accelerator: Accelerator, step: int) -> None:
        self._accelerator, self._file = accelerator, file
        self._since = time.monotonic()
        if accelerator.is_main_process:
            file.touch()
            _drop_entries_after(file, step)
        self._tracks = bool(accelerator.log_with)
        if self._tracks:
            # What an interrupted run had logged beyond its checkpoint is drawn once, not twice.
            purge = {"tensorboard": {"purge_step": step + 1 if step else None}}
            self._track(lambda: accelerator.init_trackers("logs", init_kwargs=purge))

    def write(
        self,
        step: int,
        values: dict[str, float],
        num_images: int,
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Log `values` for update `step`, with the speed since the last entry.

        What `skipped` says about updates is for the file alone.
        """
        now = time.monotonic()
        values = {**values, "images_per_s": round(num_images / max(now - self._since, 1e-9), 1)}
        self._since = now
        self._track(lambda: self._accelerator.log(values, step=step))
        if self._accelerator.is_main_process:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            entry = {"step": step, **finite, **({"skipped": skipped} if skipped else {})}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def show(self, step: int, grid: Image) -> None:
        """Give the sample grid of update `step` to the tracker."""
        pixels = np.asarray(grid.convert("RGB"))[None]
        self._track(
            lambda: self._accelerator.get_tracker("tensorboard").log_images(
                {"samples": pixels}, step=step, dataformats="NHWC"
            )
        )

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self._accelerator.trackers:
            self._track(tracker.finish)

    def _track(self, action: Callable[[], object]) -> None:
        if not self._tracks:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises, training goes on
            self._tracks = False
            logger.warning("the tracker failed and is left out from here on: %s", error)


def _drop_entries_after(file: Path, step: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    write_text(file, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the half-written last line of a run that was killed
