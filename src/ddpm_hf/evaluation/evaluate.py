"""`evaluate`: metrics of a model or a set of images on a dataset."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ddpm_hf.evaluation.expected_time import announce_time, num_steps_and_calls
from ddpm_hf.evaluation.measurement import Evaluator
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.result_files import EVALUATION_FILE, results_folder
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.subjects import default_metrics
from ddpm_hf.options import takes_options


@takes_options(EvaluationOptions)
def evaluate(
    model_or_images: Any,
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Measure the quality of a model or of images, with confidence intervals and floors.

    Call it on all ranks of `accelerate launch`; they share the work. An interrupted evaluation
    resumes with the same `output`. Features of a set of images are computed once.

    Args:
        model_or_images: a pipeline, or name or folder of a model; or images: a folder, `.npz`,
            `.npy` or parquet file, or an object that `evaluation.sets.image_set` accepts.
        dataset: folder, files or Hub name of the real images, a `datasets.Dataset`, or a dictionary
            of those by split.
        metrics: "fd", "kid", "precision-recall", "coverage" and "memorisation" compare images;
            "bits-per-dim" needs a model. Default: "bits-per-dim" for a model without `scheduler`,
            else the other ones.
        output: folder for evaluation.json, the pictures, and the drawn images.
        progress: show progress bars.
        **options: see `evaluation.options.EvaluationOptions`.
    Returns:
        the evaluation, on every rank.
    Raises:
        ValueError, OSError: if something cannot be loaded or measured, or another process uses
            `output`.
        TypeError: for an unknown option.
    """
    chosen = EvaluationOptions.from_keywords(**options)
    if metrics is None:
        metrics = default_metrics([model_or_images], chosen.scheduler is not None)
    evaluator = Evaluator(dataset, metrics, chosen, progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_hold_out_of([model_or_images])
        subject = evaluator.load(model_or_images)
        if subject.is_model and not (folder / EVALUATION_FILE).exists():
            K = chosen.num_inference_steps
            with suppress(ValueError):  # the measurement raises it
                _, num_calls = num_steps_and_calls(subject.source, chosen.scheduler, K)
                announce_time(evaluator, subject, [num_calls])
        return evaluator.evaluate(subject, folder)
