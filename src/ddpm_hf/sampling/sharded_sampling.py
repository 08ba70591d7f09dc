"""Images in parts on disk: shared by processes, gone on where it was killed."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ddpm_hf.diffusion.atomic_files import read_json, write_text
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.locks import FOLDER_LOCK, exclusive_folder
from ddpm_hf.pictures import quantised
from ddpm_hf.sampling.batches import draw_batch
from ddpm_hf.sampling.image_reader import OPTIONS_NAME, DrawnImages, open_parts, part_paths
from ddpm_hf.sampling.sampling_record import about_images, difference, settings_in
from ddpm_hf.shared_work import compute_missing_files, distributed_state, on_main_process


def draw_to(
    pipeline: GaussianDDPMPipeline,
    folder: str | Path,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int = 16,
    class_labels: Sequence[int | str] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **call: Any,
) -> DrawnImages:
    """Draw images into a folder, or the ones that are missing there.

    All processes of `accelerate launch` call this, each with the pipeline on its device, and share
    the work: batch b is one file, written whole or not at all, and made by process b mod their
    number. A call that is killed goes on when it is made again. Memory does not grow with
    `num_images`.

    Args:
        pipeline: draws them, on its device.
        folder: gets the images and `options.json`, which says how they were drawn; all processes
            must see it. Made if missing.
        num_images: N, how many.
        seed: image i comes from a generator seeded with a hash of `seed` and i.
        batch_size: images drawn at once. The last batch is filled up with the images that would
            follow. Bits are the same at one batch size; see `ddpm_hf.sampling` for others.
        class_labels: numbers or names of classes, given to the images in turn: image i has that at
            i mod their number; by default every class.
        dtype: what is kept: "uint8", "uint16", or "float32" in [0, 1]; by default the bit depth of
            the model's images.
        overwrite: draw anew where the folder holds images that were drawn with other options.
        progress: show progress bars, on the main process.
        **call: of the pipeline: `num_inference_steps`, `timesteps`, `eta`, `guidance_scale`,
            `guidance_interval`, `guide`.
    Returns:
        the images, on every process, when all are drawn.
    Raises:
        ValueError: if the folder holds images that were drawn otherwise (naming the option and both
            values), or holds other things; if another process draws there; if the pipeline cannot
            draw such images.
        TypeError: for another argument.
        OSError: if the folder cannot be written.
    """
    folder, state = Path(folder).expanduser(), distributed_state()
    about = about_images(
        pipeline,
        num_images,
        seed=seed,
        batch_size=batch_size,
        class_labels=class_labels,
        dtype=dtype,
        call=call,
    )
    with exclusive_folder(state, folder, "folder"):
        draw_parts(
            state, pipeline, folder, about, overwrite=overwrite, progress=progress, call=call
        )
        return open_parts(folder)


def draw_parts(
    state: PartialState,
    pipeline: GaussianDDPMPipeline,
    folder: Path,
    about: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
    call: Mapping[str, Any],
) -> None:
    """The files of `draw_to`; returns when all are there, on every process.

    Args:
        state: the processes.
        about: of `about_images`, with the same `call`.
        folder: there, and for these processes alone.
        pipeline, overwrite, progress, call: as for `draw_to`.
    """
    on_main_process(state, lambda: _claim(folder, about, overwrite))
    settings = about["settings"]
    num_images, size, seed, labels = (
        settings[name] for name in ("num_images", "batch_size", "seed", "class_labels")
    )
    bits = {"uint8": 8, "uint16": 16}.get(settings["dtype"])
    paths = part_paths(folder, settings)
    sizes = [min(size, num_images - first) for first in range(0, num_images, size)]
    shown = progress and state.is_main_process
    silent = None if shown else True  # None: where nobody watches
    pipeline.set_progress_bar_config(leave=False, desc="denoising", disable=silent)
    call = {name: value for name, value in call.items() if value is not None}
    seconds: list[float] = []  # per image, of each batch

    def write(part: int, path: Path) -> None:
        indices, began = range(part * size, (part + 1) * size), time.monotonic()
        images = draw_batch(pipeline, indices, seed=seed, class_labels=labels, **call)
        seconds.append((time.monotonic() - began) / size)
        images = images[: sizes[part]]
        np.save(path, quantised(images, bits) if bits else images)

    try:
        compute_missing_files(state, paths, sizes, write, progress=progress)
    except (ValueError, OSError):
        if state.is_main_process and not any(path.exists() for path in paths):
            (folder / OPTIONS_NAME).unlink()
        raise
    of_all = gather_object(seconds)
    there = read_json(folder / OPTIONS_NAME) if state.is_main_process else {}
    if of_all and there and "seconds_per_image" not in there:  # of what was drawn just now
        there["seconds_per_image"] = statistics.median(of_all)
        write_text(folder / OPTIONS_NAME, json.dumps(there, indent=1) + "\n")


def _claim(folder: Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Let `folder` hold images of these settings, or none yet.

    Raises:
        ValueError: if it holds others, or other things.
    """
    there, parts = settings_in(folder / OPTIONS_NAME), list(folder.glob("part-*.npy"))
    if there is None and any(path.name != FOLDER_LOCK for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other things than drawn images; choose another folder")
    otherwise = there is not None and difference(there, about["settings"])
    if there is not None and not otherwise:
        return
    if parts and not overwrite:
        raise ValueError(
            f"{folder} holds images of {otherwise}; pass overwrite=True to draw anew, or another "
            "folder=PATH"
        )
    for part in parts:
        part.unlink()
    write_text(folder / OPTIONS_NAME, json.dumps(about, indent=1) + "\n")
