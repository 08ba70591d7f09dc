"""Exclusive locks; the operating system releases them when their process ends, also by SIGKILL."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout

from ddpm_hf.paths import output_folder
from ddpm_hf.utils.shared_work import on_main_process

FOLDER_LOCK = ".in-use"
# A child that was forked by other than Python code keeps the lock of its killed parent until it
# ends, which takes some seconds.
_DEAD_HOLDER_WAIT_S = 15.0


class InUseError(ValueError):
    """Another process holds the lock."""


@contextmanager
def exclusive_folder(
    state: PartialState, folder: Path, option: str, *, output: Path | None = None
) -> Iterator[None]:
    """Reserve `folder` for the processes of this launch until the block ends.

    The main process holds the lock. Afterwards the lock file is removed, and also the folder if it
    was created here and is empty.

    Args:
        state: the processes.
        folder: created if missing.
        option: argument that the error message suggests to change.
        output: path in the error message, by default `folder`.
    Raises:
        InUseError: on all processes, if another command uses the folder.
        ValueError: for a path that does not name a folder; see `output_folder`.
        OSError: on all processes, if the folder cannot be written.
    """
    try:
        output_folder(folder)
    except ValueError as error:
        raise ValueError(f"`{option}`: {error}") from None
    with ExitStack() as stack:
        lock = _folder_lock(folder, output or folder, option)
        try:
            on_main_process(state, lambda: stack.enter_context(lock))
        except OSError as error:
            raise OSError(
                f"`{option}` {output or folder} cannot be written: {error.strerror or error};"
                " choose another one"
            ) from None
        yield


@contextmanager
def _folder_lock(folder: Path, output: Path, option: str) -> Iterator[None]:
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(folder / FOLDER_LOCK, output, option, keep_file=False):
            for leftover in folder.glob(".del-*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def hold_lock(file: Path, output: Path, option: str, *, keep_file: bool = True) -> Iterator[None]:
    """Hold the lock `file` until the block or the process ends.

    Args:
        file: created if missing, in an existing folder; contains the process id of the holder.
        output: path in the error message.
        option: argument that the error message suggests to change.
        keep_file: whether the file stays after the block.
    Raises:
        InUseError: if another process holds the lock.
        OSError: if the file cannot be written.
    """
    lock = FileLock(file, on_acquired=_write_process_id, preserve_lock_file=keep_file)
    try:
        lock.acquire(
            timeout=_DEAD_HOLDER_WAIT_S,
            poll_interval=0.2,
            cancel_check=lambda: _is_alive(_holder(file)),
        )
    except Timeout:
        raise InUseError(
            f"{output} is in use by process {_holder(file) or '?'}; wait for it, or choose another"
            f" `{option}`"
        ) from None
    try:
        yield
    finally:
        # If the folder was deleted meanwhile, another process may have created it and its lock.
        if not keep_file and _holder(file) == str(os.getpid()):
            file.unlink()
        lock.release()


def _write_process_id(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _holder(file: Path) -> str:
    """Process id in a lock file; "" where it cannot be read, such as a locked file on Windows."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError):
        return ""


def _is_alive(process_id: str) -> bool:
    if sys.platform == "win32":  # no fork: a lock that is held has a living holder
        return True
    try:
        os.kill(int(process_id), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True
