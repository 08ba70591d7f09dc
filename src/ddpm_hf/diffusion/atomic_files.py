# SPDX-License-Identifier: Apache-2.0
"""Size-limited JSON reading, and atomic writing of files and folders.

Content is written under a temporary name, flushed to disk, then renamed. Imports only the standard
library, so that a model card can be written without torch. Travels with the weights.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**22  # the configuration of a scheduler may list 100,000 betas


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if the file does not exist.

    Raises:
        ValueError: if the file is too large, invalid, nested too deeply, or not an object.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a regular file in UTF-8.

    Raises:
        ValueError: if it is too large, not text, or a device or pipe, which may never end.
        OSError: if it cannot be read.
    """
    check_regular(path)
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
    with path.open("rb") as file:
        content = file.read(max_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def check_regular(path: Path) -> None:
    """Raise ValueError for a folder, device, pipe or socket; FileNotFoundError for nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Context manager: a new folder that replaces `target` when the block succeeds.

    After a crash, `target` is either the old or the new folder. Between the two renames there is no
    `target`, and the old folder is named `.old-NAME`.
    """
    retired = target.with_name(f".old-{target.name}")
    with _staging(target.with_name(f".new-{target.name}")) as staging:
        yield staging
        _sync_all(staging)
        remove_folder(retired)
        if target.exists():
            os.rename(target, retired)
        os.rename(staging, target)
    sync(target.parent)
    remove_folder(retired)


@contextmanager
def replacing_files(
    folder: Path, *, last: str, stale: Callable[[], Iterable[Path]]
) -> Iterator[Path]:
    """Context manager: a staging folder whose files replace those in `folder` on success.

    A new folder is created by a single rename. In an existing folder, each file is replaced by a
    rename, and other files are kept. An error in the block leaves `folder` unchanged.

    Args:
        folder: destination folder.
        last: name of the file that is replaced last.
        stale: returns the files of `folder` to remove afterwards, except new ones.
    """
    is_new = not folder.exists()
    # A short name, because names are limited to 255 bytes, and a fixed one, so that the next save
    # removes what a killed process left.
    name = f".saving-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:8]}"
    with _staging((folder.parent if is_new else folder) / name) as staging:
        yield staging
        _sync_all(staging)
        if is_new:
            staging.rename(folder)
            sync(folder.parent)
        else:
            _move_files(staging, folder, last, stale)


def _move_files(
    staging: Path, folder: Path, last: str, stale: Callable[[], Iterable[Path]]
) -> None:
    files = [p.relative_to(staging) for p in staging.rglob("*") if p.is_file()]
    for file in sorted(files, key=lambda p: (p.name == last, p)):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(staging / file, folder / file)
    new = set(files)
    for path in stale():
        if path.relative_to(folder) not in new:
            path.unlink()
            with suppress(OSError):  # the folder is not empty
                path.parent.rmdir()
    for path in {folder, *((folder / file).parent for file in files)}:
        sync(path)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path whose file replaces `path` when the block succeeds."""
    temporary = path.with_name(f".new-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a UTF-8 text file atomically, without newline translation."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; a full disk is an OSError even where the system reports it late."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        _fsync(file.fileno())
    if (size := path.stat().st_size) != len(content):
        raise OSError(errno.ENOSPC, f"only {size:,} of {len(content):,} bytes were written", path)


def remove_folder(path: Path) -> None:
    """Delete a folder or file; a crash never leaves part of a folder under its name."""
    if path.is_file():
        path.unlink()
    if not path.exists():
        return
    renamed = deleted_folder(path)
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(path, renamed)
    shutil.rmtree(renamed)


def deleted_folder(path: Path) -> Path:
    """Name of a folder while it is deleted, which is left if the process is killed."""
    return path.with_name(f".del-{path.name}")


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Context manager: an empty folder that is removed unless the block renames it."""
    shutil.rmtree(path, ignore_errors=True)  # left by a killed process
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, if the file system can."""
    with suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # has no fsync
            raise
