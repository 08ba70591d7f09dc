"""Snapshots of the power-function averages of a run, and weighted sums of them.

A snapshot is RUN/ema_snapshots/step-<update>-std-<sigma_rel>.safetensors: the parameters of the
network in float16, as the authors of 2312.02696 store them. It is written once and kept.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import check_regular, replacing_file
from ddpm_hf.diffusion.portable_checkpoint import check_finite

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})-std-(0\.\d+)\.safetensors")


@dataclass(frozen=True, order=True)
class Snapshot:
    """File with the average of relative length `sigma_rel` after update `step`."""

    step: int
    sigma_rel: float
    path: Path


def save_snapshot(folder: Path, step: int, sigma_rel: float, weights: Mapping[str, Tensor]) -> None:
    """Write a snapshot atomically.

    Raises:
        ValueError: if a weight is not finite.
        OSError, SafetensorError: if writing fails.
    """
    path = folder / f"step-{step:08d}-std-{sigma_rel:g}.safetensors"
    check_finite(weights, path.name)
    folder.mkdir(exist_ok=True)
    with replacing_file(path) as temporary:
        save_file(compact(weights), temporary)


def compact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16; a tensor with values beyond its range stays in float32."""
    halves = {name: weight.half() for name, weight in weights.items()}
    return {
        name: (half if half.isfinite().all() else weights[name]).contiguous()
        for name, half in halves.items()
    }


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder by update; other names are ignored."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((_NAME.fullmatch(path.name), path) for path in paths)
    return sorted(Snapshot(int(m[1]), float(m[2]), path) for m, path in matches if m)


def remove_snapshots_after(folder: Path, step: int) -> None:
    """Remove what a killed run wrote after the checkpoint of update `step`, and partial files."""
    for snapshot in list_snapshots(folder):
        if snapshot.step > step:
            snapshot.path.unlink()
    for partial in folder.glob(".new-step-*"):
        partial.unlink()


def usable_snapshots(folder: Path, shapes: Mapping[str, torch.Size]) -> list[Snapshot]:
    """The snapshots of a network; damaged and foreign ones are left out with a warning.

    Args:
        folder: of the snapshots.
        shapes: of the parameters, by name.
    Raises:
        ValueError: if there are none.
    """
    usable = []
    for snapshot in list_snapshots(folder):
        try:
            _check_header(snapshot.path, shapes)
            usable.append(snapshot)
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("%s is left out: %s", snapshot.path, error)
    if not usable:
        raise ValueError(
            f"{folder} has no usable snapshots; train with `post_hoc_ema` to write them"
        )
    return usable


def _check_header(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Raise an error unless the file is complete and has the parameters of the network."""
    check_regular(path)
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    if different := sorted(n for n in found | expected if found.get(n) != expected.get(n)):
        name = different[0]
        raise ValueError(
            f"{name} must be of shape {expected.get(name)}, got {found.get(name)}: it is of another"
            " network"
        )


def weighted_sum(snapshots: Iterable[Snapshot], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum of weight times snapshot, in float32.

    Raises:
        ValueError: if a snapshot has a value that is not finite.
        OSError, SafetensorError: if one cannot be read.
    """
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        for name, value in _finite(snapshot.path).items():
            if name not in total:
                total[name] = torch.zeros(value.shape)
            total[name].add_(value.float(), alpha=weight)
    return total


def _finite(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    check_finite(tensors, f"{path}")
    return tensors
