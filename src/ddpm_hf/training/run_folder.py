"""The folder of a run: exclusive lock, recovery after a crash, JSON files."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddpm_hf.diffusion.atomic_files import remove_folder
from ddpm_hf.paths import RunPaths
from ddpm_hf.training.early_checks import refuse_foreign_files
from ddpm_hf.training.errors import CheckpointError
from ddpm_hf.training.file_system import PROBE_PREFIX, FileSystem, probe_file_system
from ddpm_hf.utils.locks import InUseError, hold_lock

_LEFTOVER = re.compile(r"(\.del-)?(?P<kind>\.(new|old|del)-)(?P<name>model|best|step-\d{8})")


@contextlib.contextmanager
def run_lock(paths: RunPaths) -> Iterator[FileSystem]:
    """Hold the exclusive lock of a run folder, cleaned up, until the block or the process ends.

    The folder is created if missing, and removed if the run fails before it writes anything. Its
    file system is probed; one without locks costs a warning.

    Raises:
        CheckpointError: if another run holds the lock, the folder cannot be written or cannot hold
            complete checkpoints, or it contains files of that name that no run wrote.
    """
    output_dir, file = paths.root, paths.lock
    created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    refuse_foreign_files(paths)
    with contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            file_system = _probe(output_dir, created)
            if "locks" not in file_system.missing:
                stack.enter_context(hold_lock(file, output_dir, "output_dir"))
        except InUseError as error:
            raise CheckpointError(f"{error}") from None
        except OSError as error:
            raise CheckpointError(
                f"`output_dir` {output_dir} cannot be written: {error.strerror}; choose another one"
            ) from None
        stack.callback(_remove_unused, created, file)  # before the lock is released
        for folder in (output_dir, paths.checkpoints):
            _remove_leftovers(folder)
        yield file_system


def _remove_leftovers(folder: Path) -> None:
    """Clean up after a crash: remove incomplete folders, restore a replaced folder that has no
    successor."""
    if not folder.is_dir():
        return
    for leftover in folder.iterdir():
        match = _LEFTOVER.fullmatch(leftover.name) if leftover.is_dir() else None
        if match and match["kind"] == ".old-" and not (folder / match["name"]).exists():
            os.rename(leftover, folder / match["name"])
        elif match or leftover.name.startswith(PROBE_PREFIX):
            remove_folder(leftover)


def _probe(folder: Path, created: Sequence[Path]) -> FileSystem:
    try:
        return probe_file_system(folder)
    except (CheckpointError, OSError):
        _remove_empty(created)
        raise


def _remove_unused(created: Sequence[Path], lock: Path) -> None:
    """Remove the folders `created` for a run, innermost first, if they hold only its lock."""
    if created and set(created[0].iterdir()) <= {lock}:
        lock.unlink(missing_ok=True)
        _remove_empty(created)


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # another process has created files there
        for folder in folders:
            folder.rmdir()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON.

    Raises:
        ValueError: for NaN and infinities.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
