"""Dry run of training: data, memory and disk space, with the plan and without writing anything."""

import hashlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddpm_hf.data import ImageDataset
from ddpm_hf.data.image_reports import describe_left_out
from ddpm_hf.data.image_source import PreparedSource
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.post_hoc_averages import snapshot_bytes
from ddpm_hf.training.run import Run
from ddpm_hf.utils.text import counted, file_size


@contextmanager
def temporary_cache(accelerator: Accelerator) -> Iterator[None]:
    """Prepare images in a temporary folder, which all ranks share, instead of the cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    # The folder of the cache has the space for images; a missing one is not created.
    parent = cache if cache.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="dry-run-", dir=parent) as folder:
        shared = broadcast_object_list([folder])[0]
        datasets.config.HF_DATASETS_CACHE = Path(shared)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
            accelerator.wait_for_everyone()


def describe_needs(run: Run) -> str:
    """Printed lines about the data, the memory used so far, and the files of a run."""
    lines = [
        *(f"data       {line}" for line in _describe_data(run)),
        f"memory     {_describe_memory(run)}",
        f"disk       {_describe_disk(run)}",
        f"dry run    nothing was written{_describe_kept(run)} and no update was made",
    ]
    return "\n".join(lines)


def _describe_kept(run: Run) -> str:
    """Suffix for images that were prepared before the run, outside its temporary cache."""
    match run.components.images.source:
        case PreparedSource(images=images) if not images.folder.is_relative_to(
            datasets.config.HF_DATASETS_CACHE
        ):
            return f", except for the prepared images in {images.folder},"
        case _:
            return ""


def _describe_data(run: Run) -> list[str]:
    match run.components.images.source:
        case StreamedImages(cache=cache):
            shards = cache.index.shards
            size = sum(shard.num_bytes for shard in shards)
            found = f"{file_size(size)} in {counted(len(shards), 'shard')}"
            return [f"{found}; the images are checked when read"]
        case PreparedSource(images=images):
            return _describe_prepared(images)
        case _:
            return [f"{counted(len(run.components.images), 'tensor')} from Python"]


def _describe_prepared(images: ImageDataset) -> list[str]:
    """All prepared images, before validation images are held out."""
    lines = [images.sources]
    if repeated := _num_repeated(images):
        lines.append(f"{counted(repeated, 'image')} equal to another one after preparation")
    if images.left_out:
        lines.append(describe_left_out(len(images), images.left_out, images.skipped))
    return lines


def _num_repeated(images: ImageDataset) -> int:
    """Number of images that repeat an earlier one, pixel by pixel."""
    digests = {hashlib.sha256(images.window(i).tobytes()).digest() for i in range(len(images))}
    return len(images) - len(digests)


def _describe_memory(run: Run) -> str:
    """Peak memory of the main process, which made a trial update."""
    if run.accelerator.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(), "of GPU memory"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        where = "per process, with all libraries"
    size = counted(run.micro_batch_size, "image")
    return f"{file_size(peak + _moments(run))} {where}, for {size} at once"


def _moments(run: Run) -> int:
    """Bytes of the optimizer's moments, which exist after the first update only."""
    return 0 if run.state.optimizer.state else 2 * _weights(run)


def _weights(run: Run) -> int:
    return sum(p.numel() * p.element_size() for p in run.state.unet.parameters())


def _describe_disk(run: Run) -> str:
    config, weights = run.config, _weights(run)
    # Weights, averages and two moments; a new checkpoint is complete before an old one is removed.
    tensors = 4 + len(run.state.averages)
    checkpoints = tensors * weights * (config.checkpoints_total_limit + 1)
    snapshots = snapshot_bytes(run)
    models = weights * (2 + config.keep_best)  # a new model is complete before the old is removed
    root = run.paths.root.absolute()
    folder = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"up to {file_size(checkpoints + models + snapshots)} in {run.paths.root} (checkpoints "
        f"{file_size(checkpoints)}{f', snapshots {file_size(snapshots)}' * bool(snapshots)}), "
        f"{file_size(free)} free; {_describe_cache(run)} in the cache"
    )


def _describe_cache(run: Run) -> str:
    source = run.components.images.source
    if isinstance(source, StreamedImages):
        return f"up to {file_size(source.cache.limit)} of streamed images"
    files = source.images.folder.iterdir() if isinstance(source, PreparedSource) else ()
    return f"{file_size(sum(file.stat().st_size for file in files))} of prepared images"
