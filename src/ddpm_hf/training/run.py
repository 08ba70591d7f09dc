"""One run of training: its parts, made ready for this machine, and how far it has come."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from ddpm_hf.diffusion.speed import is_channels_last, tf32_operations
from ddpm_hf.diffusion.tensor_ops import Denoiser
from ddpm_hf.paths import RunPaths
from ddpm_hf.randomness import Batches
from ddpm_hf.training.components import Components
from ddpm_hf.training.config import ResolvedConfig
from ddpm_hf.training.cpu_threads import Threads
from ddpm_hf.training.dataset_setup import Selection
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.signals import StopSignal
from ddpm_hf.training.state import TrainState, read_checkpoint


class Run:
    """What the updates work on.

    Args:
        config: complete configuration.
        components: images, network, scheduler and objective.
        accelerator: the machine.
        stop: tells whether somebody asked the run to end.
        checkpoint: to resume from, if any.

    Attributes:
        state: weights, their average, moments, and the number of updates done.
        model: the network to call in training, wrapped for many processes.
        threads: how many threads of the CPU share an operation.
        optimizer: the optimizer to step, wrapped likewise.
        batches: which images each update sees.
        paths: where everything is written.

    Raises:
        ConfigError: if the checkpoint is of a run of other parts, or of a longer one.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        components: Components,
        accelerator: Accelerator,
        stop: StopSignal,
        checkpoint: Path | None,
    ) -> None:
        self.config, self.components = config, components
        self.accelerator, self.stop, self.checkpoint = accelerator, stop, checkpoint
        self.paths = RunPaths(config.run_folder())
        optimizer = torch.optim.AdamW(
            components.unet.parameters(),
            lr=config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        # The plain network, whatever wraps or compiles it for training: its keys are what is kept.
        unet = components.unet.to(accelerator.device)
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        ema = EMAModel(unet.parameters(), decay=self.config.ema_decay, foreach=True)
        self.state = TrainState(
            unet, ema, optimizer, components.objective.timesteps, accelerator.scaler
        )
        self._began, self._elapsed_before_s = time.monotonic(), 0.0
        before = self._resume(checkpoint) if checkpoint is not None else {}
        self.threads = Threads(self.config.num_threads, before.get("num_threads"), accelerator)
        # Nothing fails from here on that would leave the wrapper to itself.
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.batches = Batches(
            num_images=len(components.images),
            seed=self.config.seed,
            batch_size=config.batch_size,
            start=self.state.step,
            stop=config.max_train_steps,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            accumulation=self.config.gradient_accumulation_steps,
        )

    def split_micro_batches(self, factor: int) -> None:
        """Take the same batches in `factor` times as many passes; sums are rounded differently."""
        steps = factor * self.config.gradient_accumulation_steps
        self.config = dataclasses.replace(self.config, gradient_accumulation_steps=steps)
        self.accelerator.gradient_accumulation_steps = steps
        self.batches = dataclasses.replace(self.batches, accumulation=steps)

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """Take over what the checkpoint holds; its facts."""
        tensors, facts = read_checkpoint(checkpoint)
        now = json.loads(json.dumps(self.components.identity()))
        changed = [
            f"{part} {key}: {before!r:.200} -> {now.get(part, {}).get(key)!r:.200}"
            for part, values in facts["parts"].items()
            for key, before in values.items()
            if now.get(part, {}).get(key) != before
        ]
        if changed:
            raise ConfigError(
                f"{self.paths.root} holds a run of other parts ({'; '.join(changed)}); "
                + self.config.resume_hint()
            )
        if facts["step"] > self.config.max_train_steps:
            raise ConfigError(
                f"max_train_steps is {self.config.max_train_steps}, but {self.paths.root} holds a "
                f"run of {facts['step']} updates already"
            )
        self.state.restore(tensors, facts)
        self._elapsed_before_s = facts["elapsed_s"]
        return facts

    def load_batches(self) -> DataLoader[Tensor]:
        """This process's share of every micro-batch that is left, in order."""
        on_cpu = self.accelerator.device.type == "cpu"
        workers = self.config.dataloader_num_workers
        return DataLoader(
            self.components.images,
            batch_sampler=self.batches,
            num_workers=(0 if on_cpu else 4) if workers is None else workers,
            pin_memory=not on_cpu,
        )

    def denoiser(self, labels: Tensor | None, unet: Any = None) -> Denoiser:
        """The network as a function of (x_t, t), given the classes (B,) if there are any.

        Args:
            labels: -1 stands for no class, which is the last embedding.
            unet: in place of the network in training.
        """
        unet = unet or self.model
        if labels is None:
            return unet  # type: ignore[no-any-return]
        config: Any = self.state.unet.config
        none = config.num_class_embeds - 1
        labels = torch.where(labels < 0, none, labels).to(self.accelerator.device)
        return lambda x_t, t: unet(x_t, t, class_labels=labels)

    def describe_update(self, step: int, t: list[int]) -> dict[str, Any]:
        """Which update `step` (from 0) is, and what its batch holds on all processes.

        Args:
            step: the update.
            t: the timesteps of its batch.
        """
        whole = dataclasses.replace(
            self.batches, start=step, stop=step + 1, rank=0, num_processes=1, accumulation=1
        )
        images = self.components.images
        rows = [index for batch in whole for _, index in batch]
        if isinstance(images, Selection):
            rows = [images.indices[index] for index in rows]
        return {"step": step + 1, "rows": rows, "timesteps": t}

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many updates happens after this one."""
        return self.state.step % every == 0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training since this process began with it."""
        return time.monotonic() - self._began

    @property
    def total_elapsed_s(self) -> float:
        """Seconds of training, those of the interrupted runs before included."""
        return self._elapsed_before_s + self.elapsed_s

    def computation(self) -> dict[str, Any]:
        """How updates are computed: as was asked for, proposed, or chosen by measuring."""
        device, plugin = self.accelerator.device.type, self.accelerator.state.dynamo_plugin
        on_device: dict[str, Any] = {"num_threads": torch.get_num_threads()}
        if device == "cuda":
            on_device = {"tf32": tf32_operations()}
        return {
            "mixed_precision": self.accelerator.mixed_precision,
            **on_device,
            "compile": plugin.backend != DynamoBackend.NO,
            "gradient_checkpointing": self.config.gradient_checkpointing,
            "memory_format": "channels_last" if is_channels_last(self.state.unet) else "contiguous",
            "optimizer": "fused AdamW",
        }

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside its state."""
        return {
            "config": self.config.to_dict(),
            "parts": self.components.identity(),
            "elapsed_s": self.total_elapsed_s,
            "num_processes": self.accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
        }
