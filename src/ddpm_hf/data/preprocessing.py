"""Decoding a data set once: what every image becomes is decided by the headers of all."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decoding import (
    MAX_ASPECT,
    Target,
    cell_name,
    decode_images,
    read_headers,
    shorter_side_to,
)
from ddpm_hf.data.errors import DataError
from ddpm_hf.diffusion.image_processor import MAX_SIZE, ImageFacts

NATIVE_SIZE_LIMIT = 256
"""Images that all have one size keep it up to this side; larger ones get a proposed resolution."""

_MAX_LISTED = 200
# Fewer are decoded before a further process has started.
_ROWS_PER_WORKER = 1000
_PIXELS_PER_WORKER = 20_000_000

_HEADER_COLUMNS = {
    **dict.fromkeys(("height", "width"), "int32"),
    **dict.fromkeys(("colour", "alpha", "deep"), "bool"),
    "problem": "string",
}
_IMAGE_COLUMNS = {
    "pixels": "binary",
    **dict.fromkeys(("height", "width", "source_height", "source_width", "peak"), "int32"),
    **dict.fromkeys(("colour", "alpha", "animated", "narrowed"), "bool"),
    "problem": "string",
}


@dataclass(frozen=True)
class Plan:
    """What the caller wants; None stands for what the images suggest."""

    resolution: int | None
    image_mode: str | None
    bit_depth: int | None
    crop: str


@dataclass(frozen=True)
class Source:
    """Undecoded images: a one-column data set, and the folder from which paths may be read."""

    cells: Any
    column: str
    root: str | None


def prepare_into(source: Source, plan: Plan, on_bad_image: str, folder: Path) -> None:
    """Headers first, because the sizes and modes of all decide what each one becomes."""
    file = folder / "headers.arrow"
    headers = _map(source, read_headers, _HEADER_COLUMNS, file, "Reading image headers")
    unreadable = _problems(source, headers)
    if unreadable and (on_bad_image == "error" or len(unreadable) == len(source.cells)):
        raise bad_images(unreadable, len(source.cells))
    target = _choose_target(headers, plan)
    num_pixels = int(headers["height"].astype(np.int64) @ headers["width"])
    notes = _decode_all(source, target, folder, num_pixels)
    skipped = _problems(source, notes)
    if len(skipped) == len(source.cells):
        raise bad_images(skipped, len(source.cells))
    # A damaged image may have had a good header: what is left out has no say. A mode that only it
    # needed costs no second pass: `ImageDataset` leaves planes out.
    headers["height"] = np.where(notes["height"] > 0, headers["height"], 0)
    better = replace(_choose_target(headers, plan), mode=target.mode)
    if better != target:
        target, notes = better, _decode_all(source, better, folder, num_pixels)
    mode = plan.image_mode or _smallest_mode(notes["colour"], notes["alpha"])
    facts = ImageFacts(mode, target.height, target.width, target.bit_depth)
    summary = {
        "facts": facts.to_config(),
        "stored_mode": target.mode,
        "skipped": skipped,
        "remarks": _remarks(notes, target),
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for leftover in folder.glob("headers*.arrow"):
        leftover.unlink()


def _map(
    source: Source,
    function: Callable[..., Any],
    types: dict[str, str],
    file: Path,
    desc: str,
    num_pixels: int = 0,
    batch_size: int = 64,  # of undecoded files, which may be photos of some MB each
    **options: Any,
) -> dict[str, NDArray[Any]]:
    """`function` of all cells, written to an arrow file; gives its columns back, without pixels."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = max(len(source.cells) // _ROWS_PER_WORKER, num_pixels // _PIXELS_PER_WORKER)
    workers = min(cpus, work, len(source.cells))
    rows = source.cells.map(
        function,
        batched=True,
        batch_size=batch_size,
        input_columns=[source.column],
        remove_columns=[source.column],
        features=datasets.Features({name: datasets.Value(kind) for name, kind in types.items()}),
        cache_file_name=str(file),
        load_from_cache_file=False,
        num_proc=workers if workers > 1 else None,
        desc=desc,
        fn_kwargs={"root": source.root, **options},
        new_fingerprint=file.stem,
    )
    return {name: rows.data.column(name).to_numpy() for name in types if name != "pixels"}


def _decode_all(
    source: Source, target: Target, folder: Path, num_pixels: int
) -> dict[str, NDArray[Any]]:
    num_bytes = target.height * target.width * len(target.mode) * target.bit_depth // 8
    _check_free_space(folder, num_bytes * len(source.cells))
    batch_size = max(1, min(64, 2**26 // num_bytes))  # Arrow holds up to 2 GiB in a batch
    return _map(
        source,
        decode_images,
        _IMAGE_COLUMNS,
        folder / "images.arrow",
        f"Preparing {target.width}x{target.height} {target.mode} images",
        num_pixels,
        batch_size,
        target=target,
    )


def _problems(source: Source, notes: dict[str, NDArray[Any]]) -> list[str]:
    bad_rows = np.flatnonzero(notes["height"] == 0).tolist()
    cells = source.cells.select(bad_rows)[source.column]
    lines = zip(bad_rows, cells, notes["problem"][bad_rows], strict=True)
    return [f"row {row}{cell_name(cell)}: {reason}" for row, cell, reason in lines]


def bad_images(problems: list[str], total: int) -> DataError:
    """The error that lists images which cannot be used, as far as a person would read."""
    head = f"{len(problems)} of {total} images cannot be used; on_bad_image='skip' leaves them out:"
    return DataError("\n  ".join([head, *listed(problems)]))


def listed(problems: list[str], most: int = _MAX_LISTED) -> list[str]:
    """As many of the lines as a person would read, and how many there are besides."""
    more = len(problems) - most
    return problems[:most] + ([f"and {more} more"] if more > 0 else [])


def _smallest_mode(colour: NDArray[np.bool_], alpha: NDArray[np.bool_]) -> str:
    return ("RGB" if colour.any() else "L") + ("A" if alpha.any() else "")


def _choose_target(headers: dict[str, NDArray[Any]], plan: Plan) -> Target:
    headers = {name: column[headers["height"] > 0] for name, column in headers.items()}
    sizes = sorted(set(zip(headers["height"].tolist(), headers["width"].tolist(), strict=True)))
    is_native = plan.resolution is None and len(sizes) == 1 and max(sizes[0]) <= NATIVE_SIZE_LIMIT
    resolution = plan.resolution or _proposed_resolution(headers)
    height, width = sizes[0] if is_native else _output_size(sizes, resolution, plan.crop)
    mode = plan.image_mode or _smallest_mode(headers["colour"], headers["alpha"])
    own_depth = 16 if headers["deep"].any() and mode in ("L", "LA") else 8
    return Target(
        mode=mode,
        bit_depth=plan.bit_depth or own_depth,
        height=height,
        width=width,
        random_crop=plan.crop == "random" and not is_native,
    )


def _proposed_resolution(headers: dict[str, NDArray[Any]]) -> int:
    """64, which one GPU learns overnight, or what most images fill; a UNet halves it some times."""
    median = np.median(np.minimum(headers["height"], headers["width"]))
    return int(np.clip(median // 8 * 8, 8, 64))


def _output_size(sizes: list[tuple[int, int]], resolution: int, crop: str) -> tuple[int, int]:
    if crop != "none":
        return resolution, resolution
    outputs = sorted({shorter_side_to(width, height, resolution) for height, width in sizes})
    if len(outputs) > 1:
        shapes = ", ".join(f"{width}x{height}" for width, height in outputs[:3])
        raise DataError(
            f"crop='none' needs images of one shape, but at resolution {resolution} they have "
            f"{len(outputs)}, such as {shapes}: use crop='center' or 'random'"
        )
    width, height = outputs[0]
    if max(width, height) > MAX_SIZE:
        raise DataError(f"at resolution {resolution} images get {width}x{height}, over {MAX_SIZE}")
    return height, width


def _check_free_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"the prepared images need {need / 1e9:.1f} GB, but {str(folder.parent)!r} has "
            f"{free / 1e9:.1f} GB free: set HF_DATASETS_CACHE to another place, or lower the "
            "resolution"
        )


def _remarks(notes: dict[str, NDArray[Any]], target: Target) -> list[str]:
    """What a user should know although every image could be used."""
    height, width = notes["source_height"], notes["source_width"]
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    output = min(target.height, target.width)
    peak = int(notes["peak"].max())
    is_square = target.height == target.width
    counts = {
        "animated or of several pages, of which the first is used": notes["animated"],
        "16 bits per channel, of which 8 are used (of colour Pillow reads no more)": (
            notes["narrowed"]
        ),
        f"enlarged more than twice to {output} pixels, which looks soft": 2 * shorter < output,
        f"over {MAX_ASPECT} times longer than wide and mostly cut off": (
            is_square & (longer > MAX_ASPECT * shorter)
        ),
    }
    hits = {text: int((hit & (shorter > 0)).sum()) for text, hit in counts.items()}
    remarks = [f"{count} of {len(shorter)} images: {text}" for text, count in hits.items() if count]
    if target.bit_depth == 16 and peak < 4096:  # 12 bits of a camera or scanner in a 16-bit file
        remarks.append(f"the 16-bit images use only 0..{peak} of 0..65535: they are nearly black")
    return remarks
