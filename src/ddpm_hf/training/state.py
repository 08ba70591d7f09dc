"""What a run keeps on disk, and how none of it is lost.

A checkpoint is a folder of safetensors and JSON files with a manifest of sizes and SHA-256 sums. It
is written beside, synced, renamed into place and only then are older ones pruned, so a crash at
any moment leaves the newest complete checkpoint intact. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_hf.portable_ddpm_hf import check_finite, sync

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"(\.del-)?(?P<kind>\.(new|old|del)-)(?P<name>model|step-\d{8})")
# What a run replaces or cuts: such files of somebody else's must not be there when it begins.
_WRITTEN = ("model", "config.yaml", "metrics.jsonl")
_LOCK_PATIENCE_S = 15.0


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used."""


@dataclass
class TrainState:
    """All that changes while training; what does not is the configuration's.

    The learning rate, the order of the images and every random number follow from `step`, so they
    are not kept.
    """

    unet: torch.nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
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
        return {
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
        self.unet.load_state_dict(tensors["unet.safetensors"])
        averages = tensors["ema.safetensors"]
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
        _remove(path)


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
    """What a checkpoint holds besides tensors: step, configuration, ..."""
    facts: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return facts


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file, and the facts, of a verified checkpoint."""
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}, read_facts(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, newest step first; other names are ignored."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless `path` holds exactly the files of its manifest, unchanged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable {_MANIFEST} ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version}, this version reads 1")
    actual = {file.name for file in path.iterdir()} - {_MANIFEST}
    if actual != set(listed):
        raise CheckpointError(f"{path}: missing or extra files {sorted(actual ^ set(listed))}")
    for name, entry in listed.items():
        if _digest(path / name) != entry:
            raise CheckpointError(f"{path / name}: content differs from {_MANIFEST}")


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an error.

    Everything written is on disk before the rename. A crash leaves either the old folder or the
    new one under the name `target`, or, in the instant between two renames, the old one beside it
    (`sweep` puts it back).
    """
    temporary = target.with_name(f".new-{target.name}")
    retired = target.with_name(f".old-{target.name}")
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except BaseException:
        _remove(temporary)
        raise
    _remove(retired)
    if target.exists():
        os.rename(target, retired)
    os.rename(temporary, target)
    sync(target.parent)
    _remove(retired)


def sweep(folder: Path) -> None:
    """Clear what a crash left in `folder`: half-written folders go, a retired one without its
    successor returns."""
    if not folder.is_dir():
        return
    for leftover in folder.iterdir():
        found = _LEFTOVER.fullmatch(leftover.name) if leftover.is_dir() else None
        if found and found["kind"] == ".old-" and not (folder / found["name"]).exists():
            os.rename(leftover, folder / found["name"])
        elif found:
            _remove(leftover)


@contextlib.contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` (made if missing) for this run alone, until the block or process ends.

    A run that fails before it has written anything else leaves no folder that was not there.

    Raises:
        CheckpointError: if it cannot be written, another run holds it, or it holds other things.
    """
    was_there, file = output_dir.exists(), output_dir / ".lock"
    _refuse_foreign_files(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(
            f"cannot write to output_dir {output_dir}: {error.strerror}; choose another one"
        ) from error
    try:
        with lock:
            _lock_or_raise(lock, output_dir)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield
    finally:
        if not was_there and list(output_dir.iterdir()) == [file]:
            shutil.rmtree(output_dir)


def _refuse_foreign_files(output_dir: Path) -> None:
    is_a_run = (output_dir / ".lock").exists() or list_checkpoints(output_dir / "checkpoints")
    foreign = [name for name in _WRITTEN if (output_dir / name).exists()]
    if foreign and not is_a_run:
        raise CheckpointError(
            f"output_dir {output_dir} holds {', '.join(foreign)}, which no run of training put "
            "there and this one would replace; choose another one"
        )


def _lock_or_raise(lock: Any, output_dir: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two runs in one folder are then the user's care.
        return
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read()
            # The workers of a killed run hold its lock for the seconds until they notice.
            if _is_alive(holder) or time.monotonic() > deadline:
                raise CheckpointError(
                    f"output_dir {output_dir} is in use by process {holder or '?'}; wait for it, "
                    "or choose another one"
                ) from error
        time.sleep(0.2)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _manifest(folder: Path) -> dict[str, Any]:
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    return {"format_version": FORMAT_VERSION, "files": files}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _remove(path: Path) -> None:
    """Delete a folder; renamed first, so that a crash never leaves half of it under its name."""
    if not path.exists():
        return
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
