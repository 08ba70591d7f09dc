"""Preparation of a dataset: read all headers, choose the target format, decode all images."""

import json
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decoding import (
    FILES_AT_ONCE,
    DecodedImage,
    ImageHeader,
    cell_name,
    decode_images,
    read_headers,
)
from ddpm_hf.data.encoded_images import EncodedImages
from ddpm_hf.data.errors import DataError, SeveralShapes
from ddpm_hf.data.file_limits import check_free_space
from ddpm_hf.data.image_conversion import Target, resize_shorter_side
from ddpm_hf.data.image_reports import bad_images_error, describe_files, quality_remarks
from ddpm_hf.diffusion.image_format import MAX_SIZE, ImageFacts

NATIVE_SIZE_LIMIT = 256
"""Images of one size keep it up to this side length; larger ones get a proposed resolution."""

# For less work, starting another process takes longer than decoding.
_ROWS_PER_WORKER = 1000
_PIXELS_PER_WORKER = 20_000_000
_ARROW_TYPES = {int: "int32", bool: "bool", bytes: "binary", str | None: "string"}

Columns = dict[str, NDArray[Any]]
"""Columns of `ImageHeader` or `DecodedImage`, without the pixels."""


@dataclass(frozen=True)
class Plan:
    """Requested format of the images; None for what the images suggest."""

    resolution: int | None
    image_mode: str | None
    bit_depth: int | None
    crop: str


def prepare_into(folder: Path, images: EncodedImages, plan: Plan, on_bad_image: str) -> None:
    """Decode all images into Arrow files in `folder`.

    Raises:
        DataError: if an image cannot be used and `on_bad_image` is "error", or none can be used.
    """
    num_rows = len(images.cells)
    images.check_sizes()
    headers = _map(
        images, read_headers, ImageHeader, folder / "headers.arrow", "Reading image headers"
    )
    unreadable = _problems(images, headers)
    if unreadable and (on_bad_image == "error" or len(unreadable) == num_rows):
        raise bad_images_error(unreadable, num_rows)
    if plan.crop == "native":
        _check_one_size(images, headers)
    target = _choose_target(headers, plan)
    num_pixels = int(headers["height"].astype(np.int64) @ headers["width"])
    notes = _decode_all(images, target, folder, num_pixels)
    skipped = _problems(images, notes)
    if len(skipped) == num_rows:
        raise bad_images_error(skipped, num_rows)
    # Damaged images with a good header must not affect the format. A mode that only they needed
    # costs no second pass, because `ImageDataset` ignores unused planes.
    headers["height"] = np.where(notes["height"] > 0, headers["height"], 0)
    without_skipped = replace(_choose_target(headers, plan), mode=target.mode)
    if without_skipped != target:
        target = without_skipped
        notes = _decode_all(images, target, folder, num_pixels)
    mode = plan.image_mode or _smallest_mode(notes["colour"], notes["alpha"])
    summary = {
        "facts": ImageFacts(mode, target.height, target.width, target.bit_depth).to_config(),
        "stored_mode": target.mode,
        "skipped": skipped,
        "remarks": quality_remarks(notes, target),
        "sources": describe_files(headers),
        "num_with_colour": int(notes["colour"].sum()),
        "num_with_alpha": int(notes["alpha"].sum()),
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for file in folder.glob("headers*.arrow"):
        file.unlink()


def _map(
    images: EncodedImages,
    function: Callable[..., Any],
    row: type[ImageHeader] | type[DecodedImage],
    file: Path,
    desc: str,
    num_pixels: int = 0,
    batch_size: int = FILES_AT_ONCE,
    **options: Any,
) -> Columns:
    """Apply `function` to all cells, write the result to an Arrow file and return its columns."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = max(len(images.cells) // _ROWS_PER_WORKER, num_pixels // _PIXELS_PER_WORKER)
    workers = min(cpus, work, len(images.cells))
    types = {name: _ARROW_TYPES[hint] for name, hint in typing.get_type_hints(row).items()}
    rows = images.cells.map(
        function,
        batched=True,
        batch_size=batch_size,
        input_columns=[images.column],
        remove_columns=[images.column],
        features=datasets.Features({name: datasets.Value(kind) for name, kind in types.items()}),
        cache_file_name=str(file),
        load_from_cache_file=False,
        num_proc=workers if workers > 1 else None,
        desc=desc,
        fn_kwargs={"root": images.root, **options},
        new_fingerprint=file.stem,
    )
    return {name: rows.data.column(name).to_numpy() for name in types if name != "pixels"}


def _decode_all(images: EncodedImages, target: Target, folder: Path, num_pixels: int) -> Columns:
    image_bytes = target.height * target.width * len(target.mode) * target.bit_depth // 8
    advice = "set HF_DATASETS_CACHE to another folder, or lower `resolution`"
    num_bytes = image_bytes * len(images.cells)
    check_free_space(folder, num_bytes, "the set of prepared images", advice)
    # Arrow holds up to 2 GiB in a batch.
    batch_size = max(1, min(FILES_AT_ONCE, 2**26 // image_bytes))
    return _map(
        images,
        decode_images,
        DecodedImage,
        folder / "images.arrow",
        f"Preparing {target.width}x{target.height} {target.mode} images",
        num_pixels,
        batch_size=batch_size,
        target=target,
    )


def _problems(images: EncodedImages, columns: Columns) -> list[str]:
    """One line for each unusable row."""
    bad_rows = np.flatnonzero(columns["height"] == 0).tolist()
    cells = images.cells.select(bad_rows)[images.column]
    lines = zip(bad_rows, cells, columns["problem"][bad_rows], strict=True)
    return [f"row {row}{cell_name(cell)}: {reason}" for row, cell, reason in lines]


def _check_one_size(images: EncodedImages, headers: Columns) -> None:
    """Raise DataError with two images if the sizes differ."""
    usable = np.flatnonzero(headers["height"])
    sizes = np.stack([headers["width"], headers["height"]], 1)[usable]
    is_other = (sizes != sizes[0]).any(1)
    if not is_other.any():
        return
    pair = [0, int(is_other.argmax())]
    cells = images.cells.select(usable[pair].tolist())[images.column]
    examples = " and ".join(
        f"{sizes[i][0]}x{sizes[i][1]} in row {usable[i]}{cell_name(cell)}"
        for i, cell in zip(pair, cells, strict=True)
    )
    raise DataError(f"the images of a set must have one size, got {examples}")


def _smallest_mode(colour: NDArray[np.bool_], alpha: NDArray[np.bool_]) -> str:
    return ("RGB" if colour.any() else "L") + ("A" if alpha.any() else "")


def _choose_target(headers: Columns, plan: Plan) -> Target:
    headers = {name: column[headers["height"] > 0] for name, column in headers.items()}
    sizes = sorted(set(zip(headers["height"].tolist(), headers["width"].tolist(), strict=True)))
    limit = MAX_SIZE if plan.crop == "native" else NATIVE_SIZE_LIMIT
    is_native = plan.resolution is None and len(sizes) == 1 and max(sizes[0]) <= limit
    resolution = plan.resolution or _proposed_resolution(headers)
    height, width = sizes[0] if is_native else _output_size(sizes, resolution, plan.crop)
    mode = plan.image_mode or _smallest_mode(headers["colour"], headers["alpha"])
    keeps_16_bits = mode in ("L", "LA") or plan.crop == "native"
    own_depth = 16 if headers["deep"].any() and keeps_16_bits else 8
    return Target(
        mode=mode,
        bit_depth=plan.bit_depth or own_depth,
        height=height,
        width=width,
        random_crop=plan.crop == "random" and not is_native,
    )


def _proposed_resolution(headers: Columns) -> int:
    """Median shorter side, at most 64 (a GPU night), in steps of 8 for the UNet's downsampling."""
    median = np.median(np.minimum(headers["height"], headers["width"]))
    return int(np.clip(median // 8 * 8, 8, 64))


def _output_size(sizes: list[tuple[int, int]], resolution: int, crop: str) -> tuple[int, int]:
    if crop != "none":
        return resolution, resolution
    outputs = sorted({resize_shorter_side(width, height, resolution) for height, width in sizes})
    if len(outputs) > 1:
        shapes = ", ".join(f"{width}x{height}" for width, height in outputs[:3])
        raise SeveralShapes(
            f"`crop` 'none' needs images of one shape, got {len(outputs)} at `resolution`"
            f" {resolution}, such as {shapes}; set `crop` to 'center' or 'random'"
        )
    width, height = outputs[0]
    if max(width, height) > MAX_SIZE:
        raise DataError(
            f"images must have at most {MAX_SIZE} pixels per side, got {width}x{height} at"
            f" `resolution` {resolution}; lower it"
        )
    return height, width
