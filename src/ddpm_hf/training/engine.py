"""Accelerate's engine, and what of the training follows from it and from the options alone."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from transformers import get_scheduler

from ddpm_hf.training.config import ConfigError, TrainingConfig, required
from ddpm_hf.training.report import trackers


@contextmanager
def engine_of(config: TrainingConfig) -> Iterator[Accelerator]:
    """Accelerate's engine for one run.

    Its state is global; it is forgotten at the end unless the caller had made it, so that the next
    run in the same process (a notebook) may have another precision.
    """
    ours = not AcceleratorState._shared_state
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=trackers() or None,
            project_dir=config.run_folder(),
        )
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would train in float32 without a word.
            raise ConfigError("mixed_precision fp16 needs a GPU; on the CPU choose bf16 or no")
        yield accelerator
    finally:
        if ours:
            AcceleratorState._reset_state()


def with_precision(config: TrainingConfig, accelerator: Accelerator) -> TrainingConfig:
    """`config` with the precision that Accelerate settled on, which a resumed run must share."""
    precision = accelerator.mixed_precision
    if config.mixed_precision not in (None, precision):
        raise ConfigError(
            f"{config.run_folder()} holds a run with mixed_precision {config.mixed_precision}, but "
            f"accelerate's configuration says {precision}; pass mixed_precision="
            f"{config.mixed_precision}, or choose another output_dir"
        )
    return dataclasses.replace(config, mixed_precision=precision)


def learning_rate_of(
    config: TrainingConfig, optimizer: torch.optim.Optimizer
) -> Callable[[int], float]:
    """The learning rate as a function of the update, so that there is nothing to save."""
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    peak, factor = required(config.learning_rate), schedule.lr_lambdas[0]
    return lambda step: peak * float(factor(step))
