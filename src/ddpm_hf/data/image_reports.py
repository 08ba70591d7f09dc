"""Messages about images: unusable ones, files that are left out, and loss of quality."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decoding import install_hint
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_conversion import MAX_ASPECT, Target
from ddpm_hf.utils.text import counted

_MAX_PROBLEMS, _MAX_SKIPPED, _MAX_KINDS = 200, 10, 10


def bad_images_error(problems: Sequence[str], num_rows: int) -> DataError:
    """The error for unusable images, with one line for each of the first problems."""
    head = (
        f"{len(problems)} of {num_rows} images cannot be used; set `on_bad_image` to 'skip' to"
        " leave them out:"
    )
    return DataError("\n  ".join([head, *_first(problems, _MAX_PROBLEMS)]))


def _first(lines: Sequence[str], count: int) -> list[str]:
    more = len(lines) - count
    return [*lines[:count], *([f"and {more} more"] if more > 0 else [])]


def describe_left_out(num_images: int, left_out: Mapping[str, int], skipped: Sequence[str]) -> str:
    """One line with the number of used images and the files and rows that are left out."""
    kinds = _first([f"{kind} {count:,}" for kind, count in left_out.items()], _MAX_KINDS)
    used = (
        f"{counted(num_images, 'image')} used, {sum(left_out.values()):,} left out"
        f" ({', '.join(kinds)}){install_hint(left_out)}"
    )
    return "; ".join([used, *_first(skipped, _MAX_SKIPPED)])


def describe_files(headers: Mapping[str, NDArray[Any]]) -> str:
    """One line with modes, bit depths and sizes of the usable image files.

    Args:
        headers: columns of `ImageHeader`.
    """
    usable = headers["height"] > 0
    flags = zip(
        *(headers[name][usable].tolist() for name in ("colour", "alpha", "deep")), strict=True
    )
    modes = Counter(
        ("RGB" if colour else "L") + "A" * alpha + " 16 bit" * deep for colour, alpha, deep in flags
    )
    pairs = zip(headers["width"][usable].tolist(), headers["height"][usable].tolist(), strict=True)
    sizes = sorted(set(pairs), key=lambda size: size[0] * size[1])
    shown = dict.fromkeys(f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    listed = ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common())
    return f"{listed}; {counted(len(sizes), 'size')}, {' to '.join(shown)}"


def quality_remarks(notes: Mapping[str, NDArray[Any]], target: Target) -> list[str]:
    """Lines about loss of quality in usable images, each with the number of images.

    Args:
        notes: columns of `DecodedImage`.
        target: format of the decoded images.
    """
    height, width = notes["source_height"], notes["source_width"]
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    output = min(target.height, target.width)
    is_square = target.height == target.width
    masks = {
        "animated or of several pages; only the first is used": notes["animated"],
        "16 bits per channel, reduced to 8 (Pillow reads colour in 8 bits)": notes["narrowed"],
        f"enlarged more than twice to {output} pixels, which looks soft": 2 * shorter < output,
        f"over {MAX_ASPECT} times longer than wide and mostly cut off": (
            is_square & (longer > MAX_ASPECT * shorter)
        ),
    }
    counts = {text: int((mask & (shorter > 0)).sum()) for text, mask in masks.items()}
    remarks = [
        f"{count} of {len(shorter)} images: {text}" for text, count in counts.items() if count
    ]
    peak = int(notes["peak"].max())
    if target.bit_depth == 16 and peak < 4096:  # 12 bits of a camera or scanner in a 16-bit file
        remarks.append(f"the 16-bit images use only 0..{peak} of 0..65535: they are nearly black")
    return remarks
