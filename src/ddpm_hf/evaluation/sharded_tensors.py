"""Tensors computed in parts, so that processes share the work and a killed one goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_hf.shared_work import compute_missing_files

Part = dict[str, Tensor]


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
    paths = [folder / f"part-{i:06d}.safetensors" for i in range(len(sizes))]

    def write(i: int, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in compute(i).items()}, path)

    compute_missing_files(state, paths, sizes, write, progress=progress)
    return [load_file(path) for path in paths] if state.is_main_process else None
