"""The Accelerator of one run, and the processes that it works with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    is_tensorboard_available,
    parse_flag_from_env,
)

from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.rank_coordination import (
    leave_process_group,
    name_missing_processes,
    roll_call_s,
)

# Ways of `accelerate launch` that leave each process a part of the weights.
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@contextmanager
def create_accelerator(config: TrainingConfig) -> Iterator[Accelerator]:
    """An Accelerator as the options ask for it.

    Its state is global; it is reset at the end unless the caller had made it, so that the next run
    in the same process (a notebook) may have another precision.

    Raises:
        ConfigError: for a precision that the machine does not have, or a launch that shards or
            leaves the processes alone.
        ProcessError: if another process of the run does not answer any more.
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
            log_with=available_trackers() or None,
            project_dir=config.run_folder(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_timeout(config))],
        )
        _refuse_lone_processes(accelerator)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would train in float32 without a word.
            raise ConfigError("mixed_precision fp16 needs a GPU; on the CPU choose bf16 or no")
        with name_missing_processes(accelerator, config.ddp_timeout):
            yield accelerator
        is_over = True
    finally:
        leave_process_group(after_error=not is_over)
        if is_ours:
            AcceleratorState._reset_state()


def join_processes(config: TrainingConfig) -> PartialState:
    """The processes of this launch, for what comes before training.

    Raises:
        ConfigError: for a launch that shards the weights, or leaves the processes alone.
    """
    _refuse_sharding()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_timeout(config))
    _refuse_lone_processes(state)
    return state


def _timeout(config: TrainingConfig) -> timedelta:
    """Of the process group: NCCL ends a process by it, which shall first have said why."""
    return timedelta(seconds=config.ddp_timeout + 2 * roll_call_s(config.ddp_timeout))


def _refuse_sharding() -> None:
    for flag, name in _SHARDED.items():
        if parse_flag_from_env(flag):
            raise ConfigError(
                f"accelerate's configuration asks for {name}, which gives every process a part of "
                "the weights; here each one has all of them: choose multi-GPU (accelerate config), "
                "or launch with --multi_gpu"
            )


def _refuse_lone_processes(state: Accelerator | PartialState) -> None:
    """Accelerate connects CPUs only when told to; without, each process would train by itself."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes == 1 and launched > 1:
        raise ConfigError(
            f"{launched} processes were launched, but they are not connected: Accelerate sees no "
            "GPU here; to train on CPUs, set ACCELERATE_USE_CPU=true before the launch"
        )


def available_trackers() -> list[str]:
    """The experiment trackers that are installed."""
    return ["tensorboard"] if is_tensorboard_available() else []


def compile_as_asked(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Let `prepare` compile the network or not, whatever accelerate's configuration says.

    For a CPU, torch 2.13 compiles a nearest upsampling after a GroupNorm so that no gradient comes
    through, unless it leaves the memory format of convolutions as it is.
    """
    if config.compile is None:
        return
    options = {"layout_optimization": False} if accelerator.device.type == "cpu" else None
    accelerator.state.dynamo_plugin = (
        TorchDynamoPlugin("inductor", options=options)
        if config.compile
        else TorchDynamoPlugin("no")
    )
