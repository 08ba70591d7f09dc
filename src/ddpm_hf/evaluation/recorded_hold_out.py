"""Images that training held out, identified in the dataset of an evaluation."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ddpm_hf.data import DataError
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.checkpoint_limits import component_folder
from ddpm_hf.diffusion.config_extension import EXTENSION_KEY
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.evaluation.data_source import DataSource
from ddpm_hf.evaluation.model_images import prepared_like
from ddpm_hf.hub.download import fetch
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.paths import ModelPaths


@dataclass(frozen=True)
class HoldOutRecord:
    """Hold-out of a training.json: the images, a digest of their pixels, and their format."""

    hold_out: HoldOut
    digest: str
    facts: ImageFacts


def as_in_training(
    data: DataSource, models: Sequence[Any], options: LoadOptions, *, progress: bool = True
) -> DataSource:
    """The data with the hold-out and the class column that the models' training.json files record.

    The hold-out is not used if a held-out split is requested or exists, or no model records one. It
    is not used, with a warning, if the images differ, or the models record different hold-outs; of
    different class columns none is used.

    Args:
        data: what the models are measured on.
        models: names or folders; pipelines have no record.
        options: of the models; see `load`.
        progress: show progress bars.
    Raises:
        ValueError, OSError: if a model or the reference split does not exist.
    """
    needs_hold_out = bool(models) and not data.has_held_out_split()
    if needs_hold_out:
        data.check_reference_split()
    revision, use_safetensors = options.revision, options.use_safetensors
    paths = [
        ModelPaths(fetch(os.fspath(model), revision=revision, use_safetensors=use_safetensors))
        for model in models
        if isinstance(model, str | os.PathLike)
    ]
    if needs_hold_out:
        try:
            data = _with_hold_out(data, len(models), paths, progress)
        except ValueError as error:
            warnings.warn(f"the recorded hold-out is not used: {error}", stacklevel=2)
    columns = set()
    for path in paths:
        with suppress(ValueError, AttributeError):
            column = (read_json(path.facts).get("config") or {}).get("class_column")
            columns |= {column} if isinstance(column, str) else set()
    return replace(data, trained_class_column=columns.pop()) if len(columns) == 1 else data


def _with_hold_out(
    data: DataSource, num_models: int, paths: Sequence[ModelPaths], progress: bool
) -> DataSource:
    """The data with the hold-out of all models.

    Raises:
        ValueError: if the images differ, or the models record different hold-outs.
    """
    training_facts = [read_json(path.facts) for path in paths]
    records = [record for facts in training_facts if (record := record_in(facts))]
    if not records:
        return data
    if len(records) < num_models or len({record.hold_out for record in records}) > 1:
        raise DataError("the models record different hold-outs")
    for path, record in zip(paths, records, strict=True):
        _check_network(path, record.facts)
    for record in dict.fromkeys(records):
        _check(data, record, progress)
    for base in [facts["base_model"] for facts in training_facts if _has_other_base(facts)]:
        warnings.warn(
            f"the base model {base} may have been trained on the images that training held out",
            stacklevel=3,
        )
    return replace(data, hold_out=records[0].hold_out)


def record_in(facts: Any) -> HoldOutRecord | None:
    """The hold-out in the content of a training.json, if any.

    Raises:
        ValueError: if it has an unknown form.
    """
    try:
        dataset = (facts or {}).get("dataset") or {}
        if "held_out" not in dataset:
            return None
        hold_out, image = dict(dataset["held_out"]), ImageFacts(**dataset["image"])
        digest = hold_out.pop("digest")
        return HoldOutRecord(digest=digest, hold_out=HoldOut(**hold_out), facts=image)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f'invalid "held_out" in training.json: {error!r}') from None


def _check_network(paths: ModelPaths, facts: ImageFacts) -> None:
    """Raise ValueError unless the network was trained on images of this format."""
    path = component_folder(paths.root, "unet") / "config.json"
    trained_on = ImageFacts.from_config(read_json(path).get(EXTENSION_KEY))
    if trained_on.to_config()["image"] != facts.to_config()["image"]:
        raise ValueError(
            f"training.json has {facts.width}x{facts.height} {facts.mode} images, but the network"
            f" {trained_on.width}x{trained_on.height} {trained_on.mode}"
        )


def _check(data: DataSource, record: HoldOutRecord, progress: bool) -> None:
    """Raise DataError unless the dataset has the images of the run."""
    rows, expected = data.rows(data.options.reference_split), record.hold_out.num_images
    if len(rows) < expected or (data.options.on_bad_image == "error" and len(rows) > expected):
        raise DataError(f"the training run had {expected:,} images, got {len(rows):,}")
    images = prepared_like(
        record.facts,
        rows,
        progress=progress,
        image_column=data.options.image_column,
        on_bad_image=data.options.on_bad_image,
    )
    if record.hold_out.digest(images) != record.digest:
        raise DataError("the images differ from those of the run, or the run used random crops")


def _has_other_base(facts: Mapping[str, Any]) -> bool:
    """Whether the base model does not record the same hold-out."""
    return "base_model" in facts and record_in(facts.get("base")) != record_in(facts)
