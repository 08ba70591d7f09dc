"""`Evaluator`: measures any number of models and image sets on one data set."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.image_processor import ImageFacts
from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.dataset_likelihood import BoundOptions, measure_bits_per_dim, remove_shards
from ddpm_hf.evaluation.features import Features, features_of, load_features
from ddpm_hf.evaluation.figures import (
    BoundResult,
    FeatureNetwork,
    ImageFormat,
    MeasurementSetup,
    MetricResult,
    ModelFacts,
)
from ddpm_hf.evaluation.metrics import MIN_IMAGES, closest_pairs, measure
from ddpm_hf.evaluation.model_images import facts_of, images_for
from ddpm_hf.evaluation.options import BITS, METRIC_NAMES, EvaluationOptions, public_name_of
from ddpm_hf.evaluation.per_class import RowsByClass, rows_by_class, with_classes
from ddpm_hf.evaluation.result_files import (
    EVALUATION_FILE,
    command_of,
    known_results,
    now,
    versions,
    write_result,
)
from ddpm_hf.evaluation.result_pictures import failures_as_warnings, save_samples
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.sets import DataSource, facts_of_set, image_set
from ddpm_hf.evaluation.training_record import with_hold_out_of_training
from ddpm_hf.hub.load import load
from ddpm_hf.sampling import DrawnImages, draw_to
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.shared_work import distributed_state, on_main_process

MAX_DRAWN = 10_000
_NUM_CLOSEST_PAIRS = 16


@dataclass(frozen=True)
class Subject:
    """A model or a set of images.

    Attributes:
        source: a pipeline on the device of this rank, or images.
        name: shown in reports.
        weights: digest of a model's weights; None for images.
    """

    source: Any
    name: str
    weights: str | None = None

    @property
    def is_model(self) -> bool:
        """Whether this is a model."""
        return self.weights is not None

    @property
    def image_facts(self) -> ImageFacts:
        """Size, mode and bit depth of its images."""
        return facts_of(self.source.unet) if self.is_model else facts_of_set(self.source)


@dataclass(frozen=True)
class RealImages:
    """Real images in the format of a subject, with features on the main rank.

    Attributes:
        reference_split, held_out_split: names of the splits.
        reference, held_out: the images; `held_out` is None if there are none.
        reference_features, held_out_features: (N, d).
    """

    reference_split: str
    held_out_split: str | None
    reference: DrawnImages
    held_out: DrawnImages | None
    reference_features: Tensor | None
    held_out_features: Tensor | None


@dataclass(frozen=True)
class DrawnFeatures:
    """Drawn images, and the features of those that are compared, on the main rank."""

    images: DrawnImages
    num_compared: int
    features: Tensor | None


def is_model(source: Any) -> bool:
    """Whether this is a pipeline, the folder of one, or a name that is not a local path."""
    if not isinstance(source, str | os.PathLike):
        return hasattr(source, "unet")
    path = Path(source).expanduser()
    return (path / "model_index.json").is_file() or not path.exists()


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
        if unknown := [name for name in metrics if name not in METRIC_NAMES]:
            choices = ", ".join(METRIC_NAMES)
            raise ValueError(f"`metrics` must be of {choices}, got {unknown[0]!r}")
        if not metrics:
            raise ValueError(f"`metrics` is empty; choices: {', '.join(METRIC_NAMES)}")
        self.metrics, self.options = tuple(metrics), options
        self.image_metrics = tuple(name for name in metrics if name != BITS)
        self.state = distributed_state()
        self.progress = progress and self.state.is_main_process
        is_opened = isinstance(dataset, DataSource)
        self.data = dataset if is_opened else DataSource.from_options(dataset, options)
        self._real: dict[ImageFormat, RealImages] = {}

    def use_hold_out_of(self, sources: Sequence[Any]) -> None:
        """Use the recorded hold-out of all models among `sources`, if they agree."""
        self.data = with_hold_out_of_training(
            self.data,
            [source for source in sources if is_model(source)],
            revision=self.options.revision,
            use_safetensors=self.options.use_safetensors,
            progress=self.progress,
        )

    @cached_property
    def network(self) -> Features:
        """The feature network."""
        return load_features(self.options.features, self.state.device)

    def load(self, source: Any) -> Subject:
        """A model on the device of this rank, or a set of images.

        Raises:
            ValueError, OSError: if it does not exist or cannot be loaded.
        """
        if not is_model(source):
            return Subject(image_set(source), public_name_of(source))
        pipeline, options = source, self.options
        if not hasattr(source, "unet"):
            pipeline = load(
                os.fspath(source),
                revision=options.revision,
                variant=options.variant,
                use_safetensors=options.use_safetensors,
            )
        pipeline = pipeline.to(self.state.device)
        return Subject(pipeline, public_name_of(source), weights_digest(pipeline.unet))

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
        labels: Any = (self.options.class_column or True) if self.options.per_class else None
        images = self.data.images(reference, facts, self.progress, labels)
        others = self.data.images(held_out, facts, self.progress, labels) if held_out else None
        return RealImages(
            reference.split,
            held_out.split if held_out else None,
            images,
            others,
            self._features(images),
            self._features(others) if others else None,
        )

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
                bound = self._bound(subject.source, options, folder)
            real, drawn = None, None
            if self.image_metrics:
                real = self.real_images(subject)  # fails before the drawing, if at all
                images = subject.source
                if is_drawn:
                    images = self._draw(images, options, folder, sampler.eta, len(real.reference))
                drawn = self._drawn_features(images, options)

        def report() -> Evaluation:
            results: list[BoundResult | MetricResult] = [bound] if bound else []
            if real is not None and drawn is not None:
                results += self._compare(real, drawn, options, folder)
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
            versions=versions(),
            created=now(),
        )

    def _bound(self, pipeline: Any, options: EvaluationOptions, folder: Path) -> BoundResult | None:
        """Bits/dim of the held-out images, on the main rank."""
        number, subset = options.num_images, self.data.likelihood_subset()
        images = images_for(
            pipeline.unet,
            self.data.rows(subset.split),
            rows=subset.rows,
            num_images=None if self.image_metrics else number,
            at_most=number,
            seed=options.seed,
            image_column=options.image_column,
            label_column=options.class_column or True,
            on_bad_image=options.on_bad_image,
            progress=self.progress,
        )
        known = [r for r in known_results(folder) if isinstance(r, BoundResult)]
        return measure_bits_per_dim(
            pipeline.unet,
            pipeline.scheduler,
            images,
            BoundOptions(
                num_inference_steps=options.num_inference_steps,
                num_timesteps=options.num_timesteps,
                decoder=options.decoder,
                seed=options.seed,
                batch_size=options.batch_size,
            ),
            folder,
            self.state,
            known=known[0] if known else None,
            progress=self.progress,
        )

    def _draw(
        self,
        pipeline: Any,
        options: EvaluationOptions,
        folder: Path,
        eta: float | None,
        num_reference: int,
    ) -> DrawnImages:
        """Draw as many images as there are real ones; classes are drawn in turn."""
        return draw_to(
            pipeline,
            folder / "drawn",
            options.num_images or min(num_reference, MAX_DRAWN),
            seed=options.seed,
            batch_size=options.batch_size,
            overwrite=True,
            progress=self.progress,
            num_inference_steps=options.num_inference_steps,
            eta=eta,
        )

    def _drawn_features(self, images: DrawnImages, options: EvaluationOptions) -> DrawnFeatures:
        num_compared = min(len(images), options.num_images or len(images))
        return DrawnFeatures(images, num_compared, self._features(images, range(num_compared)))

    def _compare(
        self, real: RealImages, drawn: DrawnFeatures, options: EvaluationOptions, folder: Path
    ) -> list[MetricResult]:
        """Metrics of images, new or from an earlier evaluation in `folder`; main rank only."""
        images, x, y, z = (
            drawn.images, real.reference_features, drawn.features, real.held_out_features
        )  # fmt: skip
        if x is None or y is None:
            return []
        rows = None
        if options.per_class:
            rows = rows_by_class(real.reference, images, real.held_out, drawn.num_compared)
        inputs = _digest(x, y, z, options.seed, rows)
        results = [
            r
            for r in known_results(folder)
            if isinstance(r, MetricResult) and r.measured_with.inputs == inputs
        ]
        missing = [m for m in self.image_metrics if m not in {r.metric for r in results}]
        if missing:
            network = FeatureNetwork.from_dict(self.network.facts() | {"dims": y.shape[1]})
            setup = MeasurementSetup(
                seed=options.seed,
                num_inference_steps=images.options.get("num_inference_steps"),
                scheduler=options.scheduler or images.options.get("scheduler"),
                seconds_per_image=images.seconds_per_image,
                reference_split=real.reference_split,
                held_out_split=real.held_out_split,
                features=network,
                inputs=inputs,
            )
            measured = self._measure(missing, x, y, z, options.seed, rows)
            results += [replace(result, setup=setup) for result in measured]
        with failures_as_warnings():
            has_pairs = "memorisation" in self.image_metrics
            pairs = closest_pairs(x, y, _NUM_CLOSEST_PAIRS) if has_pairs else []
            save_samples(folder, images, real.reference, pairs)
        return [r for metric in self.image_metrics for r in results if r.metric == metric]

    def _measure(
        self,
        metrics: Sequence[str],
        x: Tensor,
        y: Tensor,
        z: Tensor | None,
        seed: int,
        rows: RowsByClass | None,
    ) -> list[MetricResult]:
        device = self.state.device
        results = measure(metrics, x, y, z, seed=seed, device=device)
        if rows is None:
            return results
        by_metric = [[r for r in results if r.metric == metric] for metric in metrics]
        return [
            result
            for of_metric in by_metric
            for result in with_classes(of_metric, rows, x, y, z, seed=seed, device=device)
        ]

    def _features(self, images: DrawnImages, rows: range | None = None) -> Tensor | None:
        return features_of(
            images,
            self.network,
            self.state,
            rows=rows,
            batch_size=self.options.batch_size,
            progress=self.progress,
        )


def _digest(x: Tensor, y: Tensor, z: Tensor | None, seed: int, rows: RowsByClass | None) -> str:
    """Digest of everything that determines the metrics of images."""
    sums = hashlib.sha256(repr((seed, version("ddpm-hf"))).encode())
    for name, of_class in (rows or {}).items():
        sums.update(repr((name, [subset.tolist() for subset in of_class])).encode())
    for features in (x, y) if z is None else (x, y, z):
        sums.update(repr(features.shape).encode())
        sums.update(features.numpy().tobytes())
    return sums.hexdigest()
