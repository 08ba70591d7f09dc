"""Training with Accelerate.

In the order of a run, which `program` follows:

    options     options, arguments, config, resolve
    components  dataset_setup, pretrained, network, model, objective, components
    state       run, state, warm_up, plan
    updates     loop
    results     artifacts, run_log, export

`accelerate launch -m ddpm_hf train` runs the same program as `ddpm-hf train`.

Public names load on first use, so that options are checked before torch is imported.
"""

from typing import TYPE_CHECKING

from ddpm_hf.utils.first_use import imported_on_first_use

if TYPE_CHECKING:
    from ddpm_hf.training.accelerator import join_processes
    from ddpm_hf.training.arguments import parse_config
    from ddpm_hf.training.config import TrainingConfig
    from ddpm_hf.training.dataset_setup import build_images
    from ddpm_hf.training.errors import CheckpointError, ConfigError, TrainingError
    from ddpm_hf.training.network import build_scheduler, build_unet
    from ddpm_hf.training.program import TrainingResult, train
    from ddpm_hf.training.rank_coordination import ProcessError, main_first

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ProcessError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "build_images",
    "build_scheduler",
    "build_unet",
    "join_processes",
    "main_first",
    "parse_config",
    "train",
]

__getattr__ = imported_on_first_use(
    __name__,
    {
        "training.errors": "CheckpointError ConfigError TrainingError",
        "training.rank_coordination": "ProcessError main_first",
        "training.config": "TrainingConfig",
        "training.program": "TrainingResult train",
        "training.dataset_setup": "build_images",
        "training.network": "build_scheduler build_unet",
        "training.accelerator": "join_processes",
        "training.arguments": "parse_config",
    },
)
