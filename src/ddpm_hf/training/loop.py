"""The training loop: updates (2006.11239, algorithm 1), and what is due between them."""

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.randomness import dropped_labels, noise_of_rows, seed_of, timestep_generator
from ddpm_hf.training.artifacts import Artifacts
from ddpm_hf.training.errors import TrainingError
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.objective import in_order_of_rows
from ddpm_hf.training.read_ahead import read_ahead
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_log import MetricsLog, RunningMetrics, SkippedUpdate
from ddpm_hf.training.sample_figures import SampleFigures
from ddpm_hf.utils.backend_settings import is_out_of_memory

# Consecutive updates without a finite gradient after which the run ends. In mixed precision a few
# are skipped at the start, while the loss scale settles.
_MAX_SKIPPED_IN_A_ROW = 20


def train_loop(run: Run, artifacts: Artifacts, log: MetricsLog) -> None:
    """Make every remaining update, and what is due after each.

    Raises:
        TrainingError: on all ranks, if images are unreadable or many gradients are not finite. The
            updates before are saved.
    """
    # The bar is closed before any error is printed.
    with closing(read_ahead(run)) as reader, _progress_bar(run) as bar:
        # Another rank may be unable to read the images of the first update.
        run.stop.synchronize(failed=reader.failure is not None)
        if run.stop.failed:
            _raise_read_error(reader.failure, run)
        if change := run.threads.new_change:
            with artifacts.warn_on_disk_error("log"):
                log.append(dataclasses.asdict(change))
        progress, stopping = _Progress(run, artifacts, log, bar), False
        run.model.train()
        for step in range(run.state.step, run.batches.stop):
            loss, grad_norm, t = train_step(run, reader.micro_batches, step)
            run.state.step = step + 1
            progress.add(step, loss, grad_norm, t)
            reader.advance()
            # All ranks stop after the same update.
            stopping = run.stop.synchronize(failed=reader.failure is not None)
            stopping = _finish_update(run, artifacts, progress, stopping)
            if stopping:
                break
        if not stopping:
            artifacts.calibrate()
        bar.close()
        # A signal of the terminal also ends the DataLoader workers, which is not an error.
        if run.stop.failed and run.stop.received is None:
            _raise_read_error(reader.failure, run)


def train_step(run: Run, micro_batches: list[Any], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make update `step`; without a finite gradient the weights stay as they are.

    Args:
        run: its weights, moments and EMA weights change.
        micro_batches: this rank's images of the update, or pairs of images and class labels.
        step: number of the update, from 0; images, timesteps and noise depend on it and the seed.
    Returns:
        loss and gradient norm, as scalars on the device, and the timesteps of the whole batch.
    """
    config, accelerator, batches = run.config, run.accelerator, run.batches
    scheduler, objective = run.components.scheduler, run.components.objective
    generator = timestep_generator(config.seed, step, accelerator.device)
    # Of the whole batch, on every rank. The weights correct for non-uniform timesteps.
    all_t, weights = objective.timesteps.sample(batches.batch_size, generator, accelerator.device)
    total_loss, all_losses = torch.zeros((), device=accelerator.device), []
    for micro_step, batch in enumerate(micro_batches):
        rows = batches.rows(micro_step)
        mine = slice(rows.start, rows.stop)
        x_0, labels = _to_device(run, batch, step, mine)
        noise, t = noise_of_rows(config.seed, step, rows, like=x_0), all_t[mine]
        # Dropout draws from the global generator.
        torch.manual_seed(seed_of(config.seed, "dropout", step, batches.rank, micro_step))
        with accelerator.accumulate(run.model):
            losses = objective.loss(run.denoiser(labels), scheduler, x_0, t, noise)  # (B,)
            loss = (losses * weights[mine]).mean()
            accelerator.backward(loss)
        total_loss += loss.detach() / config.gradient_accumulation_steps
        all_losses.append(losses.detach())
    # The gradients are summed over all ranks, so all ranks skip the same updates.
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    if accelerator.scaler is None:
        # Fused AdamW skips the update if this is 1, a mechanism for gradient scalers. Unlike an
        # `if`, it does not make the host wait for the device.
        found_inf = 1 - torch.isfinite(grad_norm).float()
        run.state.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    run.state.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.state.ema.step(run.state.unet.parameters())
    for average in run.state.averages:
        average.update(run.state.unet.parameters(), step + 1)
    if objective.timesteps.needs_losses:
        objective.timesteps.update(all_t, in_order_of_rows(all_losses, accelerator))
    return total_loss, grad_norm, all_t


def _to_device(run: Run, batch: Any, step: int, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Images and class labels on the device; label dropout replaces labels by NO_LABEL."""
    device, config = run.accelerator.device, run.config
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True), None
    x_0, labels = (part.to(device, non_blocking=True) for part in batch)
    dropped = dropped_labels(
        config.seed, step, run.batches.batch_size, config.class_dropout, device
    )
    return x_0, torch.where(dropped[rows], NO_LABEL, labels)


def _finish_update(run: Run, artifacts: Artifacts, progress: "_Progress", stopping: bool) -> bool:
    """Measure, log, save and draw what is due after an update.

    Args:
        run, artifacts, progress: the run, on every rank.
        stopping: whether a rank has received a signal or failed. What a stop leaves out is made up
            on resume, at the same update.
    Returns:
        whether the run stops here.
    """
    measured: dict[str, float] = {}
    measurements = [] if stopping else artifacts.due_measurements()
    for measure in measurements:
        measured |= measure()
    stopping = stopping or (bool(measurements) and run.stop.synchronize())
    ending = stopping or run.num_updates_left == 0
    saving = ending or run.is_due(run.config.checkpointing_steps)
    # Each checkpoint has an entry, so that the next one covers the updates since then.
    if saving or measurements or run.is_due(run.config.logging_steps):
        progress.log(measured)

    # The checkpoint comes before the grid, because drawing may fail, and after the snapshots,
    # because a resumed run removes later ones; the model includes the grid.
    artifacts.save_snapshots()
    if saving:
        artifacts.save_checkpoint(must_succeed=ending)
    if not stopping and artifacts.is_grid_due():
        artifacts.draw_samples()
        stopping = run.stop.synchronize()
        if stopping and not saving:
            saving = True
            progress.log({})
            artifacts.save_checkpoint(must_succeed=True)
    if saving:
        artifacts.export_model(must_succeed=ending)
    return stopping


class _Progress:
    """Metrics of the updates since the last log entry, for the log and the progress bar."""

    def __init__(self, run: Run, artifacts: Artifacts, log: MetricsLog, bar: "tqdm[Any]") -> None:
        self._run, self._artifacts, self._log, self._bar = run, artifacts, log, bar
        self._metrics, self._last_step = RunningMetrics(run.accelerator.device), run.state.step

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, t: Tensor) -> None:
        """Add the results of `train_step`."""
        self._metrics.add(step, loss, grad_norm, t)
        self._bar.update()

    def log(self, measured: Mapping[str, float]) -> None:
        """Write the entry of the current update, unless it is written.

        Raises:
            TrainingError: after many consecutive updates without a finite gradient.
        """
        run, step = self._run, self._run.state.step
        if step == self._last_step:
            return
        self._last_step = step
        values = self._metrics.read(run.accelerator)
        values |= {"learning_rate": learning_rate(run.config, step - 1), **measured}
        skipped = [SkippedUpdate(i + 1, run.image_indices(i), t) for i, t in self._metrics.skipped]
        with self._artifacts.warn_on_disk_error("log"):
            self._log.write(step, values, skipped)
        self._bar.set_postfix(_progress_values(values, self._artifacts.evaluated), refresh=False)
        num_skipped = self._metrics.skipped_in_a_row
        if num_skipped >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"no finite gradient in the last {num_skipped} updates, up to update {step}; the "
                "weights are those before them. Lower `learning_rate`, or set `mixed_precision` to "
                "bf16 or no"
            )


def _progress_bar(run: Run) -> "tqdm[Any]":
    return tqdm(
        initial=run.state.step,
        total=run.batches.stop,
        desc="training",
        unit="update",
        disable=not run.accelerator.is_main_process,
    )


def _progress_values(
    values: Mapping[str, float], evaluated: SampleFigures | None
) -> dict[str, str]:
    """The values at the end of the progress bar."""
    shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['learning_rate']:.2g}"}
    if evaluated is not None:
        shown |= {"fd": f"{evaluated.fd.value:.4g}", "copies": f"{evaluated.copies.value:.0%}"}
    skipped = int(values["skipped_updates"])
    return shown | ({"skipped": f"{skipped}"} if skipped else {})


def _raise_read_error(failure: Exception | None, run: Run) -> NoReturn:
    """Raise the same error on all ranks, with the reason of a rank that could not read images."""
    reason = str(failure) or type(failure).__name__ if failure else ""
    if failure and is_out_of_memory(failure):
        steps = 2 * run.config.gradient_accumulation_steps
        reason = f"out of memory: {reason}; resume with `gradient_accumulation_steps` {steps}"
    reasons = gather_object([reason])
    raise TrainingError(
        f"no images for update {run.state.step + 1}: {next(filter(None, reasons))}. The updates "
        "before it are saved; train again with the same options to resume"
    ) from failure
