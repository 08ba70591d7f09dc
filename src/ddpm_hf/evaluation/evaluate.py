"""`evaluate`: metrics of a model or a set of images on a dataset.

Its `Evaluator` measures any number of them, also for `compare` and the sweeps.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.evaluation.data_source import DataSource, ImageSubset
from ddpm_hf.evaluation.dataset_likelihood import (
    BoundMeasurement,
    BoundOptions,
    remove_shards,
    scheduler_of_bound,
)
from ddpm_hf.evaluation.expected_time import announce_time, num_steps_and_calls
from ddpm_hf.evaluation.features import Features, features_of, load_features
from ddpm_hf.evaluation.figures import BoundResult, ImageFormat, MetricResult, ModelFacts
from ddpm_hf.evaluation.image_metrics import ComparedImages, RealImages, measure_images
from ddpm_hf.evaluation.metrics import MIN_IMAGES
from ddpm_hf.evaluation.model_images import chosen_rows
from ddpm_hf.evaluation.recorded_hold_out import as_in_training
from ddpm_hf.evaluation.result_files import EVALUATION_FILE, results_folder, write_result
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.subjects import Subject, default_metrics, is_model, load_subject
from ddpm_hf.evaluation_options import BITS, METRIC_NAMES, EvaluationOptions, command_of
from ddpm_hf.options import takes_options
from ddpm_hf.sampling import DrawnImages, draw_to
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.utils.shared_work import distributed_state, on_main_process
from ddpm_hf.utils.text import counted

MAX_DRAWN = 10_000


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
            `.npy` or parquet file, or an object that `evaluation.subjects.image_set` accepts.
        dataset: folder, files or Hub name of the real images, a `datasets.Dataset`, or a dictionary
            of those by split.
        metrics: "fd", "kid", "precision-recall", "coverage" and "memorisation" compare images;
            "bits-per-dim" needs a model. Default: "bits-per-dim" for a model without `scheduler`,
            else the other ones.
        output: folder for evaluation.json, the pictures, and the drawn images.
        progress: show progress bars.
        **options: see `evaluation_options.EvaluationOptions`.
    Returns:
        the evaluation, on every rank.
    Raises:
        ValueError, OSError: if something cannot be loaded or measured, or another process uses
            `output`.
        TypeError: for an unknown option.
    """
    chosen = EvaluationOptions(**options)
    if metrics is None:
        metrics = default_metrics([model_or_images], chosen.scheduler is not None)
    evaluator = Evaluator(dataset, metrics, chosen, progress=progress)
    with results_folder(evaluator.state, output) as folder:
        evaluator.use_hold_out_of([model_or_images])
        subject = evaluator.load(model_or_images)
        evaluator.announce_time(subject, {folder: (chosen.scheduler, chosen.num_inference_steps)})
        return evaluator.evaluate(subject, folder)


class Evaluator:
    """Measures subjects; the real images and their features are prepared once.

    Args:
        dataset: a `DataSource`, or see `evaluate`.
        metrics: of `METRIC_NAMES`.
        options: defaults of all measurements.
        progress: show progress bars on the main rank.
    Raises:
        ValueError: for unknown or no metrics.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[str],
        options: EvaluationOptions,
        *,
        progress: bool = True,
    ) -> None:
        if isinstance(metrics, str):
            raise ValueError(f"`metrics` must be a list, such as [{metrics!r}], got {metrics!r}")
        if unknown := [name for name in metrics if name not in METRIC_NAMES]:
            choices = ", ".join(METRIC_NAMES)
            raise ValueError(f"`metrics` must contain only {choices}, got {unknown[0]!r}")
        if not metrics:
            raise ValueError(f"`metrics` is empty; choices: {', '.join(METRIC_NAMES)}")
        self.metrics, self.options = tuple(metrics), options
        self.image_metrics = tuple(name for name in metrics if name != BITS)
        self.state = distributed_state()
        self.progress = progress and self.state.is_main_process
        is_opened = isinstance(dataset, DataSource)
        self.data = dataset if is_opened else DataSource(dataset, options)
        self._real: dict[ImageFormat, RealImages] = {}

    def use_hold_out_of(self, sources: Sequence[Any]) -> None:
        """Use the hold-out and the class column that all models among `sources` record."""
        models = [source for source in sources if is_model(source)]
        self.data = as_in_training(self.data, models, self.options, progress=self.progress)

    @cached_property
    def network(self) -> Features:
        """The feature network."""
        return load_features(self.options.features, self.state.device)

    def load(self, source: Any) -> Subject:
        """A model on the device of this rank, or a set of images; see `load_subject`."""
        return load_subject(source, self.options, self.state.device, self.options.on_bad_image)

    def announce_time(
        self, subject: Subject, samplers: Mapping[Path, tuple[str | None, int | None]]
    ) -> None:
        """Print the expected time of the settings of a model that are not measured yet.

        All ranks call it, because they share the work of the features of the real images.

        Args:
            subject: the model; nothing is printed for images.
            samplers: scheduler and number of steps by folder of the evaluation.
        """
        if not subject.is_model:
            return
        calls = []
        for folder, (scheduler, K) in samplers.items():
            if not (folder / EVALUATION_FILE).exists():
                with suppress(ValueError):  # the measurement raises it
                    calls.append(num_steps_and_calls(subject.source, scheduler, K)[1])
        if not calls:
            return
        real = self.real_images(subject) if self.image_metrics else None
        if not self.progress:
            return
        options, work = self.options, list[tuple[int, int]]()  # images, calls per image
        if real is not None:
            work.append((_num_drawn(options, real), sum(calls)))
        if BITS in self.metrics:
            num_images = options.num_images or self.data.num_likelihood_images()
            work.append((num_images, sum(min(options.num_timesteps or K, K) for K in calls)))
        num_batches = sum(math.ceil(n / options.batch_size) * k for n, k in work)
        num_images = work[-1][0]
        announce_time(
            subject.source.unet,
            math.ceil(num_batches / self.state.num_processes),
            min(num_images, options.batch_size),
            f"{counted(len(calls), 'setting')} of {counted(num_images, 'image')}",
        )

    def real_images(self, subject: Subject) -> RealImages:
        """The real images in the format of the subject, with their features."""
        facts = subject.image_facts
        image_format = ImageFormat.of(facts)
        if image_format not in self._real:
            reference, held_out = self.data.reference_and_held_out()
            hold_out = self.data.hold_out
            if hold_out and hold_out.num_held_out < max(MIN_IMAGES[m] for m in self.image_metrics):
                held_out = None  # too few: the floor compares halves of the training images
            self._real[image_format] = RealImages(
                self._compared(reference, facts),
                self._compared(held_out, facts) if held_out else None,
            )
        return self._real[image_format]

    def _compared(self, subset: ImageSubset, facts: ImageFacts) -> ComparedImages:
        labels = self.data.label_column(subset.split) if self.options.per_class else None
        images = self.data.images(subset, facts, self.progress, labels)
        return ComparedImages(images, self._features(images), subset.split)

    def evaluate(
        self, subject: Subject, folder: Path, options: EvaluationOptions | None = None
    ) -> Evaluation:
        """Measure one subject.

        Args:
            subject: from `load`.
            folder: for evaluation.json, the pictures, and the drawn images.
            options: by default those of the evaluator.
        Raises:
            ValueError, OSError: if the subject cannot be measured.
        """
        options = options or self.options
        self._check(subject, options)
        folder.mkdir(parents=True, exist_ok=True)
        sampler = SchedulerSpec.parse(options.scheduler) if options.scheduler else SchedulerSpec()
        bound, real, drawn = None, None, None
        with sampled_by(subject.source, sampler) if subject.is_model else nullcontext():
            if BITS in self.metrics:
                bound = self._bound(subject.source, options, folder, sampler)
            if self.image_metrics:
                real = self.real_images(subject)  # fails before the drawing, if at all
                images = subject.source
                if subject.is_model:
                    images = self._draw(images, options, folder, sampler, real)
                elif options.num_images is not None and options.num_images < len(images):
                    rows = chosen_rows(len(images), options.num_images, options.seed)
                    images = images.select(rows)
                drawn = ComparedImages(images, self._features(images))

        def report() -> Evaluation:
            results: list[BoundResult | MetricResult] = [bound] if bound else []
            if real is not None and drawn is not None:
                metrics, network, device = self.image_metrics, self.network, self.state.device
                results += measure_images(metrics, real, drawn, network, options, folder, device)
            evaluation = self._evaluation(subject, options, results)
            write_result(folder, evaluation, EVALUATION_FILE)
            if bound is not None:
                remove_shards(folder, bound)
            return evaluation

        return on_main_process(self.state, report)

    def _check(self, subject: Subject, options: EvaluationOptions) -> None:
        if subject.is_model:
            is_conditional = subject.source.unet.config.num_class_embeds
            if options.per_class and self.image_metrics and not is_conditional:
                raise ValueError("`per_class` needs a class-conditional model")
            return
        for name in ("scheduler", "num_inference_steps"):
            if getattr(options, name) is not None:
                raise ValueError(f"`{name}` applies to models; {subject.name} is a set of images")
        if BITS in self.metrics:
            raise ValueError(f"`metrics`: {BITS} needs a model; {subject.name} is a set of images")

    def _bound(
        self, pipeline: Any, options: EvaluationOptions, folder: Path, sampler: SchedulerSpec
    ) -> BoundResult | None:
        """Bits/dim of the held-out images, on the main rank."""
        eta = 1.0 if sampler.eta is None else float(sampler.eta)
        scheduler = scheduler_of_bound(pipeline.scheduler, eta)
        images = self.data.likelihood_images(
            pipeline.unet, may_be_fewer=bool(self.image_metrics), progress=self.progress
        )
        how = BoundOptions.of(options, eta)
        measurement = BoundMeasurement(pipeline.unet, scheduler, images, how)
        return measurement.result(folder, self.state, progress=self.progress)

    def _draw(
        self,
        pipeline: Any,
        options: EvaluationOptions,
        folder: Path,
        sampler: SchedulerSpec,
        real: RealImages,
    ) -> DrawnImages:
        """Draw the images that are compared with the real ones; classes are drawn in turn."""
        return draw_to(
            pipeline,
            folder / "drawn",
            _num_drawn(options, real),
            seed=options.seed,
            batch_size=options.batch_size,
            overwrite=True,
            progress=self.progress,
            num_inference_steps=options.num_inference_steps,
            eta=sampler.eta,
        )

    def _features(self, images: DrawnImages) -> Tensor | None:
        size, progress = self.options.batch_size, self.progress
        return features_of(images, self.network, self.state, batch_size=size, progress=progress)

    def _evaluation(
        self,
        subject: Subject,
        options: EvaluationOptions,
        results: Sequence[BoundResult | MetricResult],
    ) -> Evaluation:
        dataset, recorded = self.data.facts(), options.recorded()
        shown = {"metrics": list(self.metrics), **recorded.to_dict()}
        return Evaluation(
            model=ModelFacts(name=subject.name, revision=options.revision, weights=subject.weights),
            dataset=replace(dataset, image=ImageFormat.of(subject.image_facts)),
            results=tuple(results),
            metrics=self.metrics,
            options=recorded,
            command=command_of([subject.name], dataset.name, shown),
        )


def _num_drawn(options: EvaluationOptions, real: RealImages) -> int:
    """Number of images to draw: as requested, or as many as there are real ones, within limits."""
    return options.num_images or min(len(real.reference.images), MAX_DRAWN)
