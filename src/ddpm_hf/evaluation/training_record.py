"""What the training of models held out itself, found again in the data to measure them on."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddpm_hf.data import DataError
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.image_processor import ImageFacts
from ddpm_hf.evaluation.model_images import prepared_like
from ddpm_hf.evaluation.sets import DataSource
from ddpm_hf.hub.load import fetch
from ddpm_hf.paths import ModelPaths


@dataclass(frozen=True)
class Record:
    """What a training.json tells of held-out images: which they are, and how they look."""

    hold_out: HoldOut
    digest: str
    facts: ImageFacts


def held_out_by_training(
    data: DataSource,
    models: Sequence[Any],
    *,
    revision: str | None = None,
    use_safetensors: bool = True,
    progress: bool = True,
) -> DataSource:
    """The data with the `hold_out` that the models' training.json tell of.

    Without it where a split of held-out images is asked for or there, and where no model tells of
    any; with a warning also where the data are others, or not all models tell of the same images.

    Args:
        data: what the models are measured on.
        models: names or folders; a pipeline tells of nothing.
        revision, use_safetensors: of the models; see `load`.
        progress: show progress bars.
    Raises:
        ValueError, OSError: if there is no such model, or no such reference split.
    """
    if not models or data.has_held_out_split():
        return data
    data.rows(data.reference_split)  # raises where there is none
    paths = [
        ModelPaths(fetch(os.fspath(model), revision=revision, use_safetensors=use_safetensors))
        for model in models
        if isinstance(model, str | os.PathLike)
    ]
    try:
        told = [read_json(path.facts) for path in paths]
        records = [record for facts in told if (record := record_in(facts))]
        if not records:
            return data
        if len(records) < len(models) or len({record.hold_out for record in records}) > 1:
            raise DataError("not all of the models tell of the same ones")
        for record in dict.fromkeys(records):
            _check(data, record, progress)
        bases = [facts["base_model"] for facts in told if _has_other_base(facts)]
    except ValueError as error:
        warnings.warn(f"the images that training held out are not used: {error}", stacklevel=2)
        return data
    for base in bases:
        warnings.warn(
            f"the base model {base} may have been trained on the images that training held out",
            stacklevel=2,
        )
    return replace(data, hold_out=records[0].hold_out)


def record_in(facts: Any) -> Record | None:
    """What this content of a training.json tells of held-out images, if anything.

    Raises:
        ValueError: if that cannot be understood.
    """
    try:
        dataset = (facts or {}).get("dataset") or {}
        if "held_out" not in dataset:
            return None
        drawn, image = dict(dataset["held_out"]), ImageFacts(**dataset["image"])
        return Record(digest=drawn.pop("digest"), hold_out=HoldOut(**drawn), facts=image)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"training.json tells of them in another form: {error!r}") from error


def _check(data: DataSource, record: Record, progress: bool) -> None:
    """Raise DataError unless these are the images of the run."""
    images = prepared_like(
        record.facts,
        data.rows(data.reference_split),
        image_column=data.image_column,
        on_bad_image=data.on_bad_image,
        progress=progress,
    )
    if record.hold_out.digest(images) != record.digest:
        raise DataError(
            "the images in their places are others than those of the run, or it cropped at random"
        )


def _has_other_base(facts: dict[str, Any]) -> bool:
    """Whether training began with a model that does not tell of the same images."""
    return "base_model" in facts and record_in(facts.get("base")) != record_in(facts)
