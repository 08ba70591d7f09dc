"""One process at a time has a folder; the system frees it however that process ends."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import PartialState

from ddpm_hf.shared_work import from_main

IN_USE = ".in-use"
_PATIENCE_S = 15.0


class InUseError(ValueError):
    """Another process has what this one asks for."""


@contextmanager
def sole_use(state: PartialState, folder: Path, what: str, other: str) -> Iterator[None]:
    """Inside, these processes alone have `folder`: the main one holds the lock for all of them.

    Nothing is left of the lock, nor of a folder that was not there and in which nothing was put.

    Args:
        state: the processes.
        folder: made if missing.
        what: what people call it.
        other: what they may choose another one of.
    Raises:
        InUseError: on all processes, if those of another command have it.
        OSError: on all processes, if it cannot be written.
    """
    with ExitStack() as stack:
        from_main(state, lambda: stack.enter_context(_kept_clean(folder, what, other)))
        yield


@contextmanager
def _kept_clean(folder: Path, what: str, other: str) -> Iterator[None]:
    is_new, file = not folder.exists(), folder / IN_USE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(file, what, other) as lock:
            try:
                yield
            finally:
                # Where the folder is gone with its lock, another process may have a new one.
                if _is_at(file, lock):
                    with suppress(PermissionError):  # Windows removes no file that is open
                        file.unlink()
    finally:
        if is_new:
            with suppress(OSError):  # something is in it
                folder.rmdir()


@contextmanager
def locked(file: Path, what: str, other: str) -> Iterator[IO[str]]:
    """Hold the lock `file`, made if missing, until the block or the process ends.

    Args:
        file: its folder must exist; holds the number of the process.
        what, other: as for `sole_use`.
    Raises:
        InUseError: if another process holds it.
        OSError: if it cannot be written.
    """
    while True:
        with open(file, "a+", encoding="utf-8") as lock:
            _acquire(lock, what, other)
            if not _is_at(file, lock):  # whoever held it has removed it
                continue
            lock.truncate(0)
            lock.write(f"{os.getpid()}")
            lock.flush()
            yield lock
            return


def _acquire(lock: IO[str], what: str, other: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes in one folder are the user's care.
        return
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read()
            # The workers of a killed process hold its lock for the seconds until they notice.
            if _is_alive(holder) or time.monotonic() > deadline:
                raise InUseError(
                    f"{what} is in use by process {holder or '?'}; wait for it, or choose another "
                    f"{other}"
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


def _is_at(file: Path, lock: IO[str]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(lock.fileno()))
    return False
