"""The training program: options, run folder, components, plan, updates, and the result.

`loop` makes the updates.
"""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from PIL import Image

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
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.file_system import FileSystem
from ddpm_hf.training.loop import train_loop
from ddpm_hf.training.periodic_evaluation import build_evaluation
from ddpm_hf.training.plan import plan_training, summarize
from ddpm_hf.training.rank_coordination import (
    free_gradient_reducer,
    leave_to_launcher,
    on_main_process,
)
from ddpm_hf.training.resolve import implied_options, resume_options
from ddpm_hf.training.run import Run, start_run
from ddpm_hf.training.run_folder import run_lock
from ddpm_hf.training.run_log import open_log
from ddpm_hf.training.signals import StopSignal, is_under_a_launcher
from ddpm_hf.training.validation import Validation
from ddpm_hf.training.warm_up import warm_up

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
    paths, timeout_s = RunPaths(config.run_folder()), config.ddp_timeout
    with create_accelerator(config) as accelerator, ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        file_system, checkpoint = _open_run_folder(config, accelerator, stack)
        pusher = on_main_process(accelerator, partial(_create_pusher, config), timeout_s)

        # The complete configuration, the images and the network.
        record = None
        if checkpoint is not None:
            stack.enter_context(_no_advice())
            record = read_record(checkpoint)
            config = resume_options(config, record.config, record.parts)
        configure_compile(config.compile, accelerator)
        resolved, components = assemble(config, accelerator, unet, scheduler, dataset, loss, record)

        # The state of the run, and its plan.
        stop = stack.enter_context(StopSignal(timeout_s))
        stack.enter_context(leave_to_launcher(stop))
        stack.enter_context(resources_as_training_errors(accelerator))
        run = start_run(resolved, components, accelerator, stop, checkpoint, record)
        stack.callback(free_gradient_reducer, run.model)
        validation = Validation(run, components.held_out) if components.held_out else None
        evaluation = build_evaluation(run)
        accelerator.print(plan_training(run, validation, evaluation, warm_up(run), file_system))
        if config.dry_run:
            on_main_process(accelerator, lambda: print(describe_needs(run)), timeout_s)
            return TrainingResult(paths.model.root, paths.metrics, run.state.step)

        # The updates, and what is due between them.
        if accelerator.is_main_process:
            implied = implied_options(components.identity())
            write_text(paths.config, run.config.to_yaml(implied))
            remove_snapshots_after(paths.ema_snapshots, run.state.step)
        log = stack.enter_context(closing(open_log(run)))
        artifacts = Artifacts(run, log, pusher, validation, evaluation)
        is_caught_up = checkpoint is None or artifacts.catch_up()
        if run.num_updates_left == 0:
            artifacts.calibrate()
        elif is_caught_up:
            train_loop(run, artifacts, log)
        return _finish(run, pusher)


def _open_run_folder(
    config: TrainingConfig, accelerator: Accelerator, stack: ExitStack
) -> tuple[FileSystem | None, Path | None]:
    """Reserve the folder of the run until `stack` ends; a dry run writes to a temporary cache.

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
    newest = on_main_process(accelerator, lambda: find_checkpoint(paths.checkpoints), timeout_s)
    checkpoint: Path | None = broadcast_object_list([newest])[0]
    return file_system, checkpoint


def _create_pusher(config: TrainingConfig) -> BackgroundPusher | None:
    """The uploader, after a check of write access to the repository."""
    if config.push_to_hub is None or config.dry_run:
        return None
    pusher = BackgroundPusher(config.push_to_hub, public=config.public)
    pusher.check()
    return pusher


@contextmanager
def _no_advice() -> Iterator[None]:
    """Suppress our warnings, which a resumed run printed at its start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="ddpm_hf")
        yield


def _finish(run: Run, pusher: BackgroundPusher | None) -> TrainingResult:
    """Wait for the last push, and print what the run has done and the next steps."""
    stopped_by, paths, accelerator = run.stop.received, run.paths, run.accelerator
    pushed = on_main_process(
        accelerator, lambda: _finish_push(pusher, stopped_by), run.config.ddp_timeout
    )
    accelerator.wait_for_everyone()
    accelerator.print(summarize(run))
    if stopped_by == signal.SIGINT and hasattr(sys, "ps1"):  # set in interactive sessions only
        raise KeyboardInterrupt(f"saved after update {run.state.step}")
    return TrainingResult(paths.model.root, paths.metrics, run.state.step, stopped_by, pushed)


def _finish_push(pusher: BackgroundPusher | None, stopped_by: int | None) -> bool | None:
    """Wait for the last push and print its outcome; whether the model is on the Hub."""
    if pusher is None:
        return None
    pushed = pusher.finish(_LAST_PUSH_S if stopped_by is None else _LAST_PUSH_AFTER_SIGNAL_S)
    print(pusher.message)
    return pushed
