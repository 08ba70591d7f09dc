"""State of one training run on this machine, new or resumed."""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DynamoBackend
from diffusers.training_utils import EMAModel
from torch import Tensor

from ddpm_hf.data.image_order import Batches
from ddpm_hf.diffusion.tensor_ops import Denoiser
from ddpm_hf.paths import RunPaths
from ddpm_hf.post_hoc_ema.profiles import SIGMA_RELS, PowerFunctionEMA
from ddpm_hf.run_record import Computation
from ddpm_hf.training.checkpoint_record import CheckpointRecord
from ddpm_hf.training.components import Components
from ddpm_hf.training.config import ResolvedConfig
from ddpm_hf.training.cpu_threads import CpuThreads
from ddpm_hf.training.errors import CheckpointError, ConfigError
from ddpm_hf.training.signals import StopSignal
from ddpm_hf.training.state import TrainState, read_tensors
from ddpm_hf.utils.backend_settings import is_channels_last, is_out_of_memory, tf32_operations


@dataclass
class Run:
    """Everything that the updates of a run use.

    Attributes:
        config: the complete options.
        components: images, network, diffusion and objective.
        accelerator: device, precision and ranks.
        stop: stop signals.
        state: weights, EMA weights, moments, and the number of updates done.
        model: the network as training calls it: compiled, or wrapped for several ranks.
        optimizer: the optimizer as training steps it.
        batches: this rank's share of the images of each update.
        threads: number of CPU threads.
        checkpoint: the checkpoint that the run resumed from, or None.
        record: of that checkpoint, or None.
    """

    config: ResolvedConfig
    components: Components
    accelerator: Accelerator
    stop: StopSignal
    state: TrainState
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    batches: Batches
    threads: CpuThreads
    checkpoint: Path | None = None
    record: CheckpointRecord | None = None
    _start: float = field(default_factory=time.monotonic, init=False)

    @property
    def paths(self) -> RunPaths:
        """Where the run writes its files."""
        return RunPaths(self.config.run_folder())

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass on this rank, which fit into the memory."""
        return len(self.batches.rows(0))

    @property
    def num_updates_left(self) -> int:
        """Number of updates that remain."""
        return self.batches.stop - self.state.step

    @property
    def elapsed_s(self) -> float:
        """Seconds of training in this process."""
        return time.monotonic() - self._start

    @property
    def total_elapsed_s(self) -> float:
        """Seconds of training, including earlier runs that this one resumed."""
        return self.elapsed_s + (self.record.elapsed_s if self.record else 0.0)

    @property
    def computation(self) -> Computation:
        """How the updates are computed."""
        plugin = self.accelerator.state.dynamo_plugin
        on_cuda = self.accelerator.device.type == "cuda"
        return Computation(
            mixed_precision=self.accelerator.mixed_precision,
            num_threads=None if on_cuda else torch.get_num_threads(),
            tf32=tuple(tf32_operations()) if on_cuda else None,
            compile=plugin.backend != DynamoBackend.NO,
            gradient_checkpointing=self.config.gradient_checkpointing,
            memory_format="channels_last" if is_channels_last(self.state.unet) else "contiguous",
            optimizer="fused AdamW",
        )

    def is_due(self, every: int) -> bool:
        """Whether the number of updates done is a multiple of `every`, or the last one."""
        return self.state.step % every == 0 or self.num_updates_left == 0

    def relative_cost(self, num_calls: int, every: int) -> float:
        """Cost of `num_calls` network calls every `every` updates, relative to the updates.

        A number of updates beyond the length of the run counts as one measurement, at its end.
        """
        every = min(every, self.config.max_train_steps)
        # An update costs about three forward passes per image.
        return num_calls / (3 * every * self.batches.batch_size)

    def denoiser(self, labels: Tensor | None, unet: Any = None) -> Denoiser:
        """The network as a function of (x_t, t), conditioned on class labels if there are any.

        Args:
            labels: class indices, (B,); -1 means unconditional, which is the last class embedding.
            unet: network to call instead of `model`.
        """
        unet = unet or self.model
        if labels is None:
            return unet  # type: ignore[no-any-return]
        config: Any = self.state.unet.config
        labels = torch.where(labels < 0, config.num_class_embeds - 1, labels)
        labels = labels.to(self.accelerator.device)
        return lambda x_t, t: unet(x_t, t, class_labels=labels)

    def image_indices(self, step: int) -> list[int]:
        """Indices in the dataset of the images of update `step`, over all ranks."""
        batch = dataclasses.replace(
            self.batches, start=step, stop=step + 1, rank=0, num_processes=1, accumulation=1
        )
        indices = [index for rows in batch for _, index in rows]
        return [self.components.images.dataset_index(index) for index in indices]

    def split_micro_batches(self, factor: int) -> None:
        """Split each micro-batch into `factor` smaller ones; sums are rounded differently."""
        steps = factor * self.config.gradient_accumulation_steps
        self.config = dataclasses.replace(self.config, gradient_accumulation_steps=steps)
        self.accelerator.gradient_accumulation_steps = steps
        self.batches = dataclasses.replace(self.batches, accumulation=steps)

    def checkpoint_record(self) -> CheckpointRecord:
        """The record of a checkpoint of the current state."""
        scaler = self.state.scaler
        return CheckpointRecord(
            config=self.config.to_dict(),
            parts=self.components.identity(),
            elapsed_s=self.total_elapsed_s,
            num_processes=self.accelerator.num_processes,
            num_threads=torch.get_num_threads(),
            step=self.state.step,
            ema_step=self.state.ema.optimization_step,
            scaler=None if scaler is None else scaler.state_dict(),
            num_threads_changes=self.threads.changes,
        )


def start_run(
    config: ResolvedConfig,
    components: Components,
    accelerator: Accelerator,
    stop: StopSignal,
    checkpoint: Path | None = None,
    record: CheckpointRecord | None = None,
) -> Run:
    """Prepare a run, with the state of `checkpoint` and its `record` if there is one.

    Raises:
        ConfigError: if the checkpoint has other components or more updates than requested.
        CheckpointError: if its tensors do not fit.
    """
    # The state keeps the network without wrappers, whose parameter names go into checkpoints.
    unet = components.unet.to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    sigma_rels = SIGMA_RELS if config.post_hoc_ema else ()
    averages = [PowerFunctionEMA(unet.parameters(), sigma_rel) for sigma_rel in sigma_rels]
    timesteps = components.objective.timesteps
    state = TrainState(unet, ema, optimizer, timesteps, accelerator.scaler, averages=averages)
    if checkpoint is not None and record is not None:
        _check_resumable(config, components, record)
        _restore(state, checkpoint, record)
    threads = CpuThreads(config.num_threads, record, accelerator)
    # After every check: the wrapper is freed by `free_gradient_reducer`, once there is a run.
    model, prepared_optimizer = accelerator.prepare(unet, optimizer)
    batches = Batches(
        num_images=len(components.images),
        seed=config.seed,
        batch_size=config.batch_size,
        start=state.step,
        stop=config.max_train_steps,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        accumulation=config.gradient_accumulation_steps,
        order=components.images.order,
    )
    return Run(
        config, components, accelerator, stop, state, model, prepared_optimizer, batches, threads,
        checkpoint, record,
    )  # fmt: skip


def _restore(state: TrainState, checkpoint: Path, record: CheckpointRecord) -> None:
    try:
        state.restore(read_tensors(checkpoint), record)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{checkpoint} does not hold the state of this run: {reason:.300}; move it away to"
            " resume from the one before"
        ) from None


def _check_resumable(
    config: ResolvedConfig, components: Components, record: CheckpointRecord
) -> None:
    folder, identity = config.run_folder(), json.loads(json.dumps(components.identity()))
    changed = [
        f"{part} {key}: {before!r:.200} -> {identity.get(part, {}).get(key)!r:.200}"
        for part, values in record.parts.items()
        for key, before in values.items()
        if identity.get(part, {}).get(key) != before
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other components ({'; '.join(changed)}); "
            + config.resume_hint()
        )
    if record.step > config.max_train_steps:
        raise ConfigError(
            f"`max_train_steps` is {config.max_train_steps}, but the run in {folder} has "
            f"{record.step} updates already; give at least that many, or another `output_dir`"
        )
