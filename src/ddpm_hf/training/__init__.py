"""Training with Accelerate.

Options: `options`, `config`, `resolve`. Components: `components`, `network`, `dataset_setup`,
`objective`. Updates: `loop`, `run`, `state`. `accelerate launch -m ddpm_hf train` runs the same
program as `ddpm-hf train`.

Public names load on first use, so that options are checked before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_hf.training.accelerator import join_processes
    from ddpm_hf.training.arguments import parse_config
    from ddpm_hf.training.config import TrainingConfig
    from ddpm_hf.training.dataset_setup import build_images
    from ddpm_hf.training.errors import CheckpointError, ConfigError, TrainingError
    from ddpm_hf.training.loop import TrainingResult, train
    from ddpm_hf.training.network import build_scheduler, build_unet
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

_HOME_OF = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ProcessError": "rank_coordination",
    "TrainingConfig": "config",
    "TrainingError": "errors",
    "TrainingResult": "loop",
    "build_images": "dataset_setup",
    "build_scheduler": "network",
    "build_unet": "network",
    "join_processes": "accelerator",
    "main_first": "rank_coordination",
    "parse_config": "arguments",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddpm_hf.training.{_HOME_OF[name]}"), name)
