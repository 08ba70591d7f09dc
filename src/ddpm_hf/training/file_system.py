"""What the file system of a run folder can do, tried with small files before training."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm_hf.training.errors import CheckpointError

logger = logging.getLogger(__name__)

PROBE_PREFIX = ".probe-"
"""Start of the name of the temporary folder."""

_CONSEQUENCES = {
    "append": "metrics.jsonl is written anew for each entry",
    "fsync": "after a power failure, the run may resume from an older checkpoint",
    "locks": "two runs at once in this folder are not noticed, and would damage each other",
}


@dataclass(frozen=True)
class FileSystem:
    """The file system of a run folder.

    It can rename folders, which checkpoints need. A network file system may report an fsync that it
    postpones, and hold locks on one machine only: neither can be found out from here.

    Attributes:
        kind: its type in /proc/mounts, such as ext4 or nfs4; "" on other systems than Linux.
        missing: what fails, of append, fsync and locks, with the reason.
    """

    kind: str
    missing: Mapping[str, str]

    def __str__(self) -> str:
        works = ", ".join(name for name in ("rename", *_CONSEQUENCES) if name not in self.missing)
        without = f"; no {', '.join(self.missing)}" if self.missing else ""
        return f"{self.kind or 'file system'} with {works}{without}"


def probe_file_system(folder: Path) -> FileSystem:
    """Try in `folder` what a run needs, and warn of what fails with its consequence.

    Raises:
        CheckpointError: if folders and files cannot be renamed.
        OSError: if no file can be written at all.
    """
    kind, missing = _kind(folder), {}
    with tempfile.TemporaryDirectory(prefix=PROBE_PREFIX, dir=folder) as name:
        place = Path(name)
        if reason := _failure(_rename, place):
            raise CheckpointError(
                f"`output_dir` {folder} is on a file system{f' ({kind})' * bool(kind)} that cannot"
                f" rename folders ({reason}); checkpoints would be incomplete while they are"
                " written. Choose a folder on a disk, and copy it at the end"
            )
        for what, action in {"append": _append, "fsync": _fsync, "locks": _lock}.items():
            if reason := _failure(action, place):
                missing[what] = reason
                logger.warning(
                    "no %s in `output_dir` %s (%s): %s", what, folder, reason, _CONSEQUENCES[what]
                )
    return FileSystem(kind, missing)


def _failure(action: Callable[[Path], None], place: Path) -> str:
    """Why `action` fails; "" if it works."""
    try:
        action(place)
    except (OSError, NotImplementedError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _rename(place: Path) -> None:
    """Rename a folder with a file, then replace a file by another one."""
    source, target = place / "source", place / "target"
    source.mkdir()
    for name in ("old", "new"):
        (source / name).write_text(name)
    os.rename(source, target)
    os.replace(target / "new", target / "old")
    if source.exists() or (target / "old").read_text() != "new":
        raise OSError("a renamed file keeps its old name or content")


def _append(place: Path) -> None:
    file = place / "appended"
    file.write_text("1")
    with file.open("a") as opened:
        opened.write("2")
    if file.read_text() != "12":
        raise OSError("appended text is lost")


def _fsync(place: Path) -> None:
    with (place / "synced").open("w") as file:
        os.fsync(file.fileno())
    if sys.platform != "win32":  # cannot open folders
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(place: Path) -> None:
    """Hold a lock, which a second holder must not get."""
    file = place / "lock"
    with FileLock(file):
        second = FileLock(file)
        with suppress(Timeout):
            second.acquire(timeout=0)
            second.release()
            raise OSError("two holders got the same lock")


def _kind(folder: Path) -> str:
    """Type of the file system as Linux names it, or ""."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    path, found = folder.resolve(), (0, 0, "")
    for number, line in enumerate(mounts.read_text(encoding="utf-8").splitlines()):
        _, point, kind, *_ = line.split(" ")
        if path.is_relative_to(point.replace("\\040", " ")):
            found = max(found, (len(point), number, kind))
    return found[2]
