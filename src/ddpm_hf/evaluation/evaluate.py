"""A model, or images, measured on a data set in one call."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from ddpm_hf.diffusion.images import ImageFacts
from ddpm_hf.evaluation.features import DEFAULT_FEATURES, Features, features_of, load_features
from ddpm_hf.evaluation.images import facts_of, images_for
from ddpm_hf.evaluation.likelihood import BoundOptions, forget_parts, measure_bits_per_dim
from ddpm_hf.evaluation.metrics import METRICS, closest_pairs, measure
from ddpm_hf.evaluation.report import BITS, read_result, report_of, write_report
from ddpm_hf.evaluation.sets import DataSource, facts_of_set, image_set
from ddpm_hf.hub.load import load
from ddpm_hf.names import public_name
from ddpm_hf.parts import join_processes
from ddpm_hf.pictures import image_grid, to_pil
from ddpm_hf.sampling import DrawnImages, draw_to
from ddpm_hf.sampling.settings import weights_digest

ALL_METRICS = (BITS, *METRICS)
MOST_DRAWN = 10_000
_NUM_SHOWN, _NUM_PAIRS = 64, 16


def evaluate(
    model_or_images: Any,
    dataset: Any,
    *,
    metrics: Sequence[str] | None = None,
    features: Any = DEFAULT_FEATURES,
    num_images: int | None = None,
    seed: int = 0,
    split: str = "test",
    reference_split: str = "train",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
    on_bad_image: str = "error",
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
            "bits-per-dim" is of a model alone. By default that for a model, the others for images.
        features: what images are compared by; see `evaluation.features.load_features`.
        num_images: images to draw; by default as many as there are real ones, at most 10,000. For
            bits/dim, real images to use; by default all.
        seed: of the images, the noise, and the halves that intervals come from.
        split: of real images that the model was not trained on: for bits/dim, and for the floor.
        reference_split: of those that it was trained on, which drawn ones are compared with. Of the
            two, one that does not exist is done without; then the floor is between halves.
        dataset_config, dataset_revision: of a data set on the Hub.
        image_column: needed only if there are several.
        class_column: of a class-conditional model's classes, for bits/dim.
        on_bad_image: "error" or "skip".
        num_inference_steps: K, of the sampler and of the bound.
        num_timesteps, decoder: of the bound; see `bits_per_dim`.
        batch_size: images at once.
        output: folder for evaluation.json, the pictures, and the drawn images.
        revision, variant, use_safetensors: of the model; see `load`.
        progress: show progress bars.
    Returns:
        what evaluation.json holds; None on all but the main process.
    Raises:
        ValueError, OSError: if something cannot be loaded or measured.
    """
    options = {
        "features": features, "num_images": num_images, "seed": seed, "split": split,
        "reference_split": reference_split, "dataset_config": dataset_config,
        "dataset_revision": dataset_revision, "image_column": image_column,
        "class_column": class_column, "on_bad_image": on_bad_image,
        "num_inference_steps": num_inference_steps, "num_timesteps": num_timesteps,
        "decoder": decoder, "batch_size": batch_size,
    }  # fmt: skip
    if metrics is None:
        metrics = (BITS,) if _is_model(model_or_images) else tuple(METRICS)
    _check(metrics, num_images)
    state = join_processes()
    if output is None and state.num_processes > 1:
        raise ValueError("output must be a folder where several processes share the work")
    data = DataSource(
        dataset,
        split,
        reference_split,
        dataset_config,
        dataset_revision,
        image_column,
        on_bad_image,
    )
    subject = model_or_images
    if _is_model(subject):
        if not hasattr(subject, "unet"):
            name = os.fspath(subject)
            subject = load(
                name, revision=revision, variant=variant, use_safetensors=use_safetensors
            )
        subject = subject.to(state.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        job = _Job(subject, data, options, folder, state, progress and state.is_main_process)
        facts, results = job.measure(metrics)
    if not state.is_main_process:
        return None
    weights = weights_digest(subject.unet) if _is_model(subject) else None
    report = report_of(
        {"name": _name_of(model_or_images), "revision": revision, "weights": weights},
        data.facts() | {"image": facts.to_config()["image"]},
        results,
        {"metrics": list(metrics), **options, "features": _name_of(features)},
    )
    if output is not None:
        write_report(folder, report)
        for result in results:
            if result["name"] == BITS:
                forget_parts(folder, result)
    return report


def _check(metrics: Sequence[str], num_images: int | None) -> None:
    if unknown := [name for name in metrics if name not in ALL_METRICS]:
        raise ValueError(f"metrics must be of {', '.join(ALL_METRICS)}, got {unknown[0]!r}")
    if not metrics:
        raise ValueError(f"metrics is empty; choices: {', '.join(ALL_METRICS)}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")


def _is_model(source: Any) -> bool:
    """A pipeline, a folder with the index of one, or a name that is no path here."""
    if not isinstance(source, str | os.PathLike):
        return hasattr(source, "unet")
    path = Path(source).expanduser()
    return (path / "model_index.json").is_file() or not path.exists()


def _name_of(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return public_name(os.fspath(source))
    return source.name if isinstance(source, Features) else type(source).__name__


@dataclass(frozen=True)
class _Job:
    """One evaluation: what, on which data, and where it is kept."""

    subject: Any
    data: DataSource
    options: dict[str, Any]
    folder: Path
    state: PartialState
    progress: bool

    def measure(self, metrics: Sequence[str]) -> tuple[ImageFacts, list[dict[str, Any]]]:
        """What the images are; on the main process the results."""
        results: list[dict[str, Any]] = []
        if BITS in metrics:
            if not _is_model(self.subject):
                raise ValueError(f"metrics {BITS} is of a model; these are images")
            facts, bits = self._bits(is_alone=len(metrics) == 1)
            results += [] if bits is None else [bits]
        if compared := [name for name in metrics if name != BITS]:
            facts, figures = self._compare(compared)
            results += figures
        return facts, results

    def _bits(self, is_alone: bool) -> tuple[ImageFacts, dict[str, Any] | None]:
        """Bits/dim of the held-out images."""
        options, data, unet = self.options, self.data, self.subject.unet
        number = options["num_images"]
        images = images_for(
            unet,
            data.rows(data.split),
            num_images=number if is_alone else None,
            at_most=number,
            seed=options["seed"],
            image_column=data.image_column,
            label_column=options["class_column"] or True,
            on_bad_image=data.on_bad_image,
            progress=self.progress,
        )
        names = ("num_inference_steps", "num_timesteps", "decoder", "seed", "batch_size")
        result = measure_bits_per_dim(
            unet,
            self.subject.scheduler,
            images,
            BoundOptions(**{name: options[name] for name in names}),
            self.folder,
            self.state,
            known=read_result(self.folder, BITS),
            progress=self.progress,
        )
        return images.facts, result

    def _compare(self, metrics: Sequence[str]) -> tuple[ImageFacts, list[dict[str, Any]]]:
        """The figures that compare drawn images with real ones."""
        network = load_features(self.options["features"], self.state.device)
        given = None if _is_model(self.subject) else image_set(self.subject)
        facts = facts_of(self.subject.unet) if given is None else facts_of_set(given)
        reference, held_out = self.data.splits()
        real = self.data.images(reference, facts, self.progress)
        number = self.options["num_images"]
        drawn = given or self._draw(number or min(len(real), MOST_DRAWN))

        def features(images: DrawnImages, rows: range | None = None) -> Tensor | None:
            size = self.options["batch_size"]
            return features_of(
                images, network, self.state, rows=rows, batch_size=size, progress=self.progress
            )

        x, y = features(real), features(drawn, range(min(len(drawn), number or len(drawn))))
        z = features(self.data.images(held_out, facts, self.progress)) if held_out else None
        if x is None or y is None:
            return facts, []
        seed = self.options["seed"]
        how = {
            "seed": seed,
            "num_inference_steps": drawn.options.get("num_inference_steps"),
            "scheduler": drawn.options.get("scheduler"),
            "reference_split": reference,
            "held_out_split": held_out,
            "features": network.facts() | {"dims": y.shape[1]},
        }
        figures = [
            figure | how for metric in metrics for figure in measure(metric, x, y, z, seed=seed)
        ]
        try:
            pairs = closest_pairs(x, y, _NUM_PAIRS) if "memorisation" in metrics else []
            _save_pictures(self.folder, drawn, real, pairs)
        except Exception as error:  # a picture must not cost the figures
            warnings.warn(f"the pictures were not drawn: {error}", stacklevel=2)
        return facts, figures

    def _draw(self, num_images: int) -> DrawnImages:
        """As many images by the seed; of a class-conditional model, its classes in turn."""
        unet = self.subject.unet
        names, count = facts_of(unet).class_names, unet.config.num_class_embeds
        return draw_to(
            self.subject,
            self.folder / "drawn",
            num_images,
            seed=self.options["seed"],
            batch_size=self.options["batch_size"],
            class_labels=list(range(len(names) if names else count)) if count else None,
            overwrite=True,
            progress=self.progress,
            num_inference_steps=self.options["num_inference_steps"],
        )


def _save_pictures(
    folder: Path, drawn: DrawnImages, real: DrawnImages, pairs: list[tuple[int, int]]
) -> None:
    """Some of the drawn images, and the closest pairs: a drawn one, then the real one."""

    def picture(images: DrawnImages, row: int) -> Any:
        (pixels,) = images.read(range(row, row + 1))
        most = 65535 if pixels.dtype == "uint16" else 255
        return to_pil(pixels / most)

    shown = range(min(_NUM_SHOWN, len(drawn)))
    image_grid([picture(drawn, row) for row in shown]).save(folder / "samples.png")
    if pairs:
        cells = [picture(s, i) for pair in pairs for s, i in zip((drawn, real), pair, strict=True)]
        image_grid(cells, columns=8).save(folder / "closest-pairs.png")
