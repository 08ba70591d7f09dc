"""The Accelerator of one run."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, is_tensorboard_available

from ddpm_hf.training.config import ConfigError, TrainingConfig


@contextmanager
def create_accelerator(config: TrainingConfig) -> Iterator[Accelerator]:
    """An Accelerator as the options ask for it.

    Its state is global; it is reset at the end unless the caller had made it, so that the next run
    in the same process (a notebook) may have another precision.

    Raises:
        ConfigError: for a precision that the machine does not have.
    """
    is_ours = not AcceleratorState._shared_state
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=available_trackers() or None,
            project_dir=config.run_folder(),
        )
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would train in float32 without a word.
            raise ConfigError("mixed_precision fp16 needs a GPU; on the CPU choose bf16 or no")
        yield accelerator
    finally:
        if is_ours:
            AcceleratorState._reset_state()


def available_trackers() -> list[str]:
    """The experiment trackers that are installed."""
    return ["tensorboard"] if is_tensorboard_available() else []


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
