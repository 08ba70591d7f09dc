"""Evaluation of models and images: figures with confidence intervals and floors.

Functions, and their options in `ddpm_hf.evaluation_options`
    evaluate                one model or set of images; `evaluate`, and the `Evaluator` of all
    compare                 several models, samplers and numbers of steps; `compare`
    sweep                   the cheapest sampler that is as good as the best
    ema_sweep               the best length of a run's weight average; `sweep_ema`
    checkpoint_calibration  error curve of a checkpoint; `calibrate_checkpoint`
    verify                  figures of a model card, measured again

Metrics of drawn images
    distances               Frechet and kernel distance, precision, recall, density, coverage
    neighbour_statistics    pairwise nearest-neighbour statistics of many sets in one pass
    metrics                 the figures with confidence intervals and floors; memorisation
    per_class               the same for each class
    features                feature networks
    image_metrics           metrics of sets of images, or those of an earlier evaluation

Bits/dim
    dataset_likelihood      variational bound of a dataset

Images
    subjects                models and sets of images that are measured
    data_source             the real images: splits, hold-out
    model_images            a dataset in the format of a model
    recorded_hold_out       images that training held out

Results
    figures                 measured figures
    results                 result of `evaluate`, and its tables
    comparison_results      results of `compare` and `sweep`
    calibration_results     result of `calibrate_checkpoint`
    result_files            folders and JSON files
    result_pictures, plots  grids of images and plots
    card_metrics            figures for the model card
    expected_time           time of a measurement, stated before it
"""

from typing import TYPE_CHECKING

from ddpm_hf.utils.first_use import imported_on_first_use

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
