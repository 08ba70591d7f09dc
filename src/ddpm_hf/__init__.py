"""DDPM for the Hugging Face ecosystem.

Public names load on first use, so that `ddpm-hf --help` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
    from ddpm_hf.hub.load import load
    from ddpm_hf.training import TrainingConfig, train

__version__ = "0.1.0"
__all__ = ["GaussianDDPMPipeline", "GaussianDDPMScheduler", "TrainingConfig", "load", "train"]

_HOME_OF = {
    "GaussianDDPMPipeline": "ddpm_hf.diffusion.pipeline",
    "GaussianDDPMScheduler": "ddpm_hf.diffusion.scheduling",
    "TrainingConfig": "ddpm_hf.training",
    "load": "ddpm_hf.hub.load",
    "train": "ddpm_hf.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
