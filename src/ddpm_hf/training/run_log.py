"""Training metrics: accumulated on the device, written to metrics.jsonl and sent to trackers."""

import dataclasses
import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import write_text
from ddpm_hf.training.run import Run
from ddpm_hf.training.trackers import (
    TrackedRun,
    Trackers,
    public_config,
    requested_trackers,
)


@dataclass(frozen=True)
class SkippedUpdate:
    """An update without a finite gradient.

    Attributes:
        step: number of the update, from 1.
        rows: indices of its images in the dataset, over all ranks.
        timesteps: their timesteps.
    """

    step: int
    rows: list[int]
    timesteps: list[int]


class RunningMetrics:
    """Loss and gradient norm of the updates since the last log entry.

    Kept on the device: reading them after every update would make the host wait for it.

    Attributes:
        skipped: updates without a finite gradient among the last thousand before `read`, counted
            from 0, each with the timesteps of its batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped: list[tuple[int, list[int]]] = []
        self._num_updates = 0
        self._recent: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=1000)
        self._totals = torch.zeros(3, device=device)  # loss, gradient norm, finite updates
        self._skipped_in_a_row = torch.zeros((), device=device)

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, t: Tensor) -> None:
        """Add an update; it counts as skipped if its gradient norm is not finite."""
        is_finite = torch.isfinite(grad_norm)
        self._num_updates += 1
        self._recent.append((step, is_finite, t))
        measured = torch.stack([loss, grad_norm, torch.ones_like(loss)])
        self._totals += torch.where(is_finite, measured, 0.0)
        self._skipped_in_a_row = torch.where(is_finite, 0.0, self._skipped_in_a_row + 1)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the finite updates since the last call and over the ranks; NaN if none.

        Waits for the device, and resets the means.
        """
        loss, grad_norm, count = accelerator.reduce(self._totals, reduction="mean").tolist()
        num_skipped = self._num_updates - round(count)
        self.skipped = self._find_skipped() if num_skipped else []
        self._totals.zero_()
        self._num_updates = 0
        self._recent.clear()
        return {
            "loss": loss / count if count else math.nan,
            "grad_norm": grad_norm / count if count else math.nan,
            "skipped_updates": num_skipped,
        }

    def _find_skipped(self) -> list[tuple[int, list[int]]]:
        finite = torch.stack([is_finite for _, is_finite, _ in self._recent]).tolist()
        recent = zip(finite, self._recent, strict=True)
        return [(step, t.tolist()) for is_finite, (step, _, t) in recent if not is_finite]

    @property
    def skipped_in_a_row(self) -> int:
        """Number of updates without a finite gradient since the last finite one.

        Waits for the device.
        """
        return int(self._skipped_in_a_row)


class MetricsLog:
    """metrics.jsonl and the experiment trackers.

    Created on every rank; only the main process writes.

    Args:
        file: one JSON object per line; entries after update `step` are removed.
        accelerator: names the main process.
        step: number of updates done before.
        batch_size: images per update.
        trackers: get the values and the sample grids; none of them on the other ranks.
    """

    def __init__(
        self,
        file: Path,
        accelerator: Accelerator,
        step: int,
        batch_size: int,
        trackers: Trackers,
    ) -> None:
        self._accelerator, self._file, self._batch_size = accelerator, file, batch_size
        self._trackers = trackers
        self._last_time, self._last_step = time.monotonic(), step
        if accelerator.is_main_process:
            file.touch()
            _drop_entries_after(file, step)

    def write(
        self, step: int, values: dict[str, float], skipped: Sequence[SkippedUpdate] = ()
    ) -> None:
        """Log `values` after update `step`, with the speed since the last entry.

        Skipped updates go into the file only.
        """
        now = time.monotonic()
        num_images = (step - self._last_step) * self._batch_size
        speed = round(num_images / max(now - self._last_time, 1e-9), 1)
        self._last_time, self._last_step = now, step
        values = {**values, "images_per_s": speed}
        self._trackers.log(step, values)
        details = {"skipped": [dataclasses.asdict(update) for update in skipped]} if skipped else {}
        self.append({"step": step, **_finite(values), **details})

    def entry_at(self, step: int) -> dict[str, object]:
        """The logged values of update `step`; {} without any, and on other ranks."""
        values: dict[str, object] = {}
        if self._accelerator.is_main_process:
            for line in self._file.read_text(encoding="utf-8").splitlines():
                if _step_of(line) == step:
                    values |= json.loads(line)
        return values

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the entry of update `step`, the last one."""
        self._trackers.log(step, values)
        if self._accelerator.is_main_process:
            entry = self.entry_at(step) | {"step": step} | _finite(values)
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) != step]
            write_text(self._file, "".join([*kept, json.dumps(entry) + "\n"]))

    def append(self, entry: Mapping[str, object]) -> None:
        """Append an entry to the file, without the trackers."""
        if self._accelerator.is_main_process:
            line = json.dumps(entry) + "\n"
            size = self._file.stat().st_size if self._file.exists() else 0
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(line)
            except PermissionError:  # of a bucket, where files cannot be continued
                write_text(self._file, self._file.read_text(encoding="utf-8") + line)
            except OSError:
                os.truncate(self._file, size)  # a full disk takes a part of the line
                raise

    def show(self, step: int, grid: Image) -> None:
        """Send the sample grid of update `step` to the trackers."""
        self._trackers.show(step, grid)

    def close(self) -> None:
        """Send what the trackers still hold, within a time limit."""
        self._trackers.close()


def open_log(run: Run) -> MetricsLog:
    """The log of a run, with the trackers of its options."""
    config, paths, step = run.config, run.paths, run.state.step
    tracked = TrackedRun(
        folder=paths.root,
        identity_file=paths.tracking,
        project=config.tracker_project_name or "ddpm-hf",
        name=config.run_name,
        config=public_config(config.to_dict()),
        step=step,
        sent_until=_last_step(paths.metrics),
        is_public=config.public,
    )
    names = requested_trackers(config.report_to) if run.accelerator.is_main_process else []
    trackers = Trackers(names, tracked)
    return MetricsLog(paths.metrics, run.accelerator, step, run.batches.batch_size, trackers)


def _last_step(file: Path) -> int:
    """The last update with an entry; 0 without any."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return int(max(filter(math.isfinite, map(_step_of, lines)), default=0))


def _drop_entries_after(file: Path, step: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    write_text(file, "".join(kept))


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the last line of a run that was killed may be incomplete
