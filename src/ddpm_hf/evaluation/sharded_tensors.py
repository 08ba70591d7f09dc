"""Tensors computed in shards by all ranks; an interrupted computation resumes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import load, save
from torch import Tensor

from ddpm_hf.shared_work import compute_missing_files, unsealed

Shard = dict[str, Tensor]


def compute_shards(
    state: PartialState,
    folder: Path,
    sizes: Sequence[int],
    compute: Callable[[int], Shard],
    *,
    progress: bool = True,
) -> list[Shard] | None:
    """All shards in order; those that are missing in `folder` are computed.

    A shard does not depend on the rank that computes it. All ranks must share `folder`.

    Args:
        state: the ranks.
        folder: belongs to this computation only; the caller removes it once the result is written.
        sizes: images per shard, for the progress bar.
        compute: returns the tensors of shard i by name.
        progress: show a progress bar on the main rank.
    Returns:
        the shards on the main rank, None on others.
    Raises:
        ValueError, OSError: on all ranks, if one of them fails.
    """
    paths = [folder / f"part-{i:06d}.safetensors" for i in range(len(sizes))]

    def content(i: int) -> bytes:
        tensors = {name: tensor.contiguous() for name, tensor in compute(i).items()}
        return bytes(save(tensors))

    def read(path: Path) -> Shard:
        return dict(load(unsealed(path)))

    compute_missing_files(state, paths, sizes, content, read, progress=progress)
    return [read(path) for path in paths] if state.is_main_process else None
