"""The Accelerator of a run, and the processes of its launch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    parse_flag_from_env,
)

from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError, TrainingError
from ddpm_hf.training.rank_coordination import (
    destroy_process_group,
    name_missing_ranks,
    roll_call_s,
)
from ddpm_hf.utils.backend_settings import is_out_of_memory
from ddpm_hf.utils.rendezvous import connection

# Launch modes of accelerate that shard the weights.
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


BYTES_PER_PARAMETER = 24
"""Weights, gradients, two moments, averages, and for a moment new gradient buckets, in float32."""


@contextmanager
def create_accelerator(config: TrainingConfig) -> Iterator[Accelerator]:
    """An Accelerator configured by the options.

    Its global state is reset at the end unless the caller created it, so that the next run in the
    same process (a notebook) can have another precision.

    Raises:
        ConfigError: for a precision that the device lacks, or a launch that shards the weights or
            leaves the processes unconnected.
        ProcessError: if another rank ends or hangs.
        TimeoutError: if another rank does not start.
    """
    is_ours = not AcceleratorState._shared_state
    _refuse_sharding()
    is_over = False
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            project_dir=config.run_folder(),
            kwargs_handlers=[
                InitProcessGroupKwargs(**connection(_timeout(config.ddp_timeout))),
                # Without it, each rank has a second copy of the gradients.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        _refuse_unconnected_processes(accelerator)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would silently train in float32.
            raise ConfigError("`mixed_precision` fp16 needs a GPU; on a CPU use bf16 or no")
        with name_missing_ranks(accelerator, config.ddp_timeout):
            yield accelerator
        is_over = True
    finally:
        destroy_process_group(after_error=not is_over)
        if is_ours:
            AcceleratorState._reset_state()


def join_processes(config: TrainingConfig) -> PartialState:
    """The processes of this launch, for work before training, such as preparing images.

    Raises:
        ConfigError: for a launch that shards the weights or leaves the processes unconnected.
        TimeoutError: if another process does not start.
    """
    _refuse_sharding()
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, **connection(_timeout(config.ddp_timeout)))
    _refuse_unconnected_processes(state)
    return state


def _timeout(ddp_timeout: float) -> timedelta:
    """Timeout of the process group, after which NCCL ends the process: later than our error."""
    margin_s = 2 * roll_call_s(ddp_timeout) if torch.accelerator.is_available() else 0.0
    return timedelta(seconds=ddp_timeout + margin_s)


def _refuse_sharding() -> None:
    for flag, name in _SHARDED.items():
        if parse_flag_from_env(flag):
            raise ConfigError(
                f"accelerate's configuration asks for {name}, which shards the weights; training "
                f"needs all of them on every rank, {BYTES_PER_PARAMETER} bytes per parameter with "
                "optimizer and averages: a GPU of 80 GB holds 2e9 parameters and activations. "
                "Choose multi-GPU (accelerate config), or launch with --multi_gpu"
            )


def _refuse_unconnected_processes(state: Accelerator | PartialState) -> None:
    """Accelerate connects CPU processes on request only; otherwise each would train by itself."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes == 1 and launched > 1:
        raise ConfigError(
            f"{launched} processes were launched, but they are not connected, because Accelerate "
            "sees no GPU; to train on CPUs, set ACCELERATE_USE_CPU=true before the launch"
        )


def configure_compile(requested: bool | None, accelerator: Accelerator) -> None:
    """Make `prepare` follow the option `compile`, if given, instead of accelerate's configuration.

    On a CPU, torch 2.13 loses the gradient of a nearest upsampling after a GroupNorm, unless
    Inductor keeps the memory format of convolutions.
    """
    if requested is None:
        return
    options = {"layout_optimization": False} if accelerator.device.type == "cpu" else None
    accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin("inductor", options=options) if requested else TorchDynamoPlugin("no")
    )


@contextmanager
def resources_as_training_errors(accelerator: Accelerator) -> Iterator[None]:
    """Turn out-of-memory and compiler errors into a TrainingError of one line with the fix."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise_compiler_error(error)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        steps = 2 * accelerator.gradient_accumulation_steps
        raise TrainingError(
            f"out of memory: {reason}. Resume with `gradient_accumulation_steps` {steps}, which "
            "halves the number of images in memory and keeps the batch"
        ) from error


def raise_compiler_error(error: Exception) -> NoReturn:
    """Raise a TrainingError for an error of the compiler; raise any other error unchanged."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        raise error
    reason = str(error).strip().partition("\n")[0]
    raise TrainingError(
        f"the network could not be compiled: {reason}; train it without `compile`"
    ) from error
