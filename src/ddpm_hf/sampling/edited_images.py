"""Edits of a picture file into a folder, drawn in batches and resumed after an interruption."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from ddpm_hf.diffusion.atomic_files import read_json, remove_folder, replacing_file, write_text
from ddpm_hf.pictures import Pixels, image_grid, to_pil
from ddpm_hf.sampling.picture_edit import PictureEdit
from ddpm_hf.utils.digests import weights_digest
from ddpm_hf.utils.locks import exclusive_folder
from ddpm_hf.utils.shared_work import (
    array_bytes,
    compute_missing_files,
    distributed_state,
    on_main_process,
    read_array,
)

RECORD_NAME = "edit.json"
_PARTS = ".batches"


@dataclass(frozen=True)
class EditedImages:
    """Result of `edit_images`.

    Attributes:
        folder: its folder, with 000.png, ..., grid.png, edit.json and, for draws, std.png.
        images: (N, H, W, C), float32 in [0, 1].
        std: standard deviation over the draws, (H, W, C); None for fewer than 2 draws.
        expected_gain: share of the contrast of the picture that image to image keeps, for Gaussian
            data; None for other edits.
    """

    folder: Path
    images: Pixels
    std: Pixels | None
    expected_gain: float | None


def edit_images(
    edit: PictureEdit,
    folder: Path,
    *,
    overwrite: bool = False,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EditedImages:
    """Draw the images of an edit that are missing in `folder`.

    All processes of `accelerate launch` call this function and share the draws.

    Args:
        edit: the edit, with its pipeline on the device of this process.
        folder: for the images, a grid and the record; created if missing.
        overwrite: replace images of other options.
        model: name of the model and further JSON values for the record.
        progress: show progress bars on the main process.
    Returns:
        the images, on all processes.
    Raises:
        ValueError: for options that do not fit the model or each other, a folder with images of
            other options or other files, or one that another process uses.
        OSError: if a file cannot be read or written.
    """
    state, record = distributed_state(), _record(edit, model)
    with exclusive_folder(state, folder, "output"):
        on_main_process(state, lambda: _prepare_folder(folder, record, overwrite))
        images = _draw(state, edit, folder / _PARTS, progress)
        std = None
        if edit.options.kind in ("inpaint", "image to image") and len(images) > 1:
            std = images.std(axis=0, ddof=1)
        on_main_process(state, lambda: _write(folder, images, std, edit.pictures.image))
    return EditedImages(folder, images, std, edit.expected_gain())


def _record(edit: PictureEdit, model: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Content of edit.json: the options that determine the images, and the name of the model."""
    options = edit.options.to_dict() | dict(edit.setting.arguments())
    files = ("mask_image", "between")
    return {
        "format_version": 1,
        "kind": edit.options.kind,
        "model": dict(model or {}),
        "settings": {
            **{k: v for k, v in options.items() if v is not None and k not in files},
            "pictures": edit.pictures.digest(),
            "weights": weights_digest(edit.pipeline.unet),
            "device": edit.pipeline.device.type,  # each type has its own random numbers
            "scheduler_config": json.loads(edit.pipeline.scheduler.to_json_string()),
        },
    }


def _prepare_folder(folder: Path, record: Mapping[str, Any], overwrite: bool) -> None:
    """Write the record, unless an equal one is there.

    Raises:
        ValueError: if the folder has images of other options, or other files.
    """
    existing = read_json(folder / RECORD_NAME)
    if existing.get("settings") == json.loads(json.dumps(record["settings"])):
        return
    others = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if others and not existing:
        raise ValueError(f"{folder} contains other files: choose another `output`")
    if others and not overwrite:
        before, now = existing.get("settings") or {}, record["settings"]
        changed = next((k for k in {**before, **now} if before.get(k) != now.get(k)), "settings")
        raise ValueError(
            f"{folder} contains an edit with another `{changed}`: pass `overwrite=True` to replace"
            " it, or choose another `output`"
        )
    for path in others:
        path.unlink()
    remove_folder(folder / _PARTS)
    write_text(folder / RECORD_NAME, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _draw(state: PartialState, edit: PictureEdit, folder: Path, progress: bool) -> Pixels:
    batches = edit.batches()
    paths = [folder / f"batch-{i:04}.npy" for i in range(len(batches))]

    def content(number: int) -> bytes:
        return array_bytes(edit.draw(batches[number]))

    sizes = list(map(len, batches))
    try:
        compute_missing_files(state, paths, sizes, content, read_array, progress=progress)
    except (ValueError, OSError):
        if state.is_main_process and not any(path.exists() for path in paths):
            (folder.parent / RECORD_NAME).unlink()  # nothing to resume
            remove_folder(folder)
        raise
    return np.concatenate([read_array(path) for path in paths])


def _write(folder: Path, images: Pixels, std: Pixels | None, image: Image.Image) -> None:
    """The pictures: each image, all of them in a grid after the original, and the spread."""
    width = max(3, len(str(len(images) - 1)))
    drawn = [to_pil(pixels) for pixels in images]
    for i, picture in enumerate(drawn):
        _save(picture, folder / f"{i:0{width}}.png")
    _save(image_grid([image, *drawn]), folder / "grid.png")
    if std is not None:
        _save(image_grid([std.mean(-1, keepdims=True) / max(std.max(), 1e-6)]), folder / "std.png")


def _save(picture: Image.Image, path: Path) -> None:
    with replacing_file(path) as temporary:
        picture.save(temporary, format="PNG")
