"""Work in parts: shared by all processes, kept on disk, so that an interrupted one goes on."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from tqdm.auto import tqdm

from ddpm_hf.diffusion.atomic_files import replacing_file

T = TypeVar("T")

_LOOK_S = 1.0  # how often the main process looks for what the others have made


def join_processes() -> PartialState:
    """This process among those that `accelerate launch` started; the only one without it."""
    # Without `cpu` each of several processes on a machine that has no accelerator would be alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # One that has no part left waits for those of the others.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def from_main(state: PartialState, action: Callable[[], T]) -> T:
    """`action()` of the main process, on all; a ValueError or OSError there is one on all."""
    result: T | None = None
    failure: Exception | None = None
    if state.is_main_process:
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    if state.num_processes > 1:
        result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


@contextmanager
def following(bar: "tqdm[Any]", num_done: Callable[[], int]) -> Iterator[None]:
    """Inside, the bar shows what all processes have done, also while this one waits for others."""
    through = threading.Event()

    def look() -> None:
        while not through.wait(_LOOK_S):
            with suppress(OSError):  # a file system of a network may stutter
                bar.update(num_done() - bar.n)

    thread = threading.Thread(target=look, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        through.set()
        if not bar.disable:
            thread.join()


def complete_parts(
    state: PartialState,
    paths: Sequence[Path],
    sizes: Sequence[int],
    write: Callable[[int, Path], object],
    *,
    progress: bool = True,
) -> None:
    """Make the files that are missing, each whole or not at all; return when all are there.

    A file is the same whichever process makes it; their folder must be one that all processes
    share. Nobody waits for another one before the end.

    Args:
        state: the processes; missing file number j is made by process j mod their number.
        paths: the files, in one folder, which belongs to this very work.
        sizes: images in each, for the progress bar, which counts those of all processes.
        write: `write(i, path)` makes file i, there; it is renamed then.
        progress: show a progress bar, on the main process.
    Raises:
        Exception: on all processes, what one of them failed by.
    """
    folder = paths[0].parent

    def missing_parts() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(folder))
        return [i for i, path in enumerate(paths) if path.name not in there]

    missing = from_main(state, missing_parts)
    num_missing = sum(sizes[i] for i in missing)
    failure: Exception | None = None
    bar = tqdm(
        total=sum(sizes),
        initial=sum(sizes) - num_missing,
        desc="images",
        unit="image",
        leave=False,
        disable=None if progress and state.is_main_process else True,
    )

    def num_done() -> int:
        return sum(sizes) - sum(sizes[i] for i in missing_parts())

    with bar, nullcontext() if state.num_processes == 1 else following(bar, num_done):
        try:
            for i in missing[state.process_index :: state.num_processes]:
                with replacing_file(paths[i]) as beside:
                    write(i, beside)
                if state.num_processes == 1:
                    bar.update(sizes[i])
        except Exception as error:  # the others wait for this process
            failure = error
        failures = [error for error in gather_object([failure]) if error is not None]
    if failures:
        raise failures[0]
