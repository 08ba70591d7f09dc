# SPDX-License-Identifier: Apache-2.0
"""JSON read within bounds; files and folders that are never half-written.

What is written is made beside, flushed to disk, then renamed. Needs no library, so that a model
card can be written without torch. Travels with the weights.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**22  # a scheduler's configuration may list 100,000 betas


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is no file.

    Raises:
        ValueError: if it is too large, no valid JSON, nested too deeply, or no object.
    """
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an error.

    A crash leaves either the old folder or the new one under the name `target`, or, in the instant
    between two renames, the old one beside it as `.old-NAME`.
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
    """A staging folder whose files take their places in `folder` when the block ends.

    A new folder appears by one rename. In an existing one each file is replaced by a rename, and
    files of others stay. After an error while writing `folder` is as before.

    Args:
        folder: where the files go.
        last: name of the file that is replaced after all others.
        stale: files of `folder` to remove then, unless they are among the new ones.
    """
    is_new = not folder.exists()
    # Of one length, for a name of 255 bytes; of one name, so that the next save clears it away.
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
            with suppress(OSError):  # a folder that is not empty stays
                path.parent.rmdir()
    for path in {folder, *((folder / file).parent for file in files)}:
        sync(path)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path beside `path`; the file written there takes its place when the block ends."""
    beside = path.with_name(f".new-{path.name}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a UTF-8 text file, with line ends as they are."""
    with replacing_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def remove_folder(path: Path) -> None:
    """Delete a folder; renamed first, so that a crash never leaves half of it under its name."""
    if path.is_file():  # in its place
        path.unlink()
    if not path.exists():
        return
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A new, empty folder, which is gone after the block unless it was renamed."""
    shutil.rmtree(path, ignore_errors=True)  # a killed process may have left it
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
