"""Checkpoints: what a run resumes from, as safetensors and JSON; nothing is pickled.

A checkpoint is a folder with a manifest of sizes and SHA-256 sums. It is written under a temporary
name, synced and renamed before older checkpoints are removed, so a crash at any moment leaves the
newest complete checkpoint intact.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import remove_folder, replacing_folder
from ddpm_hf.diffusion.portable_checkpoint import check_finite
from ddpm_hf.post_hoc_ema.profiles import PowerFunctionEMA
from ddpm_hf.timestep_samplers import TimestepSampler
from ddpm_hf.training.checkpoint_record import (
    MANIFEST,
    RECORD,
    CheckpointRecord,
    list_checkpoints,
    manifest_of,
)
from ddpm_hf.training.run_folder import write_json

TensorFiles = dict[str, dict[str, Tensor]]


@dataclass
class TrainState:
    """Everything that changes during training and cannot be derived from the configuration.

    The learning rate, the order of the images and every random number follow from `step`.
    """

    unet: torch.nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    averages: Sequence[PowerFunctionEMA] = ()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """The network with its EMA weights, which are the ones to sample from and to publish."""
        parameters = list(self.unet.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield self.unet
        finally:
            self.ema.restore(parameters)

    def by_name(self, averages: Sequence[Tensor]) -> dict[str, Tensor]:
        """Averages of the parameters, by name of the parameter."""
        names = (name for name, _ in self.unet.named_parameters())
        return dict(zip(names, averages, strict=True))

    def tensors(self) -> TensorFiles:
        """The tensors of a checkpoint by file; optimizer keys are 'parameter index.moment'."""
        moments = self.optimizer.state_dict()["state"]
        history = self.timesteps.state_dict()
        averages = {
            _average_file(average): self.by_name(average.averages) for average in self.averages
        }
        return (
            ({"timesteps.safetensors": history} if history else {})
            | averages
            | {
                "unet.safetensors": dict(self.unet.state_dict()),
                "ema.safetensors": self.by_name(self.ema.shadow_params),
                "optimizer.safetensors": {
                    f"{index}.{key}": value
                    for index, entry in moments.items()
                    for key, value in entry.items()
                },
            }
        )

    def restore(self, tensors: TensorFiles, record: CheckpointRecord) -> None:
        """Load the tensors and the record of a checkpoint."""
        # Checkpoints of compiled runs may have the parameter names of the compiled network.
        weights, averages = (
            {name.removeprefix("_orig_mod."): value for name, value in tensors[file].items()}
            for file in ("unet.safetensors", "ema.safetensors")
        )
        self.unet.load_state_dict(weights)
        self._restore_average(self.ema.shadow_params, averages)
        for average in self.averages:
            self._restore_average(average.averages, tensors[_average_file(average)])
        self.ema.optimization_step = record.ema_step
        self._restore_moments(tensors["optimizer.safetensors"])
        if self.scaler is not None and record.scaler:
            self.scaler.load_state_dict(record.scaler)
        self.timesteps.load_state_dict(tensors.get("timesteps.safetensors", {}))
        self.step = record.step

    def _restore_average(self, averages: list[Tensor], tensors: Mapping[str, Tensor]) -> None:
        for name, average in self.by_name(averages).items():
            _check_shape(f"EMA weight {name}", tensors[name], average.shape)
            average.copy_(tensors[name])

    def _restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the moments of the optimizer, which does not check their shapes."""
        parameters = list(self.unet.parameters())
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            shape = torch.Size() if name == "step" else parameters[int(index)].shape
            _check_shape(f"optimizer moment {key}", value, shape)
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _average_file(average: PowerFunctionEMA) -> str:
    return f"ema-std-{average.sigma_rel:g}.safetensors"


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:  # a copy would be broadcast
        raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")


def save_checkpoint(folder: Path, state: TrainState, record: CheckpointRecord, keep: int) -> Path:
    """Write `folder`/step-<step>, then remove all but the newest `keep` checkpoints.

    Args:
        folder: the run's checkpoint folder, created if missing.
        state: its tensors are saved.
        record: saved with them.
        keep: number of checkpoints that remain, including this one.
    Returns:
        the path of the new checkpoint.
    Raises:
        ValueError: if a weight is not finite; nothing is written.
        OSError, SafetensorError: if writing fails; older checkpoints are untouched.
    """
    target = folder / f"step-{record.step:08d}"
    files = state.tensors()
    for name, tensors in files.items():
        check_finite(tensors, f"{name} at step {record.step}")
    with replacing_folder(target) as temporary:
        for name, tensors in files.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)
        write_json(temporary / RECORD, record.to_dict())
        write_json(temporary / MANIFEST, manifest_of(temporary))
    _prune(target, keep)
    return target


def _prune(newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep - 1` checkpoints before it.

    Checkpoints of later steps are damaged: the run resumed before them. They are removed because
    they would count as the newest.
    """
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    earlier = [path for path in others if path.name < newest.name]
    for path in set(others) - set(earlier[: keep - 1]):
        remove_folder(path)


def read_tensors(path: Path) -> TensorFiles:
    """The tensors of a verified checkpoint, by file."""
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}
