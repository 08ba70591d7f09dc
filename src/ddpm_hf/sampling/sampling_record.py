"""What decides the images: kept beside them as JSON, and compared when a job goes on."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.diffusion import config_extension
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
from ddpm_hf.diffusion.schedules import usual_num_steps
from ddpm_hf.sampling.sampler_choice import class_names_of, classes_in_turn

Settings = dict[str, Any]
# What an image is stored as; float32 is in [0, 1].
STORED_AS = ("uint8", "uint16", "float32")
_NO_OPTIONS = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
_CALL = ("num_inference_steps", "timesteps", "eta", "guidance_scale", "guidance_interval", "guide")


def about_images(
    pipeline: GaussianDDPMPipeline,
    num_images: int,
    model: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What is kept beside the images; `model` says what it is, the options are of `settings_of`."""
    settings = settings_of(pipeline, num_images, **options)
    return {
        "format_version": 1,
        "model": model,
        "settings": settings,
        "class_names": class_names_of(pipeline.unet) if settings["class_labels"] else None,
        "num_threads": torch.get_num_threads(),
        "optimized": None if pipeline.speed is None else pipeline.speed.to_dict(),
        "versions": {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")},
    }


def settings_of(
    pipeline: GaussianDDPMPipeline,
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    class_labels: Sequence[int | str] | None,
    dtype: str | None,
    call: Mapping[str, Any],
) -> Settings:
    """All that decides the images, as JSON values; arguments as for `draw_to`.

    Raises:
        ValueError: for what no image can be drawn with.
        TypeError: for an argument of the pipeline that cannot be kept, such as a callback.
    """
    if unknown := sorted(set(call) - {*_CALL}):
        raise TypeError(f"{unknown[0]} is none of {', '.join(_CALL)}")
    for name, count in (("num_images", num_images), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    dtype = dtype or f"uint{bit_depth_of(pipeline.unet)}"
    if dtype not in STORED_AS:
        raise ValueError(f"dtype must be one of {', '.join(STORED_AS)}, got {dtype!r}")
    scheduler = pipeline.scheduler
    kind, num_train_timesteps = type(scheduler).__name__, scheduler.config.num_train_timesteps
    # What is recommended decides no image, and may be found between two halves of a set.
    config = config_extension.without(scheduler.config, "recommended")
    num_steps = call.get("num_inference_steps")
    if num_steps is None and call.get("timesteps") is None:
        num_steps = usual_num_steps(kind, num_train_timesteps)
    guide, interval = call.get("guide"), call.get("guidance_interval")
    scale = call.get("guidance_scale")
    return {
        "num_images": num_images,
        "seed": seed,
        "batch_size": min(batch_size, num_images),
        "class_labels": classes_in_turn(pipeline.unet, class_labels),
        "scheduler": kind,
        "scheduler_config": _plain(
            {name: value for name, value in config.items() if name not in _NO_OPTIONS}
        ),
        "num_inference_steps": num_steps,
        "timesteps": _plain(call.get("timesteps")),
        "eta": call.get("eta"),
        "guidance_scale": 1.0 if scale is None else float(scale),
        "guidance_interval": None if interval is None else [float(end) for end in interval],
        "guide": None if guide is None else weights_digest(getattr(guide, "unet", guide)),
        "weights": weights_digest(pipeline.unet),
        "unet_dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "speed": speed_of(pipeline),
        "device": pipeline.device.type,  # each kind has random numbers of its own
        "dtype": dtype,
    }


def settings_in(path: Path) -> Settings | None:
    """Those that a file of `about_images` keeps, or None where there is no file.

    Raises:
        ValueError: if it is another file.
    """
    about = read_json(path)
    if about and not isinstance(about.get("settings"), dict):
        raise ValueError(f"{path} does not say how images were drawn; move it, or choose another")
    settings: Settings | None = about.get("settings")
    return settings


def speed_of(pipeline: GaussianDDPMPipeline) -> Settings | None:
    """What its `optimize` chose, as far as it decides bits; None where it was not called."""
    names = ("memory_format", "dtype", "compile", "tf32", "num_threads")
    chosen = pipeline.speed
    return None if chosen is None else {name: getattr(chosen, name) for name in names}


def bit_depth_of(unet: UNet2DModel) -> int:
    """Bits per channel of the images: 8 or 16."""
    facts = image_facts(unet)
    return facts.bit_depth if facts else 8


def difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What differs first, as "seed=1, not seed=0"; None where nothing does."""
    for name, value in wanted.items():
        before = there.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := difference(before, {**dict.fromkeys(before), **value}):
                return inner
        elif before != value:
            return f"{name}={_short(before)}, not {name}={_short(value)}"
    return None


def weights_digest(unet: torch.nn.Module) -> str:
    """SHA-256 of the weights, with their names."""
    sums = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        sums.update(name.encode())
        sums.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sums.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
