"""The training program, top to bottom: `train` is the run, `train_step` the mathematics of one
micro-batch."""

import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddpm_hf.diffusion.arithmetic import Denoiser
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.background import BackgroundPusher
from ddpm_hf.hub.card import read_json
from ddpm_hf.losses import simple_loss
from ddpm_hf.pictures import draw_images, image_grid
from ddpm_hf.randomness import Batches, noise_and_timesteps, seed_of
from ddpm_hf.training.config import ConfigError, TrainingConfig, continued, required
from ddpm_hf.training.engine import engine_of, learning_rate_of, with_precision
from ddpm_hf.training.export import export_model, training_facts
from ddpm_hf.training.folder import run_lock, sweep
from ddpm_hf.training.parts import Parts, assemble
from ddpm_hf.training.processes import on_main
from ddpm_hf.training.report import Journal, describe, duration, outcome
from ddpm_hf.training.signals import StopSignal
from ddpm_hf.training.state import (
    TrainState,
    find_checkpoint,
    read_checkpoint,
    read_facts,
    save_checkpoint,
)

logger = logging.getLogger(__name__)

# So many updates in a row without one finite gradient mean that the run is lost; a mixed-precision
# run skips a few at its start while the loss scale settles.
_MAX_SKIPPED_IN_A_ROW = 20
_UPDATES_WORTH_AN_ESTIMATE = 100
_LAST_PUSH_S = 600


class TrainingError(RuntimeError):
    """A run that cannot go on; its last checkpoint is good."""


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
        """0; 128 + the signal's number; or 3 where the model is made but not pushed."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        return 3 if self.pushed is False else 0


def train_step(
    denoiser: Denoiser,
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
) -> Tensor:
    """Losses of some rows of a batch; they depend on nothing but the arguments.

    Args:
        denoiser: the network.
        scheduler: the diffusion.
        x_0: images in [-1, 1], (B, C, H, W).
        seed: the run's seed.
        step: the update, from 0.
        rows: which rows of the whole batch `x_0` holds.
        batch_size: rows of the whole batch.
    Returns:
        (B,), unreduced.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    noise, t = noise_and_timesteps(seed, step, rows, batch_size, x_0, num_train_timesteps)
    return simple_loss(denoiser, scheduler, x_0, t, noise)


def train(
    config: TrainingConfig,
    *,
    unet: UNet2DModel | None = None,
    scheduler: GaussianDDPMScheduler | None = None,
    dataset: Any = None,
) -> TrainingResult:
    """Train a DDPM, or go on with a run that was interrupted.

    Args:
        config: the options; what is None is proposed from the data and the machine.
        unet: network to train instead of the one that `config` describes.
        scheduler: diffusion to train instead of the one that `config` describes.
        dataset: images instead of those that `config.dataset` names: a `datasets.Dataset`, the
            result of `prepare_images`, or any map-style data set of float tensors (C, H, W) in
            [-1, 1].
    Returns:
        where everything lies, and how far the run came.
    Raises:
        ConfigError: if an option, or the way the parts fit together, cannot work.
        DataError: if the images cannot be used.
        CheckpointError: if `output_dir` is in use, not writable or somebody else's, or if all its
            checkpoints are damaged.
        TrainingError: if the loss stays non-finite, or the accelerator's memory does not suffice.
    """
    folder = config.run_folder()
    with engine_of(config) as accelerator, ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(run_lock(folder)))
        pusher = on_main(accelerator, lambda: _pusher(config))
        found = [on_main(accelerator, lambda: _find(folder))]
        checkpoint = broadcast_object_list(found)[0]
        if checkpoint is not None:
            config = continued(config, read_facts(checkpoint)["config"])
        config = with_precision(config, accelerator)
        parts = assemble(config, accelerator, unet, scheduler, dataset)
        with StopSignal() as stop:
            try:
                return Run(parts, accelerator, stop, checkpoint, pusher).to_the_end()
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of memory: {error}. The same command with gradient_accumulation_steps "
                    f"{2 * config.gradient_accumulation_steps} goes on with half as many images at "
                    "once, and the same batch"
                ) from error


class Run:
    """One run in its folder: the parts, the state, and the loop over the updates."""

    def __init__(
        self,
        parts: Parts,
        accelerator: Accelerator,
        stop: StopSignal,
        checkpoint: Path | None,
        pusher: BackgroundPusher | None,
    ) -> None:
        self.parts, self.config = parts, parts.config
        self.accelerator, self.stop, self.pusher = accelerator, stop, pusher
        self.folder = parts.config.run_folder()
        optimizer = torch.optim.AdamW(
            parts.unet.parameters(),
            lr=required(self.config.learning_rate),
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.learning_rate = learning_rate_of(self.config, optimizer)
        self.unet, self.optimizer = accelerator.prepare(parts.unet, optimizer)
        unet = accelerator.unwrap_model(self.unet)
        ema = EMAModel(unet.parameters(), decay=self.config.ema_decay, foreach=True)
        self.state = TrainState(unet, ema, optimizer, accelerator.scaler)
        self.elapsed_s = 0.0
        if checkpoint is not None:
            self._resume(checkpoint)
        self.batches = Batches(
            num_images=len(parts.images),
            seed=self.config.seed,
            batch_size=required(self.config.batch_size),
            start=self.state.step,
            stop=required(self.config.max_train_steps),
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            accumulation=self.config.gradient_accumulation_steps,
        )
        self.journal = Journal(self.folder, accelerator, self.state.step)
        # Loss and gradient norm summed over the finite updates, and their number, since the last
        # log entry: kept on the device and read when they are logged.
        self.totals = torch.zeros(3, device=accelerator.device)
        self.skipped_in_a_row = torch.zeros((), device=accelerator.device)
        self.logged_step = self.state.step
        self.began = time.monotonic()

    def to_the_end(self) -> TrainingResult:
        """Every update that is left, with what is due after each."""
        config, last = self.config, self.batches.stop
        self._announce()
        images = iter(self._loader())
        bar = self._progress_bar()
        self.unet.train()
        if self.state.step == last:
            self._make_up_for_the_end()
        for step in range(self.state.step, last):
            self._update(images, step)
            self.state.step = step + 1
            bar.update()
            stopping = self.stop.agreed()
            ending = stopping or self.state.step == last
            saving = ending or self._due(config.checkpointing_steps)
            if ending or self._due(config.logging_steps):
                bar.set_postfix(self._log(), refresh=False)
            if saving:
                self._save(must_succeed=ending)
            if not stopping and (ending or self._due(config.sample_steps)):
                self._draw_samples()
            if saving:
                self._export(must_succeed=ending)
            if stopping:
                break
        bar.close()
        return self._finish()

    def _update(self, images: Iterator[Tensor], step: int) -> None:
        """One optimizer update, which a gradient that is not finite turns into none at all."""
        config, accelerator, batches = self.config, self.accelerator, self.batches
        loss = torch.zeros((), device=accelerator.device)
        for micro_step in range(config.gradient_accumulation_steps):
            x_0 = next(images).to(accelerator.device, non_blocking=True)
            # Dropout draws from the global generator.
            torch.manual_seed(seed_of(config.seed, "dropout", step, batches.rank, micro_step))
            with accelerator.accumulate(self.unet):
                losses = train_step(
                    self.unet,
                    self.parts.scheduler,
                    x_0,
                    config.seed,
                    step,
                    batches.rows(micro_step),
                    batches.batch_size,
                )
                accelerator.backward(losses.mean())
            loss += losses.detach().mean() / config.gradient_accumulation_steps
        # Summed over all processes by now: they agree on what follows.
        norm = accelerator.clip_grad_norm_(self.unet.parameters(), config.max_grad_norm)
        finite = torch.isfinite(norm)
        if accelerator.scaler is None:
            # The fused AdamW leaves weights and moments alone where this is 1, as a gradient
            # scaler asks it to; unlike an `if`, it does not make the host wait for the device.
            self.state.optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self.state.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.ema.step(self.state.unet.parameters())
        measured = torch.stack([loss, norm, torch.ones_like(loss)])
        self.totals += torch.where(finite, measured, 0.0)
        self.skipped_in_a_row = torch.where(finite, 0.0, self.skipped_in_a_row + 1)

    def _log(self) -> dict[str, str]:
        """Read what the device has summed, write it down, and stop a run that is lost."""
        totals = self.accelerator.reduce(self.totals, reduction="mean")
        loss, norm, count = totals.tolist()
        updates = self.state.step - self.logged_step
        values = {
            "loss": loss / count if count else math.nan,
            "grad_norm": norm / count if count else math.nan,
            "learning_rate": self.learning_rate(self.state.step - 1),
            "skipped_updates": updates - round(count),
        }
        self.totals.zero_()
        self.logged_step = self.state.step
        with self._going_on("log"):
            self.journal.write(self.state.step, values, updates * self.batches.batch_size)
        if int(self.skipped_in_a_row) >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"no finite gradient in the last {int(self.skipped_in_a_row)} updates, up to "
                f"update {self.state.step}; the weights are those before them. Lower "
                "learning_rate, or use bf16 or no mixed precision"
            )
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['learning_rate']:.2g}"}
        skipped = {"skipped": values["skipped_updates"]} if values["skipped_updates"] else {}
        return shown | skipped

    def _draw_samples(self) -> None:
        """A grid from the averaged weights; every process draws its share."""
        config, accelerator = self.config, self.accelerator
        if config.num_samples == 0:
            return
        share = -(-config.num_samples // accelerator.num_processes)
        first = accelerator.process_index * share
        with self.state.ema_weights() as unet:
            # A copy: sampling with fewer steps changes what "previous step" means.
            scheduler = copy.deepcopy(self.parts.scheduler)
            pipeline = GaussianDDPMPipeline(unet=unet, scheduler=scheduler)
            drawn = draw_images(
                pipeline,
                share,
                first=first,
                batch_size=len(self.batches.rows(0)),  # training it fits in memory, so drawing does
                seed=config.seed,
                progress=accelerator.is_main_process,
                num_inference_steps=min(
                    config.sample_inference_steps, scheduler.config.num_train_timesteps
                ),
                eta=0.0,
                callback_on_step_end=self._interrupt_if_stopped,
            )
        images = gather_object([] if self.stop.received else drawn)
        if accelerator.is_main_process and len(images) >= config.num_samples:
            grid = image_grid(images[: config.num_samples])
            path = self.folder / "samples" / f"step-{self.state.step:08d}.png"
            with self._going_on("draw samples"):
                path.parent.mkdir(exist_ok=True)
                grid.save(path)
                self.journal.show(self.state.step, grid)

    def _interrupt_if_stopped(
        self, pipeline: Any, i: int, t: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pipeline._interrupt = self.stop.received is not None
        return tensors

    def _save(self, must_succeed: bool) -> None:
        """The checkpoint to go on from; a full disk does not end a run that can still go on."""
        if not self.accelerator.is_main_process:
            return
        facts = {
            "config": dataclasses.asdict(self.config),
            "parts": self.parts.identity(),
            "elapsed_s": self._elapsed_s(),
            "num_processes": self.accelerator.num_processes,
        }
        keep = self.config.checkpoints_total_limit
        with self._going_on("save", unless=must_succeed):
            save_checkpoint(self.folder / "checkpoints", self.state, facts, keep)

    def _export(self, must_succeed: bool) -> None:
        """The portable model, which is also what is pushed."""
        if not self.accelerator.is_main_process:
            return
        story = training_facts(self.parts, self.accelerator, self.state.step, self._elapsed_s())
        with self._going_on("export the model", unless=must_succeed):
            model = export_model(self.folder, self.parts, self.state, story)
            if self.pusher is not None:
                self.pusher.submit(model, self.state.step)

    def _make_up_for_the_end(self) -> None:
        """What a run that was cut short after its last checkpoint has left undone."""
        model = self.folder / "model"
        is_exported = read_json(model / "training.json").get("steps") == self.state.step
        if not broadcast_object_list([is_exported])[0]:
            self._draw_samples()
            self._export(must_succeed=True)
        elif self.pusher is not None:
            self.pusher.submit(model, self.state.step)

    def _elapsed_s(self) -> float:
        return self.elapsed_s + time.monotonic() - self.began

    @contextmanager
    def _going_on(self, what: str, unless: bool = False) -> Iterator[None]:
        """Turn what the disk refuses into a warning, unless it must succeed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            failure = f"could not {what} at update {self.state.step}: {error}"
            if unless:
                raise OSError(failure) from error
            logger.warning("%s; training goes on", failure)

    def _resume(self, checkpoint: Path) -> None:
        tensors, facts = read_checkpoint(checkpoint)
        now = json.loads(json.dumps(self.parts.identity()))
        changed = [
            f"{part} {key}: {before!r:.200} -> {now[part].get(key)!r:.200}"
            for part, values in facts["parts"].items()
            for key, before in values.items()
            if now[part].get(key) != before
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run of other parts ({'; '.join(changed)}); resume with the "
                "same ones, or choose another output_dir"
            )
        if facts["step"] > required(self.config.max_train_steps):
            raise ConfigError(
                f"max_train_steps is {self.config.max_train_steps}, but {self.folder} holds a run "
                f"of {facts['step']} updates already"
            )
        self.state.restore(tensors, facts)
        self.elapsed_s = facts["elapsed_s"]
        self.accelerator.print(f"resuming after update {self.state.step}, from {checkpoint}")

    def _announce(self) -> None:
        """Say what is about to happen and how long it will take."""
        parts, accelerator = self.parts, self.accelerator
        accelerator.print(
            describe(
                self.config,
                parts.facts,
                len(parts.images),
                self.state.unet,
                parts.scheduler,
                accelerator,
            )
        )
        updates = self.batches.stop - self.state.step
        if updates > _UPDATES_WORTH_AN_ESTIMATE:
            seconds = self._seconds_per_update()
            accelerator.print(
                f"time       about {duration(updates * seconds)} ({seconds:.2g} s an update); "
                "stop at any time with Ctrl-C, run the same command again to go on"
            )
        if accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")

    def _seconds_per_update(self) -> float:
        """Time of an update, measured on one that leaves no trace."""
        size = len(self.batches.rows(0))
        x_0 = torch.zeros(size, *self.parts.images[0, 0].shape, device=self.accelerator.device)
        rows = range(size)
        times = []
        for _ in range(2):  # the first one warms up
            start = time.monotonic()
            with self.accelerator.no_sync(self.unet):
                losses = train_step(self.unet, self.parts.scheduler, x_0, 0, 0, rows, size)
                torch.autograd.backward(losses.mean())
            self.state.unet.zero_grad(set_to_none=True)
            losses[0].item()  # waits for the device
            times.append(time.monotonic() - start)
        return times[-1] * self.config.gradient_accumulation_steps

    def _loader(self) -> DataLoader[Tensor]:
        on_cpu = self.accelerator.device.type == "cpu"
        workers = self.config.dataloader_num_workers
        return DataLoader(
            self.parts.images,
            batch_sampler=self.batches,
            num_workers=(0 if on_cpu else 4) if workers is None else workers,
            pin_memory=not on_cpu,
        )

    def _progress_bar(self) -> "tqdm[Any]":
        return tqdm(
            initial=self.state.step,
            total=self.batches.stop,
            desc="training",
            unit="update",
            disable=not self.accelerator.is_main_process,
        )

    def _due(self, every: int | None) -> bool:
        return self.state.step % required(every) == 0

    def _finish(self) -> TrainingResult:
        pushed = None
        if self.pusher is not None:
            # Whoever sends a signal waits only so long before killing.
            pushed = self.pusher.finish(_LAST_PUSH_S if self.stop.received is None else 10)
            print(self.pusher.message)
        self.accelerator.wait_for_everyone()
        self.journal.close()
        took = time.monotonic() - self.began
        self.accelerator.print(
            outcome(self.config, self.state.step, took, stopped=self.stop.received is not None)
        )
        return TrainingResult(
            model_dir=self.folder / "model",
            metrics_file=self.folder / "metrics.jsonl",
            num_steps=self.state.step,
            stopped_by=self.stop.received,
            pushed=pushed,
        )


def _pusher(config: TrainingConfig) -> BackgroundPusher | None:
    """The uploader, its right to write proven before anything else."""
    if config.push_to_hub is None:
        return None
    pusher = BackgroundPusher(config.push_to_hub, public=config.public)
    pusher.check()
    return pusher


def _find(folder: Path) -> Path | None:
    """The checkpoint to resume from, after what a crash left is swept up."""
    sweep(folder)
    sweep(folder / "checkpoints")
    return find_checkpoint(folder / "checkpoints")
