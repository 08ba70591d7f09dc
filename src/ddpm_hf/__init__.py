"""DDPM for the Hugging Face ecosystem.

Public names load on first use, so that `ddpm-hf --help` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_hf.calibration import calibrate
    from ddpm_hf.data import DataError
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
    from ddpm_hf.evaluation.compare import compare
    from ddpm_hf.evaluation.evaluate import evaluate
    from ddpm_hf.hub.load import load
    from ddpm_hf.hub.push import push
    from ddpm_hf.hub.retry import HubError
    from ddpm_hf.likelihood import bits_per_dim
    from ddpm_hf.losses import simple_loss
    from ddpm_hf.training import (
        CheckpointError,
        ConfigError,
        TrainingConfig,
        TrainingError,
        TrainingResult,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GaussianDDPMPipeline",
    "GaussianDDPMScheduler",
    "HubError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "bits_per_dim",
    "calibrate",
    "compare",
    "evaluate",
    "load",
    "push",
    "simple_loss",
    "train",
]

_HOME_OF = {
    "CheckpointError": "training",
    "ConfigError": "training",
    "DataError": "data",
    "GaussianDDPMPipeline": "diffusion.pipeline",
    "GaussianDDPMScheduler": "diffusion.scheduling",
    "HubError": "hub.retry",
    "TrainingConfig": "training",
    "TrainingError": "training",
    "TrainingResult": "training",
    "bits_per_dim": "likelihood",
    "calibrate": "calibration",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.evaluate",
    "load": "hub.load",
    "push": "hub.push",
    "simple_loss": "losses",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ddpm_hf.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
