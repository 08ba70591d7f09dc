"""Checkpoints: what a run resumes from, as safetensors and JSON; nothing is pickled.

A checkpoint is a folder with a manifest of sizes and SHA-256 sums. It is written under a temporary
name, synced and renamed before older checkpoints are removed, so a crash at any moment leaves the
newest complete checkpoint intact.
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_hf.diffusion.atomic_files import read_json, remove_folder, replacing_folder
from ddpm_hf.diffusion.portable_checkpoint import check_finite
from ddpm_hf.timestep_samplers import TimestepSampler
from ddpm_hf.training.run_folder import CheckpointError, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_RECORD = "state.json"
_NAME = re.compile(r"step-(\d{8})")
_KINDS: dict[str, type | types.UnionType] = {
    "config": dict, "parts": dict, "elapsed_s": int | float, "num_processes": int | None,
    "num_threads": int | None, "step": int, "ema_step": int, "scaler": dict | None,
}  # fmt: skip

Json = dict[str, Any]
TensorFiles = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ThreadChange:
    """A resumed run that continues with another number of CPU threads.

    Attributes:
        step: first update with the new number, counted from 1.
        num_threads: the new number.
        num_threads_before: number of threads until then.
    """

    step: int
    num_threads: int
    num_threads_before: int


@dataclass(frozen=True)
class CheckpointRecord:
    """The contents of `state.json`: everything in a checkpoint that is not a tensor.

    Attributes:
        config: the complete options of the run.
        parts: network, diffusion, images and objective, which a resumed run must share.
        elapsed_s: seconds of training so far.
        num_processes: number of ranks.
        num_threads: CPU threads of the main process.
        step: number of updates done.
        ema_step: number of EMA updates done.
        scaler: state of the gradient scaler, or None.
        num_threads_changes: resumed runs that continued with another number of threads.
    """

    config: Json
    parts: Json
    elapsed_s: float
    num_processes: int | None
    num_threads: int | None
    step: int
    ema_step: int
    scaler: Json | None
    num_threads_changes: tuple[ThreadChange, ...] = ()

    def to_dict(self) -> Json:
        """The record as JSON values."""
        content = dataclasses.asdict(self)
        if not self.num_threads_changes:
            del content["num_threads_changes"]
        return content

    @classmethod
    def from_dict(cls, content: Json) -> Self:
        """The record from JSON values.

        Raises:
            ValueError: if a value is missing or of the wrong type.
        """
        values: Json = {name: content.get(name) for name in _KINDS}
        wrong = [name for name, kind in _KINDS.items() if not isinstance(values[name], kind)]
        if not wrong and not all(isinstance(part, dict) for part in content["parts"].values()):
            wrong = ["parts"]
        if wrong:
            raise ValueError(f"no valid {wrong[0]}")
        try:
            changes = [ThreadChange(**entry) for entry in content.get("num_threads_changes", ())]
        except TypeError:
            raise ValueError("no valid num_threads_changes") from None
        return cls(**values, num_threads_changes=tuple(changes))


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

    def tensors(self) -> TensorFiles:
        """The tensors of a checkpoint by file; optimizer keys are 'parameter index.moment'."""
        names = [name for name, _ in self.unet.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        history = self.timesteps.state_dict()
        return ({"timesteps.safetensors": history} if history else {}) | {
            "unet.safetensors": dict(self.unet.state_dict()),
            "ema.safetensors": dict(zip(names, self.ema.shadow_params, strict=True)),
            "optimizer.safetensors": {
                f"{index}.{key}": value
                for index, entry in moments.items()
                for key, value in entry.items()
            },
        }

    def restore(self, tensors: TensorFiles, record: CheckpointRecord) -> None:
        """Load the tensors and the record of a checkpoint."""
        # Checkpoints of compiled runs may have the parameter names of the compiled network.
        weights, averages = (
            {name.removeprefix("_orig_mod."): value for name, value in tensors[file].items()}
            for file in ("unet.safetensors", "ema.safetensors")
        )
        self.unet.load_state_dict(weights)
        for (name, _), shadow in zip(
            self.unet.named_parameters(), self.ema.shadow_params, strict=True
        ):
            shadow.copy_(averages[name])
        self.ema.optimization_step = record.ema_step
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer.safetensors"].items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler is not None and record.scaler:
            self.scaler.load_state_dict(record.scaler)
        self.timesteps.load_state_dict(tensors.get("timesteps.safetensors", {}))
        self.step = record.step


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
        write_json(temporary / _RECORD, record.to_dict())
        write_json(temporary / _MANIFEST, _manifest(temporary))
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


def find_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in `folder`, or None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning.

    Raises:
        CheckpointError: if all checkpoints are damaged.
    """
    candidates = list_checkpoints(folder)
    for path in candidates:
        try:
            verify_checkpoint(path)
            return path
        except (CheckpointError, OSError) as error:
            logger.warning("damaged checkpoint, trying the one before: %s", error)
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged; training does not start "
            "again from step 0: move that folder away, or choose another `output_dir`"
        )
    return None


def read_record(path: Path) -> CheckpointRecord:
    """The record of the checkpoint `path`.

    Raises:
        CheckpointError: if it is malformed.
    """
    try:
        record = CheckpointRecord.from_dict(read_json(path / _RECORD))
    except ValueError as error:
        raise CheckpointError(f"{path / _RECORD}: {error}") from None
    if path.name != f"step-{record.step:08d}":
        raise CheckpointError(f"{path / _RECORD}: no valid step")
    return record


def read_tensors(path: Path) -> TensorFiles:
    """The tensors of a verified checkpoint, by file."""
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest step first; other names are ignored."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: path.name, reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless `path` has exactly the files of its manifest, unchanged."""
    try:
        manifest = read_json(path / _MANIFEST)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    listed, version = manifest.get("files"), manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version}, this version reads 1")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: {_MANIFEST} lists no files")
    actual = {file.name for file in path.iterdir()} - {_MANIFEST}
    if actual != set(listed):
        raise CheckpointError(f"{path}: missing or extra files {sorted(actual ^ set(listed))}")
    for name, entry in listed.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is not a regular file")
        if _digest(path / name) != entry:
            raise CheckpointError(f"{path / name}: content differs from {_MANIFEST}")
    read_record(path)


def _manifest(folder: Path) -> Json:
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    return {"format_version": FORMAT_VERSION, "files": files}


def _digest(path: Path) -> Json:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
