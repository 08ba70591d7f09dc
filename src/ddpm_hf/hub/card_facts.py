"""Facts of a model card, read once from `training.json` and the configurations of a checkpoint.

The files may come from anyone: a missing or ill-typed value becomes None, or an empty collection,
and the card says "not recorded". The classes hold what the card shows of a JSON object.
"""

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.config_extension import Config, beta_schedule_of, extension_of
from ddpm_hf.hub.model_files import count_parameters
from ddpm_hf.json_records import JsonObject, from_json
from ddpm_hf.paths import ModelPaths
from ddpm_hf.run_record import EmaFacts


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Base of the facts: one field per key of a JSON object."""

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The facts of a JSON object; never fails, see the module."""
        values = content if isinstance(content, dict) else {}
        hints = typing.get_type_hints(cls)
        return cls(**{name: _tolerant(kind, values.get(name)) for name, kind in hints.items()})


def _tolerant(annotation: Any, value: Any) -> Any:
    """`value` if it has the annotated type, else None or an empty collection."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:  # one item may stand for a list
        items = value if isinstance(value, list) else [value]
        if issubclass(arguments[0], Facts):
            items = [item for item in items if isinstance(item, dict)]
        return tuple(x for item in items if (x := _tolerant(arguments[0], item)) is not None)
    if origin is dict:
        entries = value.items() if isinstance(value, dict) else ()
        pairs = ((str(key), _tolerant(arguments[1], item)) for key, item in entries)
        return {key: item for key, item in pairs if item is not None}
    if annotation is object:
        return value
    if isinstance(annotation, type) and issubclass(annotation, Facts):
        return annotation.from_dict(value)
    try:
        return from_json(annotation, value)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class ImageFormatFacts(Facts):
    """Format of the images, before padding."""

    mode: str | None
    height: int | None
    width: int | None
    bit_depth: int | None


@dataclass(frozen=True, kw_only=True)
class DataFacts(Facts):
    """A dataset; `left_out` counts files that are not images, by reason."""

    name: str | None
    hub_id: str | None
    split: str | None
    num_images: int | None
    num_skipped: int | None
    left_out: dict[str, int]
    image: ImageFormatFacts
    num_classes: int | None


@dataclass(frozen=True, kw_only=True)
class MetricFacts(Facts):
    """A measured figure; see `run_record.MetricRecord`."""

    name: str | None
    type: str | None
    value: float | None
    how: str | None
    dataset: DataFacts
    args: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class NetworkFacts(Facts):
    """The network; `sample_size` is (size,) or (height, width)."""

    sample_size: tuple[int, ...]
    num_class_embeds: int | None
    num_parameters: int | None


@dataclass(frozen=True, kw_only=True)
class SamplerFacts(Facts):
    """Specification of a scheduler, and a number of steps."""

    scheduler: str | None
    num_inference_steps: int | None


@dataclass(frozen=True, kw_only=True)
class SchedulerFacts(Facts):
    """The scheduler; `settings` are those that the card lists."""

    class_name: str | None
    settings: dict[str, object]
    num_train_timesteps: int | None
    calibrated_timesteps: dict[str, object]
    recommended: SamplerFacts

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The facts of a JSON object that has the settings among its keys."""
        values = content if isinstance(content, dict) else {}
        hidden = ("class", "calibrated_timesteps", "recommended")
        settings = {key: value for key, value in values.items() if key not in hidden}
        known = {**values, "class_name": values.get("class"), "settings": settings}
        return super().from_dict(known)


@dataclass(frozen=True, kw_only=True)
class StepsFacts(Facts):
    """Bits/dim of K steps; see `evaluation.calibration_results.StepsRow`."""

    num_inference_steps: int | None
    bits_per_dim: float | None
    published: float | None


@dataclass(frozen=True, kw_only=True)
class FigureFacts(Facts):
    """A ranked figure; see `evaluation.comparison_results.RankedFigure`."""

    value: float | None
    interval: tuple[float, ...]
    rank: str | None


@dataclass(frozen=True, kw_only=True)
class SettingFacts(SamplerFacts):
    """A setting of a sweep; see `evaluation.comparison_results.ComparisonRow`."""

    num_network_calls: int | None
    seconds_per_image: float | None
    figures: dict[str, FigureFacts]


@dataclass(frozen=True, kw_only=True)
class SweepFacts(Facts):
    """A sweep over samplers; see `evaluation.comparison_results.Sweep`."""

    settings: tuple[SettingFacts, ...]
    remarks: tuple[str, ...]
    for_stock: SamplerFacts


@dataclass(frozen=True, kw_only=True)
class CalibrationFacts(Facts):
    """Bits/dim of few steps, how they were measured, and a sweep."""

    rows: tuple[StepsFacts, ...]
    how: str | None
    sweep: SweepFacts


@dataclass(frozen=True, kw_only=True)
class TrainingFacts(Facts):
    """A training; `base_model` is the model that was fine-tuned."""

    base_model: str | None
    dataset: DataFacts
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class CardFacts(TrainingFacts):
    """All facts of a card: `run_record.RunRecord`, and those of the configurations."""

    model_name: str | None
    license: str | None
    base: TrainingFacts
    config: dict[str, object]
    num_images_seen: int | None
    duration_s: float | None
    hardware: str | None
    computation: dict[str, object]
    versions: dict[str, object]
    created: str | None
    kept_by: str | None
    metrics: tuple[MetricFacts, ...]
    ema: EmaFacts | None
    calibration: CalibrationFacts
    unet: NetworkFacts
    scheduler: SchedulerFacts
    image: ImageFormatFacts
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    has_null_class: bool | None
    samples: bool | None

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes class labels."""
        return bool(self.unet.num_class_embeds)


_IMAGE_FACTS = ("image", "class_names", "class_counts", "has_null_class")


def recorded_facts(folder: str | Path) -> JsonObject:
    """The JSON object that a card is made from.

    Args:
        folder: a portable checkpoint; `training.json` in it is optional.
    Returns:
        the content of `training.json`, with "unet", "scheduler", "image", the classes and
        "samples" of the checkpoint itself.
    Raises:
        ValueError: if one of the files is not valid JSON.
    """
    folder = Path(folder)
    unet = read_json(folder / "unet" / "config.json")
    keys = ("sample_size", "in_channels", "num_class_embeds")
    network = {key: unet[key] for key in keys if unet.get(key) is not None}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return {
        **read_json(ModelPaths(folder).facts),
        "unet": {**network, "num_parameters": count_parameters(folder / "unet")},
        "scheduler": _scheduler_facts(scheduler) if scheduler else {},
        **{key: extension_of(unet).get(key) for key in _IMAGE_FACTS},
        "samples": ModelPaths(folder).samples.is_file(),
    }


def card_facts(folder: str | Path) -> CardFacts:
    """The facts of a checkpoint; see `recorded_facts`."""
    return CardFacts.from_dict(recorded_facts(folder))


def _scheduler_facts(config: Config) -> JsonObject:
    name, parameters = beta_schedule_of(config)
    settings = ("prediction_type", "variance_type", "timestep_spacing")
    facts = {
        "class": config.get("_class_name"),
        "beta_schedule": name,
        "num_train_timesteps": config.get("num_train_timesteps"),
        **parameters,
        **{key: config.get(key) for key in settings},
        **{key: extension_of(config).get(key) for key in ("calibrated_timesteps", "recommended")},
    }
    return {key: value for key, value in facts.items() if value is not None}
