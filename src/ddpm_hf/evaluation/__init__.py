"""Evaluation of models and images: figures with confidence intervals and floors.

Measuring
    evaluate                one model or set of images; `evaluate`
    compare                 several models, samplers and numbers of steps; `compare`
    checkpoint_calibration  error curve of a checkpoint; `calibrate_checkpoint`
    sweep                   the cheapest sampler that is as good as the best
    verify                  figures of a model card, measured again
    measurement             the `Evaluator` that these share

Figures
    distances               Frechet and kernel distance, precision, recall, density, coverage
    metrics                 these with confidence intervals and floors; memorisation
    per_class               the same for each class
    neighbour_statistics    pairwise nearest-neighbour statistics of many sets in one pass
    dataset_likelihood      bits/dim of a data set
    features                feature networks
    sharded_tensors         tensors computed in shards by all ranks

Images
    sets                    drawn images, image files, arrays, data sets
    model_images            a data set in the format of a model
    training_record         images that training held out

Results
    options                 options of the functions above
    results                 their typed results, and their JSON files
    tables                  results as text
    plots                   results as figures
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_hf.evaluation.distances import (
        Estimate,
        density_coverage,
        frechet_distance,
        kernel_distance,
        precision_recall,
    )

__all__ = [
    "Estimate",
    "density_coverage",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ddpm_hf.evaluation.distances"), name)
