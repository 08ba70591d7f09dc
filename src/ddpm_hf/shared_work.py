"""Work shared by the processes of `accelerate launch`: missing files are computed in parallel."""

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

_PROGRESS_INTERVAL_S = 1.0


def distributed_state() -> PartialState:
    """Rank, number of processes and device of this process; connects processes on CPUs too."""
    # On a machine without accelerator, `PartialState()` would give every process rank 0 of 1.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Processes wait for each other at the end of `compute_missing_files`.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def on_main_process(state: PartialState, action: Callable[[], T]) -> T:
    """Run `action` on the main process and return its result on all processes.

    A ValueError or OSError is raised on all processes too. The result is pickled. The variant for
    training, `training.rank_coordination.on_main_process`, detects hanging ranks and keeps the
    result, which may be any object, on the main process.
    """
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
def progress_from(bar: "tqdm[Any]", num_done: Callable[[], int]) -> Iterator[None]:
    """Set the progress bar to `num_done()` once a second, from a thread, until the block ends."""
    is_over = threading.Event()

    def update() -> None:
        while not is_over.wait(_PROGRESS_INTERVAL_S):
            with suppress(OSError):  # a temporary error of a network file system
                bar.update(num_done() - bar.n)

    thread = threading.Thread(target=update, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if not bar.disable:
            thread.join()


def compute_missing_files(
    state: PartialState,
    paths: Sequence[Path],
    sizes: Sequence[int],
    write: Callable[[int, Path], object],
    *,
    progress: bool = True,
) -> None:
    """Compute the files that do not exist yet, and return when all exist.

    A file appears under its name only when it is complete, so an interrupted call can be repeated.
    The content of a file must not depend on the process that computes it. All processes must see
    the folder; they wait for each other only at the end.

    Args:
        state: the processes; process p computes the missing files p, p + num_processes, ...
        paths: files in one folder that is used for nothing else.
        sizes: images in each file, for the progress bar, which counts those of all processes.
        write: `write(i, path)` writes file i to `path`, a temporary name.
        progress: show a progress bar, on the main process.
    Raises:
        Exception: on all processes, the first exception that `write` raised on any of them.
    """
    folder = paths[0].parent

    def missing_files() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(folder))
        return [i for i, path in enumerate(paths) if path.name not in names]

    def num_done() -> int:
        return sum(sizes) - sum(sizes[i] for i in missing_files())

    missing = on_main_process(state, missing_files)
    is_alone = state.num_processes == 1
    failure: Exception | None = None
    bar = tqdm(
        total=sum(sizes),
        initial=sum(sizes) - sum(sizes[i] for i in missing),
        desc="images",
        unit="image",
        leave=False,
        disable=None if progress and state.is_main_process else True,
    )
    with bar, nullcontext() if is_alone else progress_from(bar, num_done):
        try:
            for i in missing[state.process_index :: state.num_processes]:
                with replacing_file(paths[i]) as temporary:
                    write(i, temporary)
                if is_alone:
                    bar.update(sizes[i])
        except Exception as error:  # raised below, on all processes
            failure = error
        failures = [error for error in gather_object([failure]) if error is not None]
    if failures:
        raise failures[0]
