# SPDX-License-Identifier: Apache-2.0
"""Checks of checkpoint configurations before any memory is allocated.

The UNet is built on the meta device, and the size of its weights compared with the memory of this
machine. Travels with the weights.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.models import UNet2DModel

from . import atomic_files, checks, config_checks, image_format

MAX_LEVELS = 10
# The only keys whose cost a build on the meta device does not show: it takes 5 ms per layer, and
# images and their padding are allocated in sampling.
UNET_BOUNDS = {"layers_per_block": (1, 16), "downsample_padding": (0, 1)}
# Schedulers of diffusers allocate a list of as many elements, or loop over them in every step.
_MAX_SOLVER_ORDER = 10
_SOLVER_ORDERS = ("solver_order", "predictor_order", "corrector_order")


def check_checkpoint(folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Check the configurations of a pipeline folder.

    Args:
        folder: pipeline with components in subfolders, or flat as in early repositories.
        dtype: dtype of the weights in memory; the default is the smallest common one.
    Raises:
        ValueError: if a component cannot be loaded, naming file, key and value.
    """
    atomic_files.read_json(folder / "model_index.json")
    check_scheduler_config(component_folder(folder, "scheduler") / "scheduler_config.json")
    path = component_folder(folder, "unet") / "config.json"
    if config := atomic_files.read_json(path):
        check_unet_config(config, str(path), dtype)


def component_folder(folder: Path, name: str) -> Path:
    """Folder of a pipeline component; early repositories have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def check_scheduler_config(path: Path) -> None:
    """Check the number of timesteps and the orders of solvers in a scheduler configuration.

    Raises:
        ValueError: if they are not ints in [1, 100000] and [1, 10].
    """
    config = atomic_files.read_json(path)
    steps = config.get("num_train_timesteps", 1)
    try:
        checks.check_int("num_train_timesteps", steps, 1, config_checks.MAX_TRAIN_TIMESTEPS)
        for order in _SOLVER_ORDERS:
            checks.check_int(order, config.get(order, 1), 1, _MAX_SOLVER_ORDER)
    except (ValueError, TypeError) as error:
        raise checks.error_in_file(path, error) from None


def check_unet_config(
    config: Mapping[str, Any], name: str = "", dtype: torch.dtype = torch.float16
) -> int:
    """Check that a `UNet2DModel` can be built and called, and fits into memory.

    Args:
        config: arguments of `UNet2DModel`; other keys are ignored.
        name: name of the configuration in errors.
        dtype: dtype of the weights in memory.
    Returns:
        the number of parameters.
    Raises:
        ValueError: for a configuration that is invalid or too large, in one line.
    """
    prefix = f"{name}: " if name else ""
    try:
        _check_bounds(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{prefix}{error}") from None
    try:
        with torch.device("meta"):  # nothing is allocated
            unet = UNet2DModel.from_config({k: v for k, v in config.items() if k[0] != "_"})
            _call(unet)
    except Exception as error:  # the constructor raises errors of every kind
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{prefix}the configuration is invalid for UNet2DModel: {type(error).__name__}:"
            f" {reason:.300}"
        ) from None
    num_parameters = int(unet.num_parameters())
    needed, available = dtype.itemsize * num_parameters, memory_bytes()
    if needed > available:
        raise ValueError(
            f"{prefix}a network of {num_parameters:,} parameters needs {needed / 2**30:,.0f} GiB in"
            f" {dtype}, but this machine has {available / 2**30:,.0f} GiB of memory; use a smaller"
            " network"
        )
    return num_parameters


@torch.no_grad()
def _call(unet: UNet2DModel) -> None:
    """Call a network on the meta device: its layers check some arguments only then."""
    if empty := [name for name, weight in unet.named_parameters() if weight.numel() == 0]:
        raise ValueError(f"{empty[0]} has no elements")
    size = 2 ** len(unet.config.down_block_types)
    x_t, t = torch.zeros(1, unet.config.in_channels, size, size), torch.zeros(1, dtype=torch.long)
    with suppress(NotImplementedError):  # operations that the meta device lacks
        unet(x_t, t, class_labels=None if unet.class_embedding is None else t)


def _check_bounds(config: Mapping[str, Any]) -> None:
    if "quantization_config" in config:
        raise ValueError("`quantization_config` is not supported; use unquantized weights")
    for key, (low, high) in UNET_BOUNDS.items():
        checks.check_int(key, config.get(key, 1), low, high)
    levels = config.get("block_out_channels", [None])
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(
            f"`block_out_channels` must be a list of 1 to {MAX_LEVELS} ints, got {levels!r:.100}"
        )
    size = config.get("sample_size")
    pair = size if isinstance(size, list | tuple) else (size, size)
    if size is not None and not (len(pair) == 2 and all(map(image_format.is_size, pair))):
        raise ValueError(
            f"`sample_size` must be an int in [1, {image_format.MAX_SIZE}] or a pair"
            f" (height, width), got {size!r:.100}"
        )


def memory_bytes() -> float:
    """Physical memory of this machine; infinite if unknown."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
