"""Sampling to disk, one file per batch: shared by processes, resumed after an interruption."""

import json
import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ddpm_hf.diffusion.atomic_files import write_text
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.inference_settings import OptimizedInference
from ddpm_hf.options import takes_options
from ddpm_hf.pictures import quantised
from ddpm_hf.sampling.batches import draw_batch, pipeline_arguments
from ddpm_hf.sampling.image_reader import (
    RECORD_NAME,
    DrawnImages,
    batch_files,
    open_batch_files,
)
from ddpm_hf.sampling.options import DrawOptions
from ddpm_hf.sampling.sampling_record import DamagedRecordError, SamplingRecord, sampling_record
from ddpm_hf.utils.digests import json_digest
from ddpm_hf.utils.locks import FOLDER_LOCK, exclusive_folder
from ddpm_hf.utils.shared_work import (
    array_bytes,
    compute_missing_files,
    distributed_state,
    on_main_process,
    read_array,
)

logger = logging.getLogger(__name__)


@takes_options(DrawOptions)
def draw_to(
    pipeline: GaussianDDPMPipeline,
    folder: str | Path,
    num_images: int,
    *,
    dtype: str | None = None,
    optimized: OptimizedInference | None = None,
    **options: Any,
) -> DrawnImages:
    """Sample images into a folder, or those that are missing in it.

    All processes of `accelerate launch` call this function, each with the pipeline on its device,
    and share the work: batch b is one file, written atomically by process b modulo their number.
    Repeat an interrupted call to resume it. Memory does not grow with `num_images`.

    Args:
        pipeline: pipeline that samples the images, on its device.
        folder: folder for the images and their record, `options.json`, on a file system that all
            processes see. Created if missing.
        num_images: number of images N.
        dtype: pixel type in the files: "uint8", "uint16", or "float32" in [0, 1]; by default the
            bit depth of the model.
        optimized: result of `ddpm_hf.optimize` for this pipeline, for the record.
        seed: the generator of image i is seeded with a hash of `seed` and i.
        class_labels: class numbers or names; image i gets number i modulo their count. By default
            all classes.
        guidance_scale, guidance_interval, guide: guidance, as for the pipeline.
        num_inference_steps, timesteps, eta: steps, as for the pipeline.
        batch_size: images per batch. The last batch is filled up with the images that follow. Bits
            depend on the batch size by rounding errors; see `ddpm_hf.sampling`.
        overwrite: delete images in the folder that were sampled with other options.
        progress: show progress bars on the main process.
    Returns:
        the images, on all processes, when all are sampled.
    Raises:
        ValueError: if the folder contains images that were sampled with other options (with the
            option and both values) or other files; if another process uses it; for options that
            the pipeline does not support.
        TypeError: for an unknown option.
        OSError: if the folder cannot be written.
    """
    folder, state = Path(folder).expanduser(), distributed_state()
    drawing = DrawOptions(num_images=num_images, **options)
    record = sampling_record(pipeline, drawing, dtype=dtype, optimized=optimized)
    with exclusive_folder(state, folder, "folder"):
        draw_batch_files(state, pipeline, folder, record, drawing)
        return open_batch_files(folder)


def draw_batch_files(
    state: PartialState,
    pipeline: GaussianDDPMPipeline,
    folder: Path,
    record: SamplingRecord,
    options: DrawOptions,
) -> None:
    """Sample the missing batches; returns on all processes when all exist.

    Args:
        state: the processes, which hold the lock of the folder.
        pipeline: pipeline that samples the images.
        folder: existing folder for the batches.
        record: the record for these options.
        options: options of `draw_to`.
    """
    on_main_process(state, lambda: _prepare_folder(folder, record, options.overwrite))
    settings = record.settings
    num_images, size = settings.num_images, settings.batch_size
    bit_depth = {"uint8": 8, "uint16": 16}.get(settings.dtype)
    paths = batch_files(folder, settings)
    sizes = [min(size, num_images - first) for first in range(0, num_images, size)]
    is_shown = options.progress and state.is_main_process
    disable = None if is_shown else True  # None: only without a terminal
    pipeline.set_progress_bar_config(leave=False, desc="denoising", disable=disable)
    call = pipeline_arguments(options)
    seconds_per_image: list[float] = []

    def content(number: int) -> bytes:
        indices, start = range(number * size, (number + 1) * size), time.monotonic()
        images = draw_batch(
            pipeline, indices, seed=settings.seed, class_labels=settings.class_labels, **call
        )[: sizes[number]]
        seconds_per_image.append((time.monotonic() - start) / size)
        return array_bytes(quantised(images, bit_depth) if bit_depth else images)

    try:
        compute_missing_files(state, paths, sizes, content, read_array, progress=options.progress)
    except (ValueError, OSError):
        if state.is_main_process and not any(path.exists() for path in paths):
            (folder / RECORD_NAME).unlink()
        raise
    measured = gather_object(seconds_per_image)
    if measured and state.is_main_process:
        _record_time(folder / RECORD_NAME, statistics.median(measured))


def _record_time(path: Path, seconds_per_image: float) -> None:
    """Add the time per image to a record without one."""
    record = SamplingRecord.read(path)
    if record is not None and record.seconds_per_image is None:
        write_record(path, replace(record, seconds_per_image=seconds_per_image))


def write_record(path: Path, record: SamplingRecord) -> None:
    """Write a record atomically, with its checksum."""
    content = dict(record.to_dict())
    content["sha256"] = json_digest(content)
    write_text(path, json.dumps(content, indent=1) + "\n")


def _prepare_folder(folder: Path, record: SamplingRecord, overwrite: bool) -> None:
    """Write the record into `folder`, unless an equal one is there.

    Raises:
        ValueError: if the folder contains images with other settings, or other files.
    """
    files = list(folder.glob("part-*.npy"))
    try:
        existing = SamplingRecord.read(folder / RECORD_NAME)
    except DamagedRecordError as error:
        known = {FOLDER_LOCK, RECORD_NAME, *(file.name for file in files)}
        if any(path.name not in known for path in folder.iterdir()):
            raise
        logger.warning("%s; the images are sampled again", error)
        existing, overwrite = None, True
        (folder / RECORD_NAME).unlink()
        for file in files:
            file.unlink()
        files = []
    if existing is None:
        if any(path.name != FOLDER_LOCK for path in folder.iterdir()):
            raise ValueError(f"{folder} contains other files: choose another `folder`")
        difference = None
    elif (difference := existing.settings.difference(record.settings)) is None:
        return
    if files and not overwrite:
        raise ValueError(
            f"{folder} contains images with {difference}: pass `overwrite=True` to replace them, or"
            " choose another `folder`"
        )
    for file in files:
        file.unlink()
    write_record(folder / RECORD_NAME, record)
