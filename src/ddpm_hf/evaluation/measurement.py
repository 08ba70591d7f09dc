"""The measuring itself: on one data set and by one set of options, of any number of subjects."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.image_processor import ImageFacts
from ddpm_hf.digests import weights_digest
from ddpm_hf.evaluation.dataset_likelihood import BoundOptions, forget_parts, measure_bits_per_dim
from ddpm_hf.evaluation.features import DEFAULT_FEATURES, Features, features_of, load_features
from ddpm_hf.evaluation.metrics import FEWEST, METRICS, closest_pairs, measure
from ddpm_hf.evaluation.model_images import facts_of, images_for
from ddpm_hf.evaluation.per_class import Rows, add_classes, rows_of_classes
from ddpm_hf.evaluation.report import BITS, read_results, report_of, write_report
from ddpm_hf.evaluation.sets import DataSource, facts_of_set, image_set, picture
from ddpm_hf.evaluation.training_record import held_out_by_training
from ddpm_hf.hub.load import load
from ddpm_hf.pictures import image_grid
from ddpm_hf.sampling import DrawnImages, draw_to
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.shared_work import distributed_state
from ddpm_hf.text import public_name

ALL_METRICS = (BITS, *METRICS)
MOST_DRAWN = 10_000
_NUM_SHOWN, _NUM_PAIRS = 64, 16


@dataclass(frozen=True)
class EvaluationOptions:
    """How it is measured; see `evaluate`."""

    features: Any = DEFAULT_FEATURES
    num_images: int | None = None
    seed: int = 0
    split: str | None = None
    reference_split: str = "train"
    dataset_config: str | None = None
    dataset_revision: str | None = None
    image_column: str | None = None
    class_column: str | None = None
    per_class: bool = False
    on_bad_image: str = "error"
    scheduler: str | None = None
    num_inference_steps: int | None = None
    num_timesteps: int | None = None
    decoder: str = "exact"
    batch_size: int = 64
    revision: str | None = None
    variant: str | None = None
    use_safetensors: bool = True

    def recorded(self) -> dict[str, Any]:
        """What decides the figures, as JSON values."""
        loading = ("revision", "variant", "use_safetensors")
        options = {name: value for name, value in vars(self).items() if name not in loading}
        return options | {"features": name_of(self.features)}


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        source: a pipeline on the device of this process, or images.
        name: for people.
        weights: the digest of a pipeline's; None of images.
    """

    source: Any
    name: str
    weights: str | None = None


@dataclass(frozen=True)
class RealImages:
    """The real images that others are compared with; features on the main process only.

    Attributes:
        reference, held_out: the names of the splits.
        images, others: those of the reference, and those held out, if any.
        x, z: features of the reference and of the images held out, (N, d), where there are any.
    """

    reference: str
    held_out: str | None
    images: DrawnImages
    others: DrawnImages | None
    x: Tensor | None
    z: Tensor | None


def is_model(source: Any) -> bool:
    """A pipeline, a folder with the index of one, or a name that is no path here."""
    if not isinstance(source, str | os.PathLike):
        return hasattr(source, "unet")
    path = Path(source).expanduser()
    return (path / "model_index.json").is_file() or not path.exists()


def name_of(source: Any) -> str:
    """What a model, images or features are called where others read it."""
    if isinstance(source, str | os.PathLike):
        return public_name(os.fspath(source))
    return source.name if isinstance(source, Features) else type(source).__name__


class Evaluator:
    """Measures subjects; what is of the real images alone, once.

    Args:
        dataset: as for `evaluate`.
        metrics: of `ALL_METRICS`.
        options: how.
        progress: show progress bars, on the main process.
    Raises:
        ValueError: for options that nothing can be measured by.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Sequence[str],
        options: EvaluationOptions,
        *,
        progress: bool = True,
    ) -> None:
        _check(metrics, options.num_images)
        self.metrics, self.options = tuple(metrics), options
        self.state = distributed_state()
        self.progress = progress and self.state.is_main_process
        self.data = DataSource(
            dataset,
            options.split,
            options.reference_split,
            options.dataset_config,
            options.dataset_revision,
            options.image_column,
            options.on_bad_image,
        )
        self._real: dict[tuple[Any, ...], RealImages] = {}

    def use_held_out_of(self, sources: Sequence[Any]) -> None:
        """Heed the images that the training of all models among these held out, if they agree."""
        options = self.options
        self.data = held_out_by_training(
            self.data,
            [source for source in sources if is_model(source)],
            revision=options.revision,
            use_safetensors=options.use_safetensors,
            progress=self.progress,
        )

    @cached_property
    def network(self) -> Features:
        """What images are compared by."""
        return load_features(self.options.features, self.state.device)

    def real(self, facts: ImageFacts) -> RealImages:
        """The real images in this size, mode and depth, with their features."""
        key = (facts.mode, facts.height, facts.width, facts.bit_depth)
        if key not in self._real:
            reference, held_out = self.data.parts()
            if self.data.hold_out is not None and self.data.hold_out.num_held_out < self._fewest():
                held_out = None  # the floor is between halves of those that were trained on
            labels: Any = (self.options.class_column or True) if self.options.per_class else None
            images = self.data.images(reference, facts, self.progress, labels)
            x = self._features(images)
            others = self.data.images(held_out, facts, self.progress, labels) if held_out else None
            z = self._features(others) if others else None
            names = reference.split, held_out.split if held_out else None
            self._real[key] = RealImages(*names, images, others, x, z)
        return self._real[key]

    def _fewest(self) -> int:
        """Images that a floor takes."""
        return max(FEWEST[name] for name in self.metrics if name != BITS)

    def load(self, source: Any) -> Subject:
        """A model on the device of this process, or images.

        Raises:
            ValueError, OSError: if there is none.
        """
        if not is_model(source):
            return Subject(image_set(source), name_of(source))
        pipeline, options = source, self.options
        if not hasattr(source, "unet"):
            pipeline = load(
                os.fspath(source),
                revision=options.revision,
                variant=options.variant,
                use_safetensors=options.use_safetensors,
            )
        pipeline = pipeline.to(self.state.device)
        return Subject(pipeline, name_of(source), weights_digest(pipeline.unet))

    def facts(self, subject: Subject) -> ImageFacts:
        """What its images are."""
        if subject.weights is None:
            return facts_of_set(subject.source)
        return facts_of(subject.source.unet)

    def evaluate(self, subject: Subject, folder: Path, **changes: Any) -> dict[str, Any] | None:
        """Measure one subject.

        Args:
            subject: of `load`.
            folder: gets evaluation.json, the pictures, and the drawn images.
            **changes: of the options.
        Returns:
            what evaluation.json holds; None on all but the main process.
        Raises:
            ValueError, OSError: if something cannot be measured.
        """
        options = replace(self.options, **changes)
        folder.mkdir(parents=True, exist_ok=True)
        if subject.weights is None:
            for name in ("scheduler", "num_inference_steps"):
                if getattr(options, name) is not None:
                    raise ValueError(f"{name} is of a model; these are images")
            results = self._measure(subject, options, folder)
        else:
            sampler = (
                SchedulerSpec.parse(options.scheduler) if options.scheduler else SchedulerSpec()
            )
            with sampled_by(subject.source, sampler):
                results = self._measure(subject, options, folder, sampler.eta)
        if not self.state.is_main_process:
            return None
        report = report_of(
            {"name": subject.name, "revision": options.revision, "weights": subject.weights},
            self.data.facts() | {"image": self.facts(subject).to_config()["image"]},
            results,
            {"metrics": list(self.metrics), **options.recorded()},
        )
        write_report(folder, report)
        for result in results:
            if result["name"] == BITS:
                forget_parts(folder, result)
        return report

    def _measure(
        self, subject: Subject, options: EvaluationOptions, folder: Path, eta: float | None = None
    ) -> list[dict[str, Any]]:
        """The results, on the main process."""
        results = []
        if BITS in self.metrics:
            if subject.weights is None:
                raise ValueError(f"metrics {BITS} is of a model; these are images")
            results += [self._bits(subject.source, options, folder)]
        if compared := [name for name in self.metrics if name != BITS]:
            self.real(self.facts(subject))  # what is wrong with them is said before the drawing
            drawn = subject.source
            if subject.weights is not None:
                if options.per_class and not subject.source.unet.config.num_class_embeds:
                    raise ValueError("per_class is of class-conditional models; this one is none")
                drawn = self._draw(subject.source, options, folder, eta)
            results += self._compare(drawn, compared, options, folder)
        return [result for result in results if result is not None]

    def _bits(self, pipeline: Any, options: EvaluationOptions, folder: Path) -> Any:
        """Bits/dim of the held-out images."""
        number, part = options.num_images, self.data.measured()
        images = images_for(
            pipeline.unet,
            self.data.rows(part.split),
            rows=part.rows,
            num_images=number if self.metrics == (BITS,) else None,
            at_most=number,
            seed=options.seed,
            image_column=options.image_column,
            label_column=options.class_column or True,
            on_bad_image=options.on_bad_image,
            progress=self.progress,
        )
        names = ("num_inference_steps", "num_timesteps", "decoder", "seed", "batch_size")
        known = [result for result in read_results(folder) if result["name"] == BITS]
        return measure_bits_per_dim(
            pipeline.unet,
            pipeline.scheduler,
            images,
            BoundOptions(**{name: getattr(options, name) for name in names}),
            folder,
            self.state,
            known=known[0] if known else None,
            progress=self.progress,
        )

    def _compare(
        self,
        drawn: DrawnImages,
        metrics: Sequence[str],
        options: EvaluationOptions,
        folder: Path,
    ) -> list[dict[str, Any]]:
        """The figures that compare drawn images with real ones, or those known from before."""
        real = self.real(facts_of_set(drawn))
        num_drawn = min(len(drawn), options.num_images or len(drawn))
        y = self._features(drawn, range(num_drawn))
        rows = None
        if options.per_class:
            rows = rows_of_classes(real.images, drawn, real.others, num_drawn)
        if real.x is None or y is None:
            return []
        x, z, seed = real.x, real.z, options.seed
        how = {
            "seed": seed,
            "num_inference_steps": drawn.options.get("num_inference_steps"),
            "scheduler": options.scheduler or drawn.options.get("scheduler"),
            "seconds_per_image": drawn.seconds_per_image,
            "reference_split": real.reference,
            "held_out_split": real.held_out,
            "features": self.network.facts() | {"dims": y.shape[1]},
            "inputs": _digest(x, y, z, seed, rows),
        }
        known = [r for r in read_results(folder) if r.get("inputs") == how["inputs"]]
        missing = [name for name in metrics if name not in {r.get("metric") for r in known}]
        if missing:
            where = {"seed": seed, "device": self.state.device}
            measured = measure(missing, x, y, z, **where)
            if rows is not None:
                for metric in missing:
                    of_metric = [figure for figure in measured if figure["metric"] == metric]
                    add_classes(of_metric, rows, x, y, z, **where)
            known += [figure | how for figure in measured]
        figures = [r for name in metrics for r in known if r.get("metric") == name]
        try:
            pairs = closest_pairs(x, y, _NUM_PAIRS) if "memorisation" in metrics else []
            _save_pictures(folder, drawn, real.images, pairs)
        except Exception as error:  # a picture must not cost the figures
            warnings.warn(f"the pictures were not drawn: {error}", stacklevel=2)
        return figures

    def _features(self, images: DrawnImages, rows: range | None = None) -> Tensor | None:
        return features_of(
            images,
            self.network,
            self.state,
            rows=rows,
            batch_size=self.options.batch_size,
            progress=self.progress,
        )

    def _draw(
        self, pipeline: Any, options: EvaluationOptions, folder: Path, eta: float | None
    ) -> DrawnImages:
        """As many images by the seed; of a class-conditional model, its classes in turn."""
        facts, number = facts_of(pipeline.unet), options.num_images
        return draw_to(
            pipeline,
            folder / "drawn",
            number or min(len(self.real(facts).images), MOST_DRAWN),
            seed=options.seed,
            batch_size=options.batch_size,
            overwrite=True,
            progress=self.progress,
            num_inference_steps=options.num_inference_steps,
            eta=eta,
        )


def _check(metrics: Sequence[str], num_images: int | None) -> None:
    if unknown := [name for name in metrics if name not in ALL_METRICS]:
        raise ValueError(f"metrics must be of {', '.join(ALL_METRICS)}, got {unknown[0]!r}")
    if not metrics:
        raise ValueError(f"metrics is empty; choices: {', '.join(ALL_METRICS)}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")


def _digest(x: Tensor, y: Tensor, z: Tensor | None, seed: int, rows: Rows | None) -> str:
    """Tells what figures follow from."""
    sums = hashlib.sha256(repr((seed, version("ddpm-hf"))).encode())
    for name, of_class in (rows or {}).items():
        sums.update(repr((name, [part.tolist() for part in of_class])).encode())
    for features in (x, y) if z is None else (x, y, z):
        sums.update(repr(features.shape).encode())
        sums.update(features.numpy().tobytes())
    return sums.hexdigest()


def _save_pictures(
    folder: Path, drawn: DrawnImages, real: DrawnImages, pairs: list[tuple[int, int]]
) -> None:
    """Some of the drawn images, and the closest pairs: a drawn one, then the real one."""
    shown = range(min(_NUM_SHOWN, len(drawn)))
    image_grid([picture(drawn, row) for row in shown]).save(folder / "samples.png")
    if pairs:
        cells = [picture(s, i) for pair in pairs for s, i in zip((drawn, real), pair, strict=True)]
        image_grid(cells, columns=8).save(folder / "closest-pairs.png")
