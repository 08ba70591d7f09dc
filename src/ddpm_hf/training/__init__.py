"""Training by Accelerate: options (`config`), what is trained (`parts`), the updates (`loop`), what
is kept (`state`). `accelerate launch -m ddpm_hf train` runs the program of `ddpm-hf train`."""

from ddpm_hf.training.accelerator import join_processes
from ddpm_hf.training.arguments import parse_config
from ddpm_hf.training.config import ConfigError, TrainingConfig, TrainingError
from ddpm_hf.training.images import build_images
from ddpm_hf.training.loop import TrainingResult, train
from ddpm_hf.training.network import build_scheduler, build_unet
from ddpm_hf.training.processes import ProcessError, main_first
from ddpm_hf.training.run_folder import CheckpointError

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
