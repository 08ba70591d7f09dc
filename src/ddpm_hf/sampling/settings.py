"""What decides the images: kept beside them as JSON, and compared when a job goes on."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from ddpm_hf.diffusion.conditioning import class_numbers
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
from ddpm_hf.diffusion.schedules import usual_num_steps

Settings = dict[str, Any]
# What an image is stored as; float32 is in [0, 1].
STORED_AS = ("uint8", "uint16", "float32")
_CALL = ("num_inference_steps", "timesteps", "eta", "guidance_scale", "guidance_interval", "guide")


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
    facts = image_facts(pipeline.unet)
    dtype = dtype or f"uint{facts.bit_depth if facts else 8}"
    if dtype not in STORED_AS:
        raise ValueError(f"dtype must be one of {', '.join(STORED_AS)}, got {dtype!r}")
    config, names = pipeline.unet.config, facts.class_names if facts else None
    if class_labels is not None and config.num_class_embeds is not None:
        class_labels = class_numbers(list(class_labels), config.num_class_embeds, names)
    scheduler = pipeline.scheduler
    kind, num_train_timesteps = type(scheduler).__name__, scheduler.config.num_train_timesteps
    num_steps = call.get("num_inference_steps")
    if num_steps is None and call.get("timesteps") is None:
        num_steps = usual_num_steps(kind, num_train_timesteps)
    guide, interval = call.get("guide"), call.get("guidance_interval")
    scale = call.get("guidance_scale")
    return {
        "num_images": num_images,
        "seed": seed,
        "batch_size": min(batch_size, num_images),
        "class_labels": None if class_labels is None else list(class_labels),
        "scheduler": kind,
        "scheduler_config": {k: _plain(v) for k, v in scheduler.config.items() if k[0] != "_"},
        "num_inference_steps": num_steps,
        "timesteps": _plain(call.get("timesteps")),
        "eta": call.get("eta"),
        "guidance_scale": 1.0 if scale is None else float(scale),
        "guidance_interval": None if interval is None else [float(end) for end in interval],
        "guide": None if guide is None else weights_digest(getattr(guide, "unet", guide)),
        "weights": weights_digest(pipeline.unet),
        "unet_dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": pipeline.device.type,  # each kind has random numbers of its own
        "dtype": dtype,
    }


def versions() -> dict[str, str]:
    """Of what drew the images."""
    return {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")}


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
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
