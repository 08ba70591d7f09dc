"""Record of the settings that images are sampled with: stored as JSON, compared on resume."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from ddpm_hf.diffusion import config_extension
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.image_batches import recorded_bit_depth
from ddpm_hf.inference_settings import OptimizedInference
from ddpm_hf.sampling.class_labels import class_names_of, label_cycle
from ddpm_hf.sampling.options import DrawOptions
from ddpm_hf.utils.digests import json_digest, weights_digest

PIXEL_TYPES = ("uint8", "uint16", "float32")  # float32 pixels are in [0, 1]
_NOT_CONFIGURATION = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")


class DamagedRecordError(ValueError):
    """A record that cannot be read, or differs from its checksum."""


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that determines the images of a set, as JSON values.

    Attributes:
        num_images: number of images N.
        seed: image i depends on the seed and i only.
        batch_size: images per batch, and per file until the set is complete.
        class_labels: class numbers that the images get in turn; None without classes.
        scheduler: class name of the scheduler.
        scheduler_config: its configuration, without the recommended setting, which affects no
            image and may be stored while a set is incomplete.
        num_inference_steps: number of steps K; None if `timesteps` are given.
        timesteps: the timesteps, in decreasing order.
        eta: noise of each step.
        guidance_scale: scale of the guidance; 1 for none.
        guidance_interval: range of the log signal-to-noise ratio with guidance.
        guide: digest of the guiding network's weights.
        weights: digest of the network's weights.
        unet_dtype: dtype of the network.
        speed: settings that `optimize` applied; None if it was not called.
        device: type of the device, since each type has its own random numbers.
        dtype: one of `PIXEL_TYPES`.
    """

    num_images: int
    seed: int
    batch_size: int
    class_labels: list[int] | None
    scheduler: str
    scheduler_config: Mapping[str, Any]
    num_inference_steps: int | None
    timesteps: list[int] | None
    eta: float | None
    guidance_scale: float
    guidance_interval: list[float] | None
    guide: str | None
    weights: str
    unet_dtype: str
    speed: Mapping[str, Any] | None
    device: str
    dtype: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from their JSON values; a setting that an old record lacks is None.

        Raises:
            ValueError: for a value that is not of the type that reading the images needs.
        """
        known: Any = {field.name: values.get(field.name) for field in fields(cls)}
        labels = known["class_labels"] or [0]
        counts = (known["num_images"], known["batch_size"])
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"the number of images and the batch size must be ints, got {counts}")
        if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
            raise ValueError(f"the class labels must be ints, got {labels!r:.100}")
        return cls(**known)

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return -(-self.num_images // self.batch_size)

    def to_dict(self) -> Mapping[str, Any]:
        """The settings as JSON values."""
        return vars(self)

    def difference(self, other: Self) -> str | None:
        """The first setting that differs, as "`seed` 1 instead of 0"; None if all are equal."""
        return _difference(self.to_dict(), other.to_dict())


@dataclass(frozen=True)
class SamplingRecord:
    """Content of `options.json` in a folder of batches, and of NAME.json for an output NAME.

    Attributes:
        settings: everything that determines the images.
        model: name of the model and further JSON values, which are not compared.
        class_names: names of the classes by number, if known.
        num_threads: CPU threads per operation.
        optimized: result of `optimize` as JSON values.
        versions: versions of the libraries.
        seconds_per_image: median over batches of the time per image in one process.
        output_bytes: size of the complete output.
    """

    settings: SamplingSettings
    model: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    num_threads: int | None = None
    optimized: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    seconds_per_image: float | None = None
    output_bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file; None if the file does not exist.

        Raises:
            ValueError: if the file is not such a record.
        """
        try:
            values = read_json(path)
        except ValueError as error:
            raise DamagedRecordError(f"{error}") from None
        if not values:
            return None
        if values.pop("sha256", None) not in (None, json_digest(values)):
            raise DamagedRecordError(f"{path} is damaged")
        if not isinstance(values.get("settings"), dict):
            raise ValueError(
                f"{path} is not a record of sampled images: move it, or choose another output"
            )
        known = {field.name: values.get(field.name) for field in fields(cls)}
        names = known["class_names"]
        try:
            settings = SamplingSettings.from_dict(values["settings"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        class_names = tuple(names) if isinstance(names, list) else None
        return cls(**known | {"settings": settings, "class_names": class_names})

    def to_dict(self) -> Mapping[str, Any]:
        """The record as JSON values."""
        values = {"format_version": 1, **vars(self), "settings": self.settings.to_dict()}
        ordered = {name: values.pop(name) for name in ("format_version", "model", "settings")}
        for name in ("seconds_per_image", "output_bytes"):
            if values[name] is None:
                del values[name]
        return ordered | values


def sampling_record(
    pipeline: GaussianDDPMPipeline,
    options: DrawOptions,
    *,
    dtype: str | None = None,
    model: Mapping[str, Any] | None = None,
    optimized: OptimizedInference | None = None,
) -> SamplingRecord:
    """The record of images that are sampled with these options.

    Args:
        pipeline: pipeline that samples them.
        options: options of `draw_to`.
        dtype: one of `PIXEL_TYPES`; by default that of the model's bit depth.
        model: name of the model and further JSON values.
        optimized: result of `optimize`, if it was called.
    Raises:
        ValueError: for options that do not fit the model.
    """
    settings = sampling_settings(pipeline, options, dtype, optimized)
    return SamplingRecord(
        settings,
        model,
        class_names=class_names_of(pipeline.unet) if settings.class_labels else None,
        num_threads=torch.get_num_threads(),
        optimized=None if optimized is None else optimized.to_dict(),
        versions={name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
    )


def sampling_settings(
    pipeline: GaussianDDPMPipeline,
    options: DrawOptions,
    dtype: str | None = None,
    optimized: OptimizedInference | None = None,
) -> SamplingSettings:
    """Everything that determines the images; see `sampling_record`."""
    dtype = dtype or f"uint{recorded_bit_depth(pipeline.unet)}"
    if dtype not in PIXEL_TYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(PIXEL_TYPES)}, got {dtype!r}")
    scheduler, K, guide = pipeline.scheduler, options.num_inference_steps, options.guide
    kind = type(scheduler).__name__
    if K is None and options.timesteps is None:
        K = usual_num_steps(kind, scheduler.config.num_train_timesteps)
    config = config_extension.without(scheduler.config, "recommended")
    scale, interval = options.guidance_scale, options.guidance_interval
    without_class = scale == 0 and guide is None and options.class_labels is None
    labels = None if without_class else label_cycle(pipeline.unet, options.class_labels)
    return SamplingSettings(
        num_images=options.num_images,
        seed=options.seed,
        batch_size=min(options.batch_size, options.num_images),
        class_labels=labels,
        scheduler=kind,
        scheduler_config=_json_values(
            {name: value for name, value in config.items() if name not in _NOT_CONFIGURATION}
        ),
        num_inference_steps=K,
        timesteps=_json_values(options.timesteps),
        eta=options.eta,
        guidance_scale=1.0 if scale is None else scale,
        guidance_interval=None if interval is None else [float(end) for end in interval],
        guide=None if guide is None else weights_digest(getattr(guide, "unet", guide)),
        weights=weights_digest(pipeline.unet),
        unet_dtype=str(pipeline.unet.dtype).removeprefix("torch."),
        speed=None if optimized is None else optimized.settings_dict(),
        device=pipeline.device.type,
        dtype=dtype,
    )


def _difference(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    for name, value in wanted.items():
        before = recorded.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := _difference(before, {**dict.fromkeys(before), **value}):
                return inner
        elif before != value:
            return f"`{name}` {_shortened(before)} instead of {_shortened(value)}"
    return None


def _json_values(value: Any) -> Any:
    """`value` after a round trip through JSON."""
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _shortened(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
