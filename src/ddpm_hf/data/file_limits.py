"""Limits of files that list or hold images, checked before they are read into memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet as pq

from ddpm_hf.data.errors import DataError

MAX_IMAGE_BYTES = 2**29
"""Image files may be this large: 64 million pixels of 64 bits."""
MAX_LINE_BYTES = 2**20
_BATCH_BYTES = 2**28  # of parquet rows in memory


def check_lines(path: Path) -> None:
    """Check the length of the lines of a text file, of which readers keep several in memory."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{str(path)!r} has a line of more than {MAX_LINE_BYTES:,} bytes; put one image"
                    " on each line"
                )


def parquet_options(files: Iterable[str]) -> dict[str, Any]:
    """Options of the parquet builder of `datasets` that bound its memory.

    The builder reads one row group at a time. Large row groups, which pandas writes by default, are
    read in batches instead.

    Raises:
        DataError: if the rows are larger than any image file, by the metadata of the file.
    """
    of_group, of_row = 0, 0.0
    for file in files:
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        of_group = max([of_group, *(group.total_byte_size for group in groups)])
        of_row = max([of_row, *(group.total_byte_size / (group.num_rows or 1) for group in groups)])
        if of_row > MAX_IMAGE_BYTES:
            raise DataError(
                f"{file!r} has rows of {of_row / 2**20:,.0f} MiB; images of up to"
                f" {MAX_IMAGE_BYTES // 2**20:,} MiB are supported"
            )
    if of_group <= _BATCH_BYTES:
        return {}
    reading = pyarrow.dataset.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
    return {"batch_size": int(_BATCH_BYTES // of_row) or 1, "fragment_scan_options": reading}
