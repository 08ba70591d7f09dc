"""Sampling into a file or folder of a common format, resumed after an interruption."""

import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import deleted_folder, remove_folder
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.inference_settings import OptimizedInference
from ddpm_hf.options import takes_options
from ddpm_hf.pictures import is_picture
from ddpm_hf.sampling.image_reader import RECORD_NAME, open_batch_files
from ddpm_hf.sampling.options import DrawOptions
from ddpm_hf.sampling.output_paths import (
    HINT,
    batch_folder,
    check_is_free,
    check_output,
    holds_images,
    record_path,
)
from ddpm_hf.sampling.output_writers import is_folder, pixel_type_of, write_images
from ddpm_hf.sampling.sampling_record import (
    DamagedRecordError,
    SamplingRecord,
    SamplingSettings,
    sampling_record,
)
from ddpm_hf.sampling.sharded_sampling import draw_batch_files, write_record
from ddpm_hf.utils.locks import exclusive_folder
from ddpm_hf.utils.shared_work import distributed_state, on_main_process

logger = logging.getLogger(__name__)


@takes_options(DrawOptions)
def save_drawn(
    pipeline: GaussianDDPMPipeline,
    output: str | Path,
    num_images: int,
    *,
    model: Mapping[str, Any] | None = None,
    optimized: OptimizedInference | None = None,
    **options: Any,
) -> bool:
    """Sample images into a file or folder whose name determines the format.

    An image file, such as "grid.png", is one grid of all images. "x.npz" holds pixels (N, H, W, C)
    of uint8 or uint16 as `arr_0`, and the classes (N,) as `arr_1`, the format of guided-diffusion's
    evaluator; "x.npy" the same pixels as float32 in [0, 1]. "x.parquet" has the columns `image` and
    `label`, for `datasets`. Any other name is a folder with 00000.png, ...

    Except for a grid, the options are recorded in NAME.json. Incomplete images are in the folder
    NAME.parts: repeat an interrupted call to resume it. All processes of `accelerate launch` share
    the work; the main process writes the output. Memory does not grow with `num_images`, except for
    a grid.

    Args:
        pipeline: pipeline that samples the images, on its device.
        output: path of the output.
        num_images: number of images N.
        model: name of the model and further JSON values for the record, which are not compared.
        optimized: result of `ddpm_hf.optimize` for this pipeline, for the record.
        overwrite: replace existing images; in a folder, only numbered ones.
        **options: further options of `draw_to`.
    Returns:
        whether images were sampled: False if `output` holds the same images already.
    Raises:
        ValueError: if `output` holds images that were sampled with other options (with the option
            and both values), or its format cannot hold the images; if another process uses it; for
            options that the pipeline does not support.
        TypeError: for an unknown option.
        OSError: if the output cannot be written.
    """
    drawing = DrawOptions(num_images=num_images, **options)
    return save_images(
        pipeline, Path(output).expanduser(), drawing, model=model, optimized=optimized
    )


def save_images(
    pipeline: GaussianDDPMPipeline,
    output: Path,
    options: DrawOptions,
    *,
    model: Mapping[str, Any] | None = None,
    optimized: OptimizedInference | None = None,
) -> bool:
    """As `save_drawn`, with the options in one object."""
    check_output(output)
    state, dtype = distributed_state(), pixel_type_of(output, pipeline.unet)
    record = sampling_record(pipeline, options, dtype=dtype, model=model, optimized=optimized)
    folder = batch_folder(output)
    with reserved_output(output, state):
        if on_main_process(state, lambda: _is_complete(output, record.settings, options.overwrite)):
            if state.is_main_process:
                shutil.rmtree(deleted_folder(folder), ignore_errors=True)  # of a killed process
            return False
        if is_picture(output):  # half a grid with other options is of no use
            options = replace(options, overwrite=True)
        draw_batch_files(state, pipeline, folder, record, options)
        if state.is_main_process:
            write_images(open_batch_files(folder), output, options.progress)
            if not is_picture(output):
                size = _bytes_of(output)
                write_record(record_path(output), replace(record, output_bytes=size))
            remove_folder(folder)
    return True


def reserved_output(output: Path, state: PartialState) -> AbstractContextManager[None]:
    """Reserve `output` for these processes; raises InUseError if another process uses it."""
    return exclusive_folder(state, batch_folder(output), "output", output=output)


def _bytes_of(output: Path) -> int:
    """Size of a file, or of all numbered images of a folder."""
    files = output.glob("[0-9]*.png") if output.is_dir() else [output]
    return sum(file.stat().st_size for file in files)


def _is_complete(output: Path, settings: SamplingSettings, overwrite: bool) -> bool:
    """Whether `output` holds these images; ValueError if it holds others that must be kept."""
    _check_kind(output)
    try:
        incomplete = SamplingRecord.read(batch_folder(output) / RECORD_NAME)
    except DamagedRecordError:
        return False  # the batches are sampled again
    if overwrite or (incomplete and incomplete.settings.difference(settings) is None):
        return False
    complete = SamplingRecord.read(record_path(output))
    check_is_free(output)
    is_complete = complete is not None and holds_images(output)
    existing = complete if is_complete else None if is_picture(output) else incomplete
    if existing and (difference := existing.settings.difference(settings)):
        raise ValueError(f"{output} contains images with {difference}: {HINT}")
    if complete and is_complete and complete.output_bytes not in (None, _bytes_of(output)):
        logger.warning("%s is incomplete, and is sampled again", output)
        return False
    return is_complete


def _check_kind(output: Path) -> None:
    """Raise ValueError, before sampling, if a folder is where a file belongs or vice versa."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and output.is_dir() != is_folder(output):
        kind, needed = ("file", "folder") if is_folder(output) else ("folder", "file")
        raise ValueError(
            f"{output} is a {kind}, but the output is a {needed}: choose another `output`"
        )
