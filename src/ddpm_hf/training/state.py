"""What a run keeps on disk, and how none of it is lost.

A checkpoint is a folder of safetensors and JSON files with a manifest of sizes and SHA-256 sums. It
is written beside, synced, renamed into place and only then are older ones pruned, so a crash at
any moment leaves the newest complete checkpoint intact. Nothing is pickled.
"""

import contextlib
import hashlib
import logging
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_NAME = re.compile(r"step-(\d{8})")
# What a run is resumed by, and of which type it is.
_FACTS: dict[str, type | types.UnionType] = {
    "step": int, "ema_step": int, "scaler": dict | None, "elapsed_s": int | float,
    "config": dict, "parts": dict,
}  # fmt: skip


@dataclass
class TrainState:
    """All that changes while training; what does not is the configuration's.

    The learning rate, the order of the images and every random number follow from `step`, so they
    are not kept.
    """

    unet: torch.nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    scaler: Any = None
    step: int = 0

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[torch.nn.Module]:
        """The network with its averaged weights, which are what is sampled and shared."""
        parameters = list(self.unet.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield self.unet
        finally:
            self.ema.restore(parameters)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
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

    def restore(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Take over what `tensors` and `facts` of a checkpoint hold."""
        # Runs that were compiled once kept the names of the compiled network.
        weights, averages = (
            {name.removeprefix("_orig_mod."): value for name, value in tensors[file].items()}
            for file in ("unet.safetensors", "ema.safetensors")
        )
        self.unet.load_state_dict(weights)
        for (name, _), shadow in zip(
            self.unet.named_parameters(), self.ema.shadow_params, strict=True
        ):
            shadow.copy_(averages[name])
        self.ema.optimization_step = facts["ema_step"]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer.safetensors"].items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler is not None and facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.timesteps.load_state_dict(tensors.get("timesteps.safetensors", {}))
        self.step = facts["step"]

    def facts(self) -> dict[str, Any]:
        """What of the state is not a tensor."""
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return {"step": self.step, "ema_step": self.ema.optimization_step, "scaler": scaler}


def save_checkpoint(folder: Path, state: TrainState, facts: dict[str, Any], keep: int) -> Path:
    """Write `state` as folder/step-<step>, then prune to the newest `keep` checkpoints.

    Args:
        folder: the run's checkpoint folder, made if missing.
        state: what to save.
        facts: JSON values to keep beside it, such as the configuration.
        keep: checkpoints that remain, this one included.
    Returns:
        the path of the new checkpoint.
    Raises:
        ValueError: if a weight is not finite; nothing is written then.
        OSError, SafetensorError: if the disk refuses; older checkpoints are untouched then.
    """
    target = folder / f"step-{state.step:08d}"
    files = state.tensors()
    for name, tensors in files.items():
        check_finite(tensors, f"{name} at step {state.step}")
    with replacing_folder(target) as temporary:
        for name, tensors in files.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)
        write_json(temporary / "state.json", {**facts, **state.facts()})
        write_json(temporary / _MANIFEST, _manifest(temporary))
    _prune(target, keep)
    return target


def _prune(newest: Path, keep: int) -> None:
    """Leave `newest` and the `keep - 1` before it.

    One with a later step was found damaged when the run resumed before it, so it goes too: counted
    as the newest it would push out the only good one.
    """
    others = [path for path in list_checkpoints(newest.parent) if path != newest]
    earlier = [path for path in others if path.name < newest.name]
    for path in set(others) - set(earlier[: keep - 1]):
        remove_folder(path)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of `folder`, or None if there is none at all.

    A damaged one is named in a warning and the one before it is used.

    Raises:
        CheckpointError: if there are checkpoints but every one is damaged.
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
            "from zero over them: move that folder away, or choose another output_dir"
        )
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """What a verified checkpoint holds besides tensors: step, configuration, ..."""
    return read_json(path / "state.json")


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file, and the facts, of a verified checkpoint."""
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}, read_facts(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, newest step first; other names are ignored."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless `path` holds exactly the files of its manifest, unchanged."""
    manifest = _read_damaged(path / _MANIFEST)
    listed, version = manifest.get("files"), manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version}, this version reads 1")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: {_MANIFEST} lists no files")
    actual = {file.name for file in path.iterdir()} - {_MANIFEST}
    if actual != set(listed):
        raise CheckpointError(f"{path}: missing or extra files {sorted(actual ^ set(listed))}")
    for name, entry in listed.items():
        if _digest(path / name) != entry:
            raise CheckpointError(f"{path / name}: content differs from {_MANIFEST}")
    facts = _read_damaged(path / "state.json")
    wrong = [key for key, kind in _FACTS.items() if not isinstance(facts.get(key), kind)]
    if not wrong and facts["step"] != int(path.name.removeprefix("step-")):
        wrong = ["step"]
    if not wrong and not all(isinstance(part, dict) for part in facts["parts"].values()):
        wrong = ["parts"]
    if wrong:
        raise CheckpointError(f"{path / 'state.json'} has no valid {wrong[0]}")


def _read_damaged(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _manifest(folder: Path) -> dict[str, Any]:
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    return {"format_version": FORMAT_VERSION, "files": files}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
