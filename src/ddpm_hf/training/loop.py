"""Training: `train` sets a run up, `_train_loop` makes its updates."""

import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data import read_batches
from ddpm_hf.data.labels import NO_LABEL
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.background_push import BackgroundPusher
from ddpm_hf.losses import Loss
from ddpm_hf.paths import RunPaths
from ddpm_hf.randomness import dropped_labels, noise_of_rows, seed_of, timestep_generator
from ddpm_hf.text import counted
from ddpm_hf.training.accelerator import (
    compile_as_asked,
    create_accelerator,
)
from ddpm_hf.training.artifacts import Outputs
from ddpm_hf.training.components import assemble
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError, TrainingError
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.objective import in_order_of_rows
from ddpm_hf.training.periodic_evaluation import build_evaluation
from ddpm_hf.training.plan import plan_training, summarize
from ddpm_hf.training.rank_coordination import free_gradient_reducer, on_main
from ddpm_hf.training.read_ahead import ReadAhead
from ddpm_hf.training.resolve import resume_options
from ddpm_hf.training.run import Run
from ddpm_hf.training.run_folder import remove_leftovers, run_lock
from ddpm_hf.training.run_log import MetricsLog, RunningMetrics
from ddpm_hf.training.signals import StopSignal, is_under_a_launcher
from ddpm_hf.training.state import find_checkpoint, read_facts
from ddpm_hf.training.validation import Validation
from ddpm_hf.training.warm_up import trial_pass, warm_up

# So many updates in a row without one finite gradient mean that the run is lost; a mixed-precision
# run skips a few at its start while the loss scale settles.
_MAX_SKIPPED_IN_A_ROW = 20
_LAST_PUSH_S = 600
# Whoever sends a signal waits only so long before killing.
_LAST_PUSH_AFTER_SIGNAL_S = 10


@dataclass(frozen=True)
class TrainingResult:
    """What a run left.

    Attributes:
        model_dir: the portable checkpoint with the averaged weights.
        metrics_file: one JSON object with step, loss, learning_rate, ... a line.
        num_steps: updates done in all, earlier runs in the same folder included.
        stopped_by: the signal that ended the run before its last step, or None.
        pushed: whether the model is on the Hub; None if that was not asked for, and on all but the
            main process.
    """

    model_dir: Path
    metrics_file: Path
    num_steps: int
    stopped_by: int | None = None
    pushed: bool | None = None

    @property
    def exit_status(self) -> int:
        """0; 128 + the signal's number; or 3 where the model is made but not pushed.

        A run that was stopped ends with 0 under torchrun and `accelerate launch` with many
        processes, which take anything else for a crash, and say so on a page.
        """
        if self.stopped_by is not None:
            return 0 if is_under_a_launcher() else 128 + self.stopped_by
        return 3 if self.pushed is False else 0


def train(
    config: TrainingConfig,
    *,
    unet: UNet2DModel | None = None,
    scheduler: GaussianDDPMScheduler | None = None,
    dataset: Any = None,
    loss: Loss | None = None,
) -> TrainingResult:
    """Train a DDPM, or resume a run that was interrupted.

    Args:
        config: the options; what is None is proposed from the data and the machine.
        unet: network to train instead of the one that `config` describes.
        scheduler: diffusion to train instead of the one that `config` describes.
        dataset: images instead of those that `config.dataset` names: a `datasets.Dataset`, the
            result of `prepare_images`, or any map-style data set of float tensors (C, H, W) in
            [-1, 1].
        loss: what an update minimises instead of `config.objective`: a function `(denoiser,
            scheduler, x_0, t, noise)` of the form of `ddpm_hf.losses`, which returns one value per
            image, (B,). A resumed run must share it; it is known by its name.
    Returns:
        where everything lies, and how far the run came.
    Raises:
        ConfigError: if an option, or the way the parts fit together, cannot work.
        DataError: if the images cannot be used.
        CheckpointError: if `output_dir` is in use, not writable or somebody else's, or if all its
            checkpoints are damaged.
        TrainingError: if the loss stays non-finite, or the accelerator's memory does not suffice.
    """
    if not isinstance(config, TrainingConfig):
        raise ConfigError(
            f"config must be a TrainingConfig, got {config!r:.100}; for the usual options "
            "train(TrainingConfig(dataset='./photos'))"
        )
    paths = RunPaths(config.run_folder())
    with create_accelerator(config) as accelerator, ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        wait_s = config.ddp_timeout
        on_main(accelerator, lambda: stack.enter_context(run_lock(paths)), wait_s)
        pusher = on_main(accelerator, lambda: _create_pusher(config), wait_s)
        found = on_main(accelerator, lambda: _checkpoint_to_resume(paths), wait_s)
        checkpoint = broadcast_object_list([found])[0]
        if checkpoint is not None:
            stack.enter_context(_warned_already())
            config = resume_options(config, read_facts(checkpoint)["config"])
        compile_as_asked(config, accelerator)
        resolved, components = assemble(config, accelerator, unet, scheduler, dataset, loss)
        stop = stack.enter_context(StopSignal(config.ddp_timeout))
        stack.enter_context(_resources_as_training_errors(accelerator))
        run = Run(resolved, components, accelerator, stop, checkpoint)
        stack.callback(free_gradient_reducer, run.model)
        validation = Validation(run, components.held_out) if components.held_out else None
        evaluation = build_evaluation(run)
        update_s = warm_up(run)
        measurements = [m for m in (validation, evaluation) if m]
        accelerator.print(plan_training(run, measurements, update_s))
        if accelerator.is_main_process:
            paths.config.write_text(run.config.to_yaml(), encoding="utf-8")
        log = MetricsLog(paths.metrics, accelerator, run.state.step)
        stack.callback(log.close)
        outputs = Outputs(run, log, pusher, validation, evaluation)
        if run.state.step == run.batches.stop:
            outputs.complete()
        else:
            source = read_batches(run.load_batches())
            ahead = ReadAhead(source, run.config.gradient_accumulation_steps)
            stack.callback(ahead.close)
            # However the updates end, the bar is closed before anything else is said.
            bar = stack.enter_context(_progress_bar(run))
            _train_loop(run, log, outputs, ahead, bar)
        return _finish(run, pusher)


def _progress_bar(run: Run) -> "tqdm[Any]":
    return tqdm(
        initial=run.state.step,
        total=run.batches.stop,
        desc="training",
        unit="update",
        disable=not run.accelerator.is_main_process,
    )


def _train_loop(
    run: Run, log: MetricsLog, outputs: Outputs, ahead: ReadAhead, bar: "tqdm[Any]"
) -> None:
    """Every update that is left, with what is due after each."""
    config, state, last = run.config, run.state, run.batches.stop
    run.stop.agreed(ahead.failure is not None)
    if run.stop.failed:
        _raise_on_all(ahead.failure, run)
    metrics, logged_step = RunningMetrics(run.accelerator.device), state.step
    run.model.train()
    for step in range(state.step, last):
        start = time.monotonic()
        metrics.add(step, *_update(run, ahead.batches, step))
        state.step = step + 1
        bar.update()
        if run.threads.should_be_chosen_again(time.monotonic() - start):
            number = run.threads.choose(partial(trial_pass, run))
            bar.write(f"updates are slow: {counted(number, 'thread')} from update {step + 2:,} on")
        ahead.advance()
        stopping = run.stop.agreed(ahead.failure is not None)
        ending = stopping or state.step == last
        saving = ending or run.is_due(config.checkpointing_steps)
        measurements = [] if stopping else outputs.due_measurements(ending)
        if ending or measurements or run.is_due(config.logging_steps):
            values = metrics.read(run.accelerator, state.step - logged_step)
            values["learning_rate"] = learning_rate(config, step)
            for measure in measurements:
                values |= measure()
            num_images = (state.step - logged_step) * run.batches.batch_size
            skipped = [run.describe_update(step, t) for step, t in metrics.skipped]
            with outputs.warn_on_disk_error("log"):
                log.write(state.step, values, num_images, skipped)
            logged_step = state.step
            bar.set_postfix(_shown(outputs.evaluated | values), refresh=False)
            _check_not_lost(metrics, state.step)
        if saving:
            outputs.save_checkpoint(must_succeed=ending)
        if not stopping and (ending or run.is_due(config.sample_steps)):
            outputs.draw_samples()
        if saving:
            outputs.export_model(must_succeed=ending)
        if stopping:
            break
        if ending:
            outputs.calibrate()
    bar.close()
    # A terminal that asks to stop stops the processes that read images, too.
    if run.stop.failed and run.stop.received is None:
        _raise_on_all(ahead.failure, run)


def _raise_on_all(failure: Exception | None, run: Run) -> NoReturn:
    """Raise the same error on every process, whichever of them could not read its images."""
    reasons = gather_object([f"{failure}" if failure else ""])
    raise TrainingError(
        f"no images for update {run.state.step + 1}: {next(filter(None, reasons))}. The updates "
        "before it are saved; the same command goes on from there"
    ) from failure


def _update(run: Run, images: list[Any], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer update, which a gradient that is not finite turns into none at all.

    Returns:
        loss and gradient norm, as scalars on the device, and the timesteps of the whole batch.
    """
    config, accelerator, batches = run.config, run.accelerator, run.batches
    scheduler, objective = run.components.scheduler, run.components.objective
    generator = timestep_generator(config.seed, step, accelerator.device)
    # Of the whole batch, on every process; the weights make up for timesteps drawn more often.
    all_t, weights = objective.timesteps.sample(batches.batch_size, generator, accelerator.device)
    total_loss, all_losses = torch.zeros((), device=accelerator.device), []
    for micro_step, batch in enumerate(images):
        rows = batches.rows(micro_step)
        here = slice(rows.start, rows.stop)
        x_0, labels = _on_device(run, batch, step, here)
        noise, t = noise_of_rows(config.seed, step, rows, like=x_0), all_t[here]
        # Dropout draws from the global generator.
        torch.manual_seed(seed_of(config.seed, "dropout", step, batches.rank, micro_step))
        with accelerator.accumulate(run.model):
            losses = objective.loss(run.denoiser(labels), scheduler, x_0, t, noise)  # (B,)
            loss = (losses * weights[here]).mean()
            accelerator.backward(loss)
        total_loss += loss.detach() / config.gradient_accumulation_steps
        all_losses.append(losses.detach())
    # Summed over all processes by now: they agree on what follows.
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    if accelerator.scaler is None:
        # The fused AdamW leaves weights and moments alone where this is 1, as a gradient scaler
        # asks it to; unlike an `if`, it does not make the host wait for the device.
        found_inf = 1 - torch.isfinite(grad_norm).float()
        run.state.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    run.state.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.state.ema.step(run.state.unet.parameters())
    if objective.timesteps.needs_losses:
        objective.timesteps.update(all_t, in_order_of_rows(all_losses, accelerator))
    return total_loss, grad_norm, all_t


def _on_device(run: Run, batch: Any, step: int, here: slice) -> tuple[Tensor, Tensor | None]:
    """Images on the device and their classes, if there are any, some of which are hidden."""
    device, config = run.accelerator.device, run.config
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True), None
    x_0, labels = (part.to(device, non_blocking=True) for part in batch)
    hidden = dropped_labels(config.seed, step, run.batches.batch_size, config.class_dropout, device)
    return x_0, torch.where(hidden[here], NO_LABEL, labels)


def _shown(values: dict[str, float]) -> dict[str, str]:
    """What stands beside the progress bar."""
    shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['learning_rate']:.2g}"}
    shown |= {"fd": f"{values['evaluation_fd']:.4g}"} if "evaluation_fd" in values else {}
    skipped = int(values["skipped_updates"])
    return shown | ({"skipped": f"{skipped}"} if skipped else {})


def _check_not_lost(metrics: RunningMetrics, step: int) -> None:
    skipped = metrics.skipped_in_a_row
    if skipped >= _MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"no finite gradient in the last {skipped} updates, up to update {step}; the weights "
            "are those before them. Lower learning_rate, or use bf16 or no mixed precision"
        )


def _finish(run: Run, pusher: BackgroundPusher | None) -> TrainingResult:
    """Wait for the last push and for the other processes, and say what there is now."""
    stopped_by = run.stop.received
    wait_s = _LAST_PUSH_S if stopped_by is None else _LAST_PUSH_AFTER_SIGNAL_S

    def last_push() -> bool | None:
        if pusher is None:
            return None
        pushed = pusher.finish(wait_s)
        print(pusher.message)
        return pushed

    pushed = on_main(run.accelerator, last_push, run.config.ddp_timeout)
    run.accelerator.wait_for_everyone()
    run.accelerator.print(summarize(run))
    return TrainingResult(
        model_dir=run.paths.model.root,
        metrics_file=run.paths.metrics,
        num_steps=run.state.step,
        stopped_by=stopped_by,
        pushed=pushed,
    )


def _create_pusher(config: TrainingConfig) -> BackgroundPusher | None:
    """The uploader, its right to write proven before anything else."""
    if config.push_to_hub is None:
        return None
    pusher = BackgroundPusher(config.push_to_hub, public=config.public)
    pusher.check()
    return pusher


def _checkpoint_to_resume(paths: RunPaths) -> Path | None:
    """The newest good checkpoint, after what a crash left is cleared away."""
    remove_leftovers(paths.root)
    remove_leftovers(paths.checkpoints)
    return find_checkpoint(paths.checkpoints)


@contextmanager
def _warned_already() -> Iterator[None]:
    """A run gives its advice when it begins, and not each time that it is resumed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="ddpm_hf")
        yield


@contextmanager
def _resources_as_training_errors(accelerator: Accelerator) -> Iterator[None]:
    """Where the memory, or the compiler, does not suffice: one line, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        steps = 2 * accelerator.gradient_accumulation_steps
        raise TrainingError(
            f"out of memory: {error}. The same command with gradient_accumulation_steps {steps} "
            "goes on with half as many images at once, and the same batch"
        ) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"the network could not be compiled: {reason}; train it with compile=False"
        ) from error
