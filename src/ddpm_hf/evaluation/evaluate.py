"""A model, or images, measured on a data set in one call."""

import os
from collections.abc import Sequence
from typing import Any

from ddpm_hf.evaluation.features import DEFAULT_FEATURES
from ddpm_hf.evaluation.measurement import EvaluationOptions, Evaluator, is_model
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.report import BITS, results_folder


def evaluate(
    model_or_images: Any,
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    features: Any = DEFAULT_FEATURES,
    num_images: int | None = None,
    seed: int = 0,
    split: str | None = None,
    reference_split: str = "train",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
    per_class: bool = False,
    on_bad_image: str = "error",
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    num_timesteps: int | None = None,
    decoder: str = "exact",
    batch_size: int = 64,
    output: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    use_safetensors: bool = True,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Measure how good a model or its images are, with intervals, and beside real images.

    Called by all processes of `accelerate launch`, which share the work; what was interrupted goes
    on by the same call with the same `output`. Features are computed once for a set of images.

    Args:
        model_or_images: a pipeline, or the name or folder of a model; or images: a folder, `.npz`,
            `.npy` or parquet file, or what `evaluation.sets.image_set` takes.
        dataset: folder, files or Hub name of the real images, rows of `datasets`, or a dictionary
            of such rows by split.
        metrics: "fd", "kid", "precision-recall", "coverage" and "memorisation" compare images;
            "bits-per-dim" is of a model alone. By default that for a model without `scheduler`, the
            others else.
        features: what images are compared by; see `evaluation.features.load_features`.
        num_images: images to draw; by default as many as there are real ones, at most 10,000. For
            bits/dim, real images to use; by default all.
        seed: of the images, the noise, and the halves that intervals come from.
        split: of real images that the model was not trained on: for bits/dim, and for the floor;
            by default "test" or "validation", where there is one; else those that the training of
            the model, given by name or folder, held out of `reference_split` itself.
        reference_split: of those that it was trained on, which drawn ones are compared with. Of the
            two, one that does not exist is done without; then the floor is between halves.
        dataset_config, dataset_revision: of a data set on the Hub.
        image_column: needed only if there are several.
        class_column: of a class-conditional model's classes, for bits/dim, and for `per_class`.
        per_class: compare the images of each class, too.
        on_bad_image: "error" or "skip".
        scheduler: draws the images in place of the model's own: a name as `ddpm-hf sample` takes
            it, such as "DDIM" or "DDPM:eta=0".
        num_inference_steps: K, of the sampler and of the bound.
        num_timesteps, decoder: of the bound; see `bits_per_dim`.
        batch_size: images at once.
        output: folder for evaluation.json, the pictures, and the drawn images.
        revision, variant, use_safetensors: of the model; see `load`.
        progress: show progress bars.
    Returns:
        what evaluation.json holds; None on all but the main process.
    Raises:
        ValueError, OSError: if something cannot be loaded or measured, or another process has
            `output`.
    """
    options = EvaluationOptions(
        features=features,
        num_images=num_images,
        seed=seed,
        split=split,
        reference_split=reference_split,
        dataset_config=dataset_config,
        dataset_revision=dataset_revision,
        image_column=image_column,
        class_column=class_column,
        per_class=per_class,
        on_bad_image=on_bad_image,
        scheduler=scheduler,
        num_inference_steps=num_inference_steps,
        num_timesteps=num_timesteps,
        decoder=decoder,
        batch_size=batch_size,
        revision=revision,
        variant=variant,
        use_safetensors=use_safetensors,
    )
    if metrics is None:
        is_bound = is_model(model_or_images) and scheduler is None
        metrics = (BITS,) if is_bound else tuple(METRICS)
    evaluator = Evaluator(dataset, metrics, options, progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_held_out_of([model_or_images])
        return evaluator.evaluate(evaluator.load(model_or_images), folder)
