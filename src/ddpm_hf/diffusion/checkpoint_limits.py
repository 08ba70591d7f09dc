# SPDX-License-Identifier: Apache-2.0
"""What no model can be, refused from its configuration before anything is allocated.

A network that is merely large is compared with the memory of this machine.
Travels with the weights.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DModel

from . import atomic_files, checks, image_processor

MAX_LEVELS = 10
MAX_CHANNELS = 2**13
# Above each of these, no published network comes near; below, all together build in seconds.
UNET_BOUNDS = {
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "layers_per_block": (1, 16),
    "norm_num_groups": (1, MAX_CHANNELS),
    "attn_norm_num_groups": (1, MAX_CHANNELS),
    "attention_head_dim": (1, MAX_CHANNELS),
    "time_embedding_dim": (1, 4 * MAX_CHANNELS),
    "num_class_embeds": (1, 1_000_000),
    "num_train_timesteps": (1, checks.MAX_TRAIN_TIMESTEPS),
    "downsample_padding": (0, 1),
}
UNET_RANGES = {
    "dropout": ("in [0, 1]", 0.0, 1.0),
    "norm_eps": ("in (0, 1]", checks.ABOVE_0, 1.0),
    "mid_block_scale_factor": ("above 0", checks.ABOVE_0, checks.FINITE),
    "freq_shift": ("in [-1, 1]", -1.0, 1.0),
}
TIME_EMBEDDINGS = ("positional", "fourier", "learned")
_OPTIONAL = {
    "norm_num_groups", "attn_norm_num_groups", "attention_head_dim", "time_embedding_dim",
    "num_class_embeds", "num_train_timesteps", "sample_size",
}  # fmt: skip
_PER_LEVEL = ("block_out_channels", "down_block_types", "up_block_types")


def check_checkpoint(folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Refuse a pipeline's folder whose configurations are of nothing that can be loaded.

    Args:
        folder: with its parts in folders of their own, or flat as in 2022.
        dtype: of the weights in memory, where it is known.
    Raises:
        ValueError: naming file, key, value and bound.
    """
    atomic_files.read_json(folder / "model_index.json")
    check_scheduler_config(component_folder(folder, "scheduler") / "scheduler_config.json")
    path = component_folder(folder, "unet") / "config.json"
    if config := atomic_files.read_json(path):
        check_unet_config(config, str(path), dtype)


def component_folder(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: early repositories are flat."""
    return folder / name if (folder / name).is_dir() else folder


def check_scheduler_config(path: Path) -> None:
    """Refuse a scheduler's configuration with more steps than any scheduler has."""
    steps = atomic_files.read_json(path).get("num_train_timesteps", 1)
    try:
        checks.check_int("num_train_timesteps", steps, 1, checks.MAX_TRAIN_TIMESTEPS)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def check_unet_config(
    config: Mapping[str, Any], name: str = "", dtype: torch.dtype = torch.float16
) -> None:
    """Refuse the configuration of a `UNet2DModel` that cannot be, or not on this machine.

    Args:
        config: arguments of `UNet2DModel`; other keys are ignored.
        name: what errors call the configuration, if anything.
        dtype: of the weights in memory, where it is known.
    Raises:
        ValueError: naming key, value and bound; or the size of the weights and of the memory.
    """
    prefix = f"{name}: " if name else ""
    try:
        _check_keys(config)
        with torch.device("meta"):  # nothing is allocated
            unet = UNet2DModel.from_config({k: v for k, v in config.items() if k[0] != "_"})
    except Exception as error:  # the constructor raises errors of every kind
        raise ValueError(f"{prefix}{error}") from error
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    needed, there = dtype.itemsize * num_parameters, memory_bytes()
    if needed > there:
        raise ValueError(
            f"{prefix}a network of {num_parameters:,} parameters takes {needed / 2**30:,.0f} GiB in"
            f" {dtype}, and this machine has {there / 2**30:,.0f} GiB of memory"
        )


def _check_keys(config: Mapping[str, Any]) -> None:
    for key, (low, high) in UNET_BOUNDS.items():
        if key in config and not (config[key] is None and key in _OPTIONAL):
            checks.check_int(key, config[key], low, high)
    for key, bounds in UNET_RANGES.items():
        if key in config:
            checks.check_float(key, config[key], *bounds)
    time_embedding = config.get("time_embedding_type", "positional")
    checks.check_choice("time_embedding_type", time_embedding, TIME_EMBEDDINGS)
    for key in _PER_LEVEL:
        levels = config.get(key, [None])
        if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= MAX_LEVELS:
            raise ValueError(f"{key} must be a list of 1..{MAX_LEVELS} levels, got {levels!r:.100}")
    widths = config.get("block_out_channels", ())
    for width in widths:
        checks.check_int("each of block_out_channels", width, 1, MAX_CHANNELS)
    if widths and (config.get("attention_head_dim") or 1) > max(widths):
        raise ValueError(
            f"attention_head_dim must be at most the widest of block_out_channels {widths}, got "
            f"{config['attention_head_dim']}"
        )
    has_groups = not any("Skip" in str(kind) for kind in config.get("down_block_types", ()))
    groups = config.get("norm_num_groups") or 1
    if has_groups and any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups must divide block_out_channels {widths}, got {groups}")
    size = config.get("sample_size")
    pair = size if isinstance(size, list | tuple) else (size, size)
    if size is not None and not (len(pair) == 2 and all(map(image_processor.is_size, pair))):
        raise ValueError(
            f"sample_size must be an int in 1..{image_processor.MAX_SIZE}, or two of them"
            f" (height, width), got {size!r:.100}"
        )


def memory_bytes() -> float:
    """The memory of this machine; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
