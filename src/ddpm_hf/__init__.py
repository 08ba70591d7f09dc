"""DDPM for the Hugging Face ecosystem.

Public names are imported on first use, so that `ddpm-hf --help` does not import torch.
"""

from typing import TYPE_CHECKING

from ddpm_hf.utils.first_use import imported_on_first_use

if TYPE_CHECKING:
    from ddpm_hf.calibration import Calibration, calibrate
    from ddpm_hf.data import DataError
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
    from ddpm_hf.evaluation.calibration_results import CheckpointCalibration
    from ddpm_hf.evaluation.checkpoint_calibration import calibrate_checkpoint
    from ddpm_hf.evaluation.compare import compare
    from ddpm_hf.evaluation.comparison_results import Comparison
    from ddpm_hf.evaluation.evaluate import evaluate
    from ddpm_hf.evaluation.results import Evaluation
    from ddpm_hf.hub.load import load
    from ddpm_hf.hub.push import push
    from ddpm_hf.inference_optimization import optimize
    from ddpm_hf.likelihood import BitsPerDim, bits_per_dim
    from ddpm_hf.losses import hybrid_loss, simple_loss, vlb_loss
    from ddpm_hf.openai_conversion.convert import convert
    from ddpm_hf.pictures import image_grid
    from ddpm_hf.sampling import draw_to, save_drawn
    from ddpm_hf.training import (
        CheckpointError,
        ConfigError,
        TrainingConfig,
        TrainingError,
        TrainingResult,
        train,
    )
    from ddpm_hf.utils.connection import HubError

__version__ = "0.1.0"
__all__ = [
    "BitsPerDim",
    "Calibration",
    "CheckpointCalibration",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DataError",
    "Evaluation",
    "GaussianDDPMPipeline",
    "GaussianDDPMScheduler",
    "HubError",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "bits_per_dim",
    "calibrate",
    "calibrate_checkpoint",
    "compare",
    "convert",
    "draw_to",
    "evaluate",
    "hybrid_loss",
    "image_grid",
    "load",
    "optimize",
    "push",
    "save_drawn",
    "simple_loss",
    "train",
    "vlb_loss",
]

__getattr__ = imported_on_first_use(
    __name__,
    {
        "calibration": "Calibration calibrate",
        "utils.connection": "HubError",
        "data": "DataError",
        "diffusion.pipeline": "GaussianDDPMPipeline",
        "diffusion.scheduling": "GaussianDDPMScheduler",
        "evaluation.calibration_results": "CheckpointCalibration",
        "evaluation.checkpoint_calibration": "calibrate_checkpoint",
        "evaluation.compare": "compare",
        "evaluation.comparison_results": "Comparison",
        "evaluation.evaluate": "evaluate",
        "evaluation.results": "Evaluation",
        "hub.load": "load",
        "hub.push": "push",
        "inference_optimization": "optimize",
        "likelihood": "BitsPerDim bits_per_dim",
        "openai_conversion.convert": "convert",
        "losses": "hybrid_loss simple_loss vlb_loss",
        "pictures": "image_grid",
        "sampling": "draw_to save_drawn",
        "training": "CheckpointError ConfigError TrainingConfig TrainingError TrainingResult train",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
