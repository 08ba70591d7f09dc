"""Work shared by the processes of `accelerate launch`: missing files are computed in parallel."""

import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from safetensors.torch import load, save
from tqdm.auto import tqdm

from ddpm_hf.diffusion.atomic_files import (
    check_regular,
    remove_folder,
    replacing_file,
    write_bytes,
)
from ddpm_hf.utils.process_watch import watch_ranks
from ddpm_hf.utils.rendezvous import connection

T = TypeVar("T")
Shard = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 1.0
_SEAL = b"ddpm-hf sha256 "


def distributed_state() -> PartialState:
    """Rank, number of processes and device of this process; connects processes on CPUs too."""
    # On a machine without accelerator, `PartialState()` would give every process rank 0 of 1.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Processes wait for each other at the end of `compute_missing_files`.
    state = PartialState(cpu=cpu, **connection(timedelta(days=1)))
    watch_ranks(state.process_index, state.num_processes)
    return state


def leave_process_group() -> bool:
    """End the work of this process with the others; whether it is the main one, which reports."""
    state = distributed_state()
    state.destroy_process_group()
    return bool(state.is_main_process)


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


def sealed(content: bytes) -> bytes:
    """The content of a file with its checksum at the end, which `unsealed` checks."""
    return content + _SEAL + hashlib.sha256(content).digest()


def unsealed(path: Path) -> bytes:
    """The content of a file without its checksum; files of older versions have none.

    Raises:
        ValueError: if the content differs from its checksum.
    """
    check_regular(path)
    content = path.read_bytes()
    end = len(content) - len(_SEAL) - hashlib.sha256().digest_size
    if end < 0 or content[end : end + len(_SEAL)] != _SEAL:
        return content
    if hashlib.sha256(memoryview(content)[:end]).digest() != content[end + len(_SEAL) :]:
        raise ValueError(f"{path} is damaged")
    return content[:end]


def array_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array in the format of `.npy` files."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read_array(path: Path) -> npt.NDArray[Any]:
    """The array of a file of `compute_missing_files`.

    Raises:
        ValueError, OSError, EOFError: if the file is damaged.
    """
    return np.load(io.BytesIO(unsealed(path)), allow_pickle=False)  # type: ignore[no-any-return]


def compute_missing_files(
    state: PartialState,
    paths: Sequence[Path],
    sizes: Sequence[int],
    compute: Callable[[int], bytes],
    read: Callable[[Path], object],
    *,
    progress: bool = True,
) -> None:
    """Compute the files that do not exist or are damaged, and return when all exist.

    Each file ends with a checksum, see `sealed`; damaged files are replaced, with a warning. A file
    appears under its name only when it is complete, so an interrupted call can be repeated. The
    content of a file must not depend on the process that computes it. All processes must see the
    folder; they wait for each other only at the end.

    Args:
        state: the processes; process p computes the missing files p, p + num_processes, ...
        paths: files in one folder that is used for nothing else.
        sizes: images in each file, for the progress bar, which counts those of all processes.
        compute: returns the content of file i.
        read: reads a file; raises an exception if it is damaged.
        progress: show a progress bar, on the main process.
    Raises:
        Exception: on all processes, the first exception that `compute` raised on any of them.
    """
    folder = paths[0].parent

    def missing_files() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(folder))
        return [i for i, path in enumerate(paths) if path.name not in names]

    def num_done() -> int:
        return sum(sizes) - sum(sizes[i] for i in missing_files())

    def remove_damaged() -> list[int]:
        missing = set(missing_files())
        for i, path in enumerate(paths):
            if i not in missing and (reason := _damage(path, read)):
                logger.warning("%s, and is computed again", reason)
                remove_folder(path)
        return missing_files()

    missing = on_main_process(state, remove_damaged)
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
                    write_bytes(temporary, sealed(compute(i)))
                if is_alone:
                    bar.update(sizes[i])
        except Exception as error:  # raised below, on all processes
            failure = error
        failures = [error for error in gather_object([failure]) if error is not None]
    if failures:
        raise failures[0]


def compute_shards(
    state: PartialState,
    folder: Path,
    sizes: Sequence[int],
    compute: Callable[[int], Shard],
    *,
    progress: bool = True,
) -> list[Shard] | None:
    """Tensors in shards, all in order; those that are missing in `folder` are computed.

    See `compute_missing_files`.

    Args:
        state: the processes.
        folder: belongs to this computation only; the caller removes it once the result is written.
        sizes: images per shard, for the progress bar.
        compute: returns the tensors of shard i by name.
        progress: show a progress bar.
    Returns:
        the shards on the main process, None on others.
    Raises:
        Exception: on all processes, the first exception that `compute` raised on any of them.
    """
    paths = [folder / f"part-{i:06d}.safetensors" for i in range(len(sizes))]

    def content(i: int) -> bytes:
        return bytes(save({name: tensor.contiguous() for name, tensor in compute(i).items()}))

    def read(path: Path) -> Shard:
        return dict(load(unsealed(path)))

    compute_missing_files(state, paths, sizes, content, read, progress=progress)
    return [read(path) for path in paths] if state.is_main_process else None


def _damage(path: Path, read: Callable[[Path], object]) -> str | None:
    """Why a file cannot be used; None if it can be."""
    try:
        read(path)
    except Exception as error:  # the libraries raise errors of many kinds
        return f"{path} is damaged" if f"{path}" not in f"{error}" else f"{error}"
    return None
