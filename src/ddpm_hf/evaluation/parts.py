"""Work in parts: shared by all processes, kept on disk, so that an interrupted one goes on."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.diffusion.files import sync

Part = dict[str, Tensor]


def join_processes() -> PartialState:
    """This process among those that `accelerate launch` started; the only one without it."""
    # Without `cpu` each of several processes on a machine that has no accelerator would be alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # One that has no part left waits for those of the others.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def compute_parts(
    state: PartialState,
    folder: Path,
    sizes: Sequence[int],
    compute: Callable[[int], Part],
    *,
    progress: bool = True,
) -> list[Part] | None:
    """All parts, in their order: those that are in `folder`, and the missing ones, made now.

    A part is the same whichever process makes it; `folder` must be one that all processes share.

    Args:
        state: the processes.
        folder: belongs to this very work; the caller removes it when the result is safe.
        sizes: images of each part, for the progress bar.
        compute: makes part i, as tensors by name.
        progress: show a progress bar, on the main process.
    Returns:
        the parts on the main process, None on the others.
    Raises:
        ValueError, OSError: on all processes, if one of them fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{i:06d}.safetensors" for i in range(len(sizes))]
    state.wait_for_everyone()
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    state.wait_for_everyone()  # all have the same list before the first adds a part
    mine = missing[state.process_index :: state.num_processes]
    failure: Exception | None = None
    with tqdm(
        total=sum(sizes[i] for i in mine),
        desc=f"images{' of this process' if state.num_processes > 1 else ''}",
        unit="image",
        leave=False,
        disable=None if progress and state.is_main_process else True,
    ) as bar:
        try:
            for i in mine:
                _save(compute(i), paths[i])
                bar.update(sizes[i])
        except (ValueError, OSError) as error:
            failure = error
    failures = [error for error in gather_object([failure]) if error is not None]
    if failures:
        raise failures[0]
    return [load_file(path) for path in paths] if state.is_main_process else None


def _save(part: Part, path: Path) -> None:
    beside = path.with_name(f".new-{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in part.items()}, beside)
    sync(beside)
    os.replace(beside, path)
