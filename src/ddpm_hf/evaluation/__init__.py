"""Evaluation of models and images: figures with confidence intervals and floors.

Measuring
    evaluate                one model or set of images; `evaluate`
    compare                 several models, samplers and numbers of steps; `compare`
    sweep                   the cheapest sampler that is as good as the best
    ema_sweep               the best length of a run's weight average; `sweep_ema`
    checkpoint_calibration  error curve of a checkpoint; `calibrate_checkpoint`
    verify                  figures of a model card, measured again
    measurement             the `Evaluator` that these share
    subjects                models and image sets that are measured
    image_comparison        metrics of drawn images against real ones
    ranking                 the best setting of a comparison, and ties

Figures
    dataset_likelihood      bits/dim of a dataset
    distances               Frechet and kernel distance, precision, recall, density, coverage
    metrics                 these with confidence intervals and floors; memorisation
    per_class               the same for each class
    error_curve             error of the network at every timestep
    features                feature networks
    neighbour_statistics    pairwise nearest-neighbour statistics of many sets in one pass
    sharded_tensors         tensors computed in shards by all ranks

Images
    sets                    image files and arrays
    data_source             dataset of an evaluation: splits, hold-out, images
    model_images            a dataset in the format of a model
    training_record         images that training held out

Options and results
    options                 options of the functions above
    figures                 measured figures, facts about model and dataset
    results                 result of `evaluate`; also comparison_results, calibration_results
    records                 dataclasses as JSON objects
    result_files            folders and JSON files
    card_metrics            figures for the model card
    tables                  figures as text
    plots, result_pictures  figures as plots, images as grids
"""

from typing import TYPE_CHECKING

from ddpm_hf.first_use import imported_on_first_use

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

__getattr__ = imported_on_first_use(__name__, {"evaluation.distances": " ".join(__all__)})
