"""`Evaluator`: measures any number of models and image sets on one dataset."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler, as_gaussian_scheduler
from ddpm_hf.evaluation.data_source import DataSource, ImageSubset
from ddpm_hf.evaluation.dataset_likelihood import BoundMeasurement, BoundOptions, remove_shards
from ddpm_hf.evaluation.features import Features, features_of, load_features
from ddpm_hf.evaluation.figures import BoundResult, ImageFormat, MetricResult, ModelFacts
from ddpm_hf.evaluation.image_comparison import ComparedImages, RealImages, compare_images
from ddpm_hf.evaluation.metrics import MIN_IMAGES
from ddpm_hf.evaluation.options import BITS, METRIC_NAMES, EvaluationOptions
from ddpm_hf.evaluation.recorded_command import command_of
from ddpm_hf.evaluation.result_files import EVALUATION_FILE, known_results, write_result
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.subjects import Subject, is_model, load_subject
from ddpm_hf.evaluation.training_record import as_in_training
from ddpm_hf.sampling import DrawnImages, draw_to
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.shared_work import distributed_state, on_main_process

MAX_DRAWN = 10_000


def num_drawn(options: EvaluationOptions, num_real: int) -> int:
    """Number of images that are drawn to be compared with `num_real` ones."""
    return options.num_images or min(num_real, MAX_DRAWN)


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

    def real_images(self, subject: Subject) -> RealImages:
        """The real images in the format of the subject, with their features."""
        facts = subject.image_facts
        image_format = ImageFormat.of(facts)
        if image_format not in self._real:
            self._real[image_format] = self._prepare_real_images(facts)
        return self._real[image_format]

    def _prepare_real_images(self, facts: ImageFacts) -> RealImages:
        reference, held_out = self.data.reference_and_held_out()
        hold_out = self.data.hold_out
        if hold_out and hold_out.num_held_out < max(MIN_IMAGES[m] for m in self.image_metrics):
            held_out = None  # too few: the floor compares halves of the training images
        return RealImages(
            self._compared(reference, facts), self._compared(held_out, facts) if held_out else None
        )

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
        is_drawn = subject.is_model
        with sampled_by(subject.source, sampler) if is_drawn else nullcontext():
            bound = None
            if BITS in self.metrics:
                bound = self._bound(subject.source, options, folder, sampler)
            real, drawn = None, None
            if self.image_metrics:
                real = self.real_images(subject)  # fails before the drawing, if at all
                images, num_real = subject.source, len(real.reference.images)
                if is_drawn:
                    images = self._draw(images, options, folder, sampler.eta, num_real)
                rows = range(min(len(images), options.num_images or len(images)))
                drawn = ComparedImages(images, self._features(images, rows))

        def report() -> Evaluation:
            results: list[BoundResult | MetricResult] = [bound] if bound else []
            if real is not None and drawn is not None:
                results += compare_images(
                    self.image_metrics,
                    real,
                    drawn,
                    self.network,
                    options,
                    folder,
                    self.state.device,
                )
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

    def _bound(
        self, pipeline: Any, options: EvaluationOptions, folder: Path, sampler: SchedulerSpec
    ) -> BoundResult | None:
        """Bits/dim of the held-out images, on the main rank."""
        eta = 1.0 if sampler.eta is None else float(sampler.eta)
        _check_has_bound(pipeline.scheduler, eta)
        images = self.data.likelihood_images(
            pipeline.unet,
            num_images=None if self.image_metrics else options.num_images,
            at_most=options.num_images,
            seed=options.seed,
            progress=self.progress,
        )
        scheduler = as_gaussian_scheduler(pipeline.scheduler)
        measurement = BoundMeasurement(
            pipeline.unet,
            GaussianDDPMScheduler.from_config(scheduler.config),
            images,
            BoundOptions(
                num_inference_steps=options.num_inference_steps,
                num_timesteps=options.num_timesteps,
                eta=eta,
                decoder=options.decoder,
                seed=options.seed,
                batch_size=options.batch_size,
            ),
        )
        known = [r for r in known_results(folder) if isinstance(r, BoundResult)]
        return measurement.result(
            folder, self.state, known=known[0] if known else None, progress=self.progress
        )

    def _draw(
        self,
        pipeline: Any,
        options: EvaluationOptions,
        folder: Path,
        eta: float | None,
        num_real: int,
    ) -> DrawnImages:
        """Draw as many images as there are real ones; classes are drawn in turn."""
        return draw_to(
            pipeline,
            folder / "drawn",
            num_drawn(options, num_real),
            seed=options.seed,
            batch_size=options.batch_size,
            overwrite=True,
            progress=self.progress,
            num_inference_steps=options.num_inference_steps,
            eta=eta,
        )

    def _features(self, images: DrawnImages, rows: range | None = None) -> Tensor | None:
        return features_of(
            images,
            self.network,
            self.state,
            rows=rows,
            batch_size=self.options.batch_size,
            progress=self.progress,
        )


def _check_has_bound(scheduler: Any, eta: float) -> None:
    """Refuse the bound of a sampler that has none."""
    name = type(scheduler).__name__.removesuffix("Scheduler").removeprefix("Gaussian")
    reason = "which is deterministic" if eta == 0 else ""
    try:
        as_gaussian_scheduler(scheduler)
    except TypeError:
        reason = "whose steps define no bound"
    if reason:
        noise = "" if eta == 1 else f":eta={eta:g}"
        raise ValueError(
            f"`metrics`: {BITS} needs the scheduler DDPM with eta above 0, got {name}{noise},"
            f" {reason}"
        )
