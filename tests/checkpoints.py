"""Tiny checkpoints of this package, of stock diffusers, and of diffusers in 2022."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

# The cosine schedule ends at noise for any number of timesteps, and "trailing" starts there.
SHORT_CHAIN = {
    "num_train_timesteps": 20,
    "beta_schedule": "squaredcos_cap_v2",
    "timestep_spacing": "trailing",
}
# Options of `tiny_unet` for a network of two levels.
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# scheduler_config.json of 2022: no prediction_type, no timestep_spacing, no thresholding.
LEGACY_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "num_train_timesteps": 20,
    "beta_start": 0.001,
    "beta_end": 0.6,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_large",
    "clip_sample": True,
}
LEGACY_UNET_KEYS = """
    act_fn attention_head_dim block_out_channels center_input_sample down_block_types
    downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block
    mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size
    time_embedding_type up_block_types
"""
OLD_ATTENTION_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}


def tiny_unet(seed: int = 0, **config: Any) -> UNet2DModel:
    """UNet of one level, with attention in its middle, initialised with the seed."""
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": config.get("in_channels", 1),
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**(defaults | config)).eval()


def tiny_scheduler(**config: Any) -> GaussianDDPMScheduler:
    """Scheduler of 20 timesteps."""
    return GaussianDDPMScheduler(**(SHORT_CHAIN | config))


def image_facts_of(
    mode: str | None, height: int, width: int, bit_depth: int = 8, class_names: Any = None
) -> dict[str, Any]:
    """Image facts as training stores them in the configuration of the UNet."""
    image = {"height": height, "width": width, "bit_depth": bit_depth}
    facts: dict[str, Any] = {"format_version": 1, "image": image}
    if mode is not None:
        image["mode"] = mode
    if class_names is not None:
        facts["class_names"] = list(class_names)
    return facts


def tiny_pipeline(
    unet: UNet2DModel | None = None, scheduler: Any = None, facts: dict[str, Any] | None = None
) -> GaussianDDPMPipeline:
    """Our pipeline with a tiny UNet, without progress bar."""
    unet = tiny_unet() if unet is None else unet
    if facts is not None:
        unet.register_to_config(_ddpm_hf=facts)
    return quiet(GaussianDDPMPipeline(unet, tiny_scheduler() if scheduler is None else scheduler))


def quiet(pipeline: Any) -> Any:
    """The pipeline with its progress bar turned off."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_ours(folder: Path, **parts: Any) -> Path:
    """Save a portable checkpoint; `parts` as for `tiny_pipeline`."""
    tiny_pipeline(**parts).save_pretrained(folder)
    return folder


def save_stock(folder: Path, unet: UNet2DModel | None = None, **scheduler: Any) -> Path:
    """Save a checkpoint of the stock `DDPMPipeline`."""
    unet = tiny_unet() if unet is None else unet
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**(SHORT_CHAIN | scheduler)))
    pipeline.save_pretrained(folder)
    return folder


def save_legacy(folder: Path, flat: bool = True, pickled: bool = True) -> Path:
    """Save a checkpoint like the first upload of `google/ddpm-cifar10-32`.

    Args:
        folder: folder to write.
        flat: whether all files are at the root, or in unet/ and scheduler/.
        pickled: whether weights are `.bin` or safetensors.
    """
    unet = tiny_unet()
    parts = {name: folder if flat else folder / name for name in ("unet", "scheduler")}
    for part in parts.values():
        part.mkdir(parents=True, exist_ok=True)
    weights = old_attention_names(unet.state_dict())
    if pickled:
        torch.save(weights, parts["unet"] / "diffusion_pytorch_model.bin")
    else:
        save_file(weights, parts["unet"] / "diffusion_pytorch_model.safetensors")
    config = {key: unet.config[key] for key in LEGACY_UNET_KEYS.split()}
    version = {"_class_name": "UNet2DModel", "_diffusers_version": "0.1.1"}
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write_json(parts["unet"] / "config.json", version | config)
    _write_json(parts["scheduler"] / "scheduler_config.json", LEGACY_SCHEDULER)
    _write_json(folder / "model_index.json", index)
    return folder


def old_attention_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with the names of attention weights until diffusers 0.15."""
    renamed = {}
    for name, weight in weights.items():
        for new, old in OLD_ATTENTION_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = weight.contiguous()
    return renamed


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
