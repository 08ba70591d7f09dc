"""Checkpoints without their tensors: record, manifest and search for the newest.

Imports no torch, so that a command refuses changed options before torch is loaded.
"""

import dataclasses
import logging
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.training.errors import CheckpointError
from ddpm_hf.utils.digests import file_digest

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RECORD = "state.json"
_NAME = re.compile(r"step-(\d{8})")
_KINDS: dict[str, type | types.UnionType] = {
    "config": dict, "parts": dict, "elapsed_s": int | float, "num_processes": int | None,
    "num_threads": int | None, "step": int, "ema_step": int, "scaler": dict | None,
}  # fmt: skip

Json = dict[str, Any]


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
            f"again from step 0: move {folder.parent} away, or choose another `output_dir`"
        )
    return None


def read_record(path: Path) -> CheckpointRecord:
    """The record of the checkpoint `path`.

    Raises:
        CheckpointError: if it is malformed.
    """
    try:
        record = CheckpointRecord.from_dict(read_json(path / RECORD))
    except ValueError as error:
        raise CheckpointError(f"{path / RECORD}: {error}") from None
    if path.name != f"step-{record.step:08d}":
        raise CheckpointError(f"{path / RECORD}: no valid step")
    return record


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest step first; other names are ignored."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: path.name, reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless `path` has exactly the files of its manifest, unchanged."""
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    listed, version = manifest.get("files"), manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version}, this version reads 1")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: {MANIFEST} lists no files")
    actual = {file.name for file in path.iterdir()} - {MANIFEST}
    if actual != set(listed):
        raise CheckpointError(f"{path}: missing or extra files {sorted(actual ^ set(listed))}")
    for name, entry in listed.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is not a regular file")
        if file_digest(path / name) != entry:
            raise CheckpointError(f"{path / name}: content differs from {MANIFEST}")
    read_record(path)


def manifest_of(folder: Path) -> Json:
    """The manifest of a checkpoint: size and SHA-256 of each file."""
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    return {"format_version": FORMAT_VERSION, "files": files}
