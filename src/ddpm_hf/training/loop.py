"""The training program: `train` prepares a run, `_train_loop` makes the updates."""

import dataclasses
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import UNet2DModel
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.backend_settings import is_out_of_memory
from ddpm_hf.diffusion.atomic_files import write_text
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.background_push import BackgroundPusher
from ddpm_hf.losses import Loss
from ddpm_hf.paths import RunPaths
from ddpm_hf.post_hoc_ema.snapshots import remove_snapshots_after
from ddpm_hf.training.accelerator import (
    configure_compile,
    create_accelerator,
    resources_as_training_errors,
)
from ddpm_hf.training.artifacts import Artifacts
from ddpm_hf.training.checkpoint_record import find_checkpoint, read_record
from ddpm_hf.training.components import assemble
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.dataset_setup import TrainingData
from ddpm_hf.training.dry_run import describe_needs, temporary_cache
from ddpm_hf.training.errors import ConfigError, TrainingError
from ddpm_hf.training.file_system import FileSystem
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.periodic_evaluation import build_evaluation
from ddpm_hf.training.plan import plan_training, summarize
from ddpm_hf.training.rank_coordination import (
    free_gradient_reducer,
    leave_to_launcher,
    on_main_process,
)
from ddpm_hf.training.read_ahead import ReadAhead, read_ahead
from ddpm_hf.training.resolve import implied_options, resume_options
from ddpm_hf.training.run import Run, start_run
from ddpm_hf.training.run_folder import remove_leftovers, run_lock
from ddpm_hf.training.run_log import MetricsLog, RunningMetrics, SkippedUpdate, open_log
from ddpm_hf.training.sample_figures import SampleFigures
from ddpm_hf.training.signals import StopSignal, is_under_a_launcher
from ddpm_hf.training.train_step import train_step
from ddpm_hf.training.validation import Validation
from ddpm_hf.training.warm_up import warm_up

# Consecutive updates without a finite gradient after which the run ends. In mixed precision a few
# are skipped at the start, while the loss scale settles.
_MAX_SKIPPED_IN_A_ROW = 20
_LAST_PUSH_S = 600
# After a signal little time is left before SIGKILL.
_LAST_PUSH_AFTER_SIGNAL_S = 10


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        model_dir: the portable checkpoint with the EMA weights.
        metrics_file: one JSON object per line, with step, loss, learning_rate, ...
        num_steps: number of updates, including earlier runs that this one resumed.
        stopped_by: number of the signal that ended the run before its last update, or None.
        pushed: whether the model is on the Hub; None if no push was requested, and on all ranks
            but the main process.
    """

    model_dir: Path
    metrics_file: Path
    num_steps: int
    stopped_by: int | None = None
    pushed: bool | None = None

    @property
    def samples(self) -> Image.Image | None:
        """The newest grid of samples, which notebooks show; None if none was drawn."""
        grid = RunPaths(self.model_dir.parent).newest_sample_grid()
        if grid is None:
            return None
        with Image.open(grid) as image:
            return image.convert("RGB")

    @property
    def exit_status(self) -> int:
        """0, 128 + the number of the stop signal, or 3 if the model could not be pushed.

        A stopped run ends with 0 under torchrun and `accelerate launch`, which report any other
        status as a crash.
        """
        if self.stopped_by is not None:
            return 0 if is_under_a_launcher() else 128 + self.stopped_by
        return 3 if self.pushed is False else 0


def train(
    config: TrainingConfig | None = None,
    *,
    unet: UNet2DModel | None = None,
    scheduler: GaussianDDPMScheduler | None = None,
    dataset: TrainingData | None = None,
    loss: Loss | None = None,
) -> TrainingResult:
    """Train a DDPM, or resume an interrupted run.

    Args:
        config: the options, by default those of `TrainingConfig()`. Open options are chosen from
            the images and the device.
        unet: network to train, instead of the one that `config` describes.
        scheduler: diffusion to train, instead of the one that `config` describes.
        dataset: images to train on, instead of `config.dataset`: a `datasets.Dataset`, the result
            of `prepare_images`, a map-style dataset of float tensors (C, H, W) in [-1, 1], or the
            result of `load_dataset(..., streaming=True)`, which is read as with `streaming`.
        loss: objective, instead of `config.objective`: a function `(denoiser, scheduler, x_0, t,
            noise)` as in `ddpm_hf.losses`, which returns one value per image, (B,). A resumed run
            must have a loss of the same name.
    Returns:
        the paths of the results and the number of updates.
    Raises:
        ConfigError: for options or components that are invalid or do not fit together.
        DataError: if the images cannot be used.
        CheckpointError: if `output_dir` is in use, cannot be written or contains other files, or if
            all its checkpoints are damaged.
        KeyboardInterrupt: after Ctrl-C in a notebook or another interactive session, once the run
            is saved. Elsewhere the result says which signal ended it.
        TimeoutError: if another process of the launch does not start.
        TrainingError: if the loss stays non-finite, images become unreadable, or memory runs out.
    """
    config = TrainingConfig() if config is None else config
    if not isinstance(config, TrainingConfig):
        raise ConfigError(
            f"`config` must be a TrainingConfig, got {config!r:.100}; for the usual options "
            "train(TrainingConfig(dataset='./photos'))"
        )
    paths = RunPaths(config.run_folder())
    with create_accelerator(config) as accelerator, ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        timeout_s = config.ddp_timeout

        file_system, checkpoint = _open_run_folder(config, accelerator, stack)
        record = None
        pusher = on_main_process(accelerator, partial(_create_pusher, config), timeout_s)
        if checkpoint is not None:
            stack.enter_context(_no_advice())
            record = read_record(checkpoint)
            config = resume_options(config, record.config, record.parts)
        configure_compile(config, accelerator)
        resolved, components = assemble(config, accelerator, unet, scheduler, dataset, loss, record)

        stop = stack.enter_context(StopSignal(config.ddp_timeout))
        stack.enter_context(leave_to_launcher(stop))
        stack.enter_context(resources_as_training_errors(accelerator))
        run = start_run(resolved, components, accelerator, stop, checkpoint)
        stack.callback(free_gradient_reducer, run.model)
        validation = Validation(run, components.held_out) if components.held_out else None
        evaluation = build_evaluation(run)
        update_s = warm_up(run)
        measurements = [m for m in (validation, evaluation) if m]
        accelerator.print(plan_training(run, measurements, update_s, file_system))
        if config.dry_run:
            on_main_process(accelerator, lambda: print(describe_needs(run)), timeout_s)
            return TrainingResult(paths.model.root, paths.metrics, run.state.step)
        if accelerator.is_main_process:
            recipe = run.config.to_yaml(implied_options(components.identity()))
            write_text(paths.config, recipe)
            remove_snapshots_after(paths.ema_snapshots, run.state.step)

        log = open_log(run)
        stack.callback(log.close)
        artifacts = Artifacts(run, log, pusher, validation, evaluation)
        _complete(run, artifacts, log)

        stopped_by = stop.received
        pushed = on_main_process(accelerator, lambda: _finish_push(pusher, stopped_by), timeout_s)
        accelerator.wait_for_everyone()
        accelerator.print(summarize(run))
        if stopped_by == signal.SIGINT and hasattr(sys, "ps1"):  # set in interactive sessions only
            raise KeyboardInterrupt(f"saved after update {run.state.step}")
        return TrainingResult(paths.model.root, paths.metrics, run.state.step, stopped_by, pushed)


def _open_run_folder(
    config: TrainingConfig, accelerator: Accelerator, stack: ExitStack
) -> tuple[FileSystem | None, Path | None]:
    """Reserve the folder of the run until `stack` ends.

    Returns:
        its file system, on the main process and not for a dry run, and the checkpoint to resume, on
        all ranks.
    """
    paths, timeout_s = RunPaths(config.run_folder()), config.ddp_timeout
    file_system: FileSystem | None = None
    if config.dry_run:
        stack.enter_context(temporary_cache(accelerator))
    else:
        lock = run_lock(paths)
        file_system = on_main_process(accelerator, lambda: stack.enter_context(lock), timeout_s)
        on_main_process(accelerator, lambda: _clean_up(paths), timeout_s)
    newest = on_main_process(accelerator, lambda: find_checkpoint(paths.checkpoints), timeout_s)
    checkpoint: Path | None = broadcast_object_list([newest])[0]
    return file_system, checkpoint


def _complete(run: Run, artifacts: Artifacts, log: MetricsLog) -> None:
    """Make up what an interruption left out, then make the remaining updates."""
    is_caught_up = run.checkpoint is None or artifacts.catch_up()
    if run.num_updates_left == 0:
        artifacts.calibrate()
    elif is_caught_up:
        # The bar is closed before any error is printed.
        with closing(read_ahead(run)) as reader, _progress_bar(run) as bar:
            _train_loop(run, reader, artifacts, log, bar)


def _train_loop(
    run: Run, reader: ReadAhead, artifacts: Artifacts, log: MetricsLog, bar: "tqdm[Any]"
) -> None:
    """Make every remaining update; log, measure, draw and save when due."""
    config, state, last_step = run.config, run.state, run.batches.stop
    # Another rank may be unable to read the images of the first update.
    run.stop.synchronize(failed=reader.failure is not None)
    if run.stop.failed:
        _raise_read_error(reader.failure, run)
    if change := run.threads.new_change:
        with artifacts.warn_on_disk_error("log"):
            log.append(dataclasses.asdict(change))
    metrics = RunningMetrics(run.accelerator.device)

    def write_log(measured: Mapping[str, float]) -> None:
        values = metrics.read(run.accelerator)
        values |= {"learning_rate": learning_rate(config, state.step - 1), **measured}
        with artifacts.warn_on_disk_error("log"):
            log.write(state.step, values, _describe_skipped(run, metrics))
        bar.set_postfix(_progress_values(values, artifacts.evaluated), refresh=False)

    run.model.train()
    for step in range(state.step, last_step):
        loss, grad_norm, t = train_step(run, reader.micro_batches, step)
        metrics.add(step, loss, grad_norm, t)
        state.step = step + 1
        bar.update()

        # All ranks stop after the same update.
        reader.advance()
        stopping = run.stop.synchronize(failed=reader.failure is not None)

        # Measure and log. What a stop leaves out is made up on resume, at the same update.
        measured: dict[str, float] = {}
        measurements = [] if stopping else artifacts.due_measurements(state.step == last_step)
        for measure in measurements:
            measured |= measure()
        stopping = stopping or (bool(measurements) and run.stop.synchronize())
        ending = stopping or state.step == last_step
        saving = ending or run.is_due(config.checkpointing_steps)
        # Each checkpoint has an entry, so that the next one covers the updates since then.
        logging = saving or bool(measurements) or run.is_due(config.logging_steps)
        if logging:
            write_log(measured)
            _check_gradients(metrics, state.step)

        # Save. The checkpoint comes before the grid, because drawing may fail, and after the
        # snapshots, because a resumed run removes later ones; the model includes the grid.
        artifacts.save_snapshots()
        if saving:
            artifacts.save_checkpoint(must_succeed=ending)
        if not stopping and artifacts.is_grid_due(ending):
            artifacts.draw_samples()
            stopping = run.stop.synchronize()
            if stopping and not saving:
                saving = True
                if not logging:
                    write_log({})
                artifacts.save_checkpoint(must_succeed=True)
        if saving:
            artifacts.export_model(must_succeed=ending)
        if stopping:
            break
        if ending:
            artifacts.calibrate()
    bar.close()
    # A signal of the terminal also ends the DataLoader workers, which is not an error.
    if run.stop.failed and run.stop.received is None:
        _raise_read_error(reader.failure, run)


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


def _describe_skipped(run: Run, metrics: RunningMetrics) -> list[SkippedUpdate]:
    return [SkippedUpdate(step + 1, run.image_indices(step), t) for step, t in metrics.skipped]


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


def _check_gradients(metrics: RunningMetrics, step: int) -> None:
    """Raise TrainingError after many consecutive updates without a finite gradient."""
    skipped = metrics.skipped_in_a_row
    if skipped >= _MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"no finite gradient in the last {skipped} updates, up to update {step}; the weights "
            "are those before them. Lower `learning_rate`, or set `mixed_precision` to bf16 or no"
        )


def _finish_push(pusher: BackgroundPusher | None, stopped_by: int | None) -> bool | None:
    """Wait for the last push and print its outcome; whether the model is on the Hub."""
    if pusher is None:
        return None
    pushed = pusher.finish(_LAST_PUSH_S if stopped_by is None else _LAST_PUSH_AFTER_SIGNAL_S)
    print(pusher.message)
    return pushed


def _create_pusher(config: TrainingConfig) -> BackgroundPusher | None:
    """The uploader, after a check of write access to the repository."""
    if config.push_to_hub is None or config.dry_run:
        return None
    pusher = BackgroundPusher(config.push_to_hub, public=config.public)
    pusher.check()
    return pusher


def _clean_up(paths: RunPaths) -> None:
    """Remove what a crash left."""
    remove_leftovers(paths.root)
    remove_leftovers(paths.checkpoints)


@contextmanager
def _no_advice() -> Iterator[None]:
    """Suppress our warnings, which a resumed run printed at its start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="ddpm_hf")
        yield
