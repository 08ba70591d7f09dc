"""What a model is worth: measured in parts that processes share and that survive an interruption.

evaluate     all of it in one call
compare      several models, samplers and numbers of steps side by side
evaluator    the measuring of both: on one data set, of any number of subjects
comparison   what was compared as people read it: table, curves, samples
distances    between real and drawn images by their features: Frechet, kernel, precision, recall
classes      the same of each class
pool         sets of features, and what the images of one see of another, found in one pass
metrics      the same with intervals, beside what real images get; copies of training images
features     of images, from any network, by fixed rules
sets         the images: drawn, in files, in memory, of a data set
images       a data set as the model sees it
parts        work in parts, kept on disk until all are there
likelihood   bits/dim of the images
sweep        which sampler in how many steps is as good as all of them
calibration  the error at every timestep, and what it says of few steps
report       the JSON file, the table, the lines for the model card
verify       what a card claims, measured again
plots        bits per timestep, the rate-distortion curve, comparisons
"""

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
