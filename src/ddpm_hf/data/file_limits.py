"""Limits of files that list or hold images, checked before they are read or written."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from ddpm_hf.data.errors import DataError
from ddpm_hf.utils.text import file_size

MAX_IMAGE_BYTES = 2**29
"""Largest supported image file: 64 million pixels of 64 bits."""
MAX_LINE_BYTES = 2**20
MAX_METADATA_BYTES = 2**30
"""Largest supported parquet file of metadata, in bytes of its rows, which are all in memory."""
_BATCH_BYTES = 2**28  # of parquet rows in memory
_BYTES_UNPROBED = 2**20  # a column of a row group that cannot exceed this is not opened
# Sizes of different images differ by less than this factor: a larger one means repeated values.
_REPETITION = 10
_PROBE_BYTES = 2**16  # a small buffer reads little beyond the first pages of a column


def check_lines(path: Path) -> None:
    """Check the length of the lines of a text file: readers keep several lines in memory."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{str(path)!r} has a line of more than {MAX_LINE_BYTES:,} bytes; put one image"
                    " on each line"
                )


def existing_parent(folder: Path) -> Path:
    """The folder, or the first of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_free_space(folder: Path, num_bytes: int, what: str, advice: str) -> None:
    """Raise DataError if `what` needs more bytes than the disk of a folder has free.

    Args:
        folder: where the files will be; it may not exist yet.
        num_bytes: their size.
        what: the files, as the subject of a sentence.
        advice: what to do.
    """
    folder = existing_parent(folder)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DataError(
            f"{what} needs {file_size(num_bytes)}, but {str(folder)!r} has {file_size(free)} free:"
            f" {advice}"
        )


@dataclass(frozen=True)
class ParquetSize:
    """Memory that the rows of parquet files take, in bytes.

    Attributes:
        of_table: of all rows.
        of_group: of the largest row group.
        of_row: of a row: the largest mean of a row group.
    """

    of_table: int
    of_group: int
    of_row: float

    @property
    def rows_per_batch(self) -> int:
        """Number of rows to read at once."""
        return int(_BATCH_BYTES // max(self.of_row, 1)) or 1

    def reader_options(self) -> dict[str, object]:
        """Options of the parquet builder of `datasets` that bound its memory.

        The builder reads one row group at a time. Large row groups, which pandas writes by default,
        are read in batches instead.
        """
        if self.of_group <= _BATCH_BYTES:
            return {}
        return {
            "batch_size": self.rows_per_batch,
            "fragment_scan_options": pyarrow.dataset.ParquetFragmentScanOptions(
                use_buffered_stream=True, pre_buffer=False
            ),
        }


def parquet_size(files: Iterable[str]) -> ParquetSize:
    """Size of the rows of parquet files in memory, by the metadata and the dictionaries.

    Raises:
        DataError: if the rows are larger than any image file.
    """
    all_stored, all_repeated, of_group, of_row = 0, 0, 0, 0.0
    for file in files:
        for num_rows, stored, repeated in _row_groups(file):
            all_stored, all_repeated = all_stored + stored, all_repeated + repeated
            size = max(stored, repeated)
            of_group = max(of_group, size)
            of_row = max(of_row, size / (num_rows or 1))
            if of_row > MAX_IMAGE_BYTES:
                raise DataError(
                    f"{file!r} has rows of {of_row / 2**20:,.0f} MiB; images of up to"
                    f" {MAX_IMAGE_BYTES // 2**20:,} MiB are supported"
                )
    is_repetitive = all_repeated > _REPETITION * all_stored
    of_table = all_stored + all_repeated if is_repetitive else all_stored
    return ParquetSize(of_table, of_group, of_row)


def check_table(files: Sequence[str], size: ParquetSize, folder: Path, advice: str) -> None:
    """Raise DataError if the rows of parquet files do not fit on the disk as a table.

    Args:
        files: their paths.
        size: of their rows.
        folder: of the table; one that exists needs no space.
        advice: what to do.
    """
    if not folder.is_dir():
        more = f" and {len(files) - 1:,} more" * (len(files) > 1)
        check_free_space(folder, size.of_table, f"the table of {files[0]!r}{more}", advice)


def check_metadata(path: Path) -> None:
    """Check the size of a parquet file of metadata: all rows are read into memory."""
    size = parquet_size([str(path)])
    if size.of_table > MAX_METADATA_BYTES:
        raise DataError(
            f"{str(path)!r} has {file_size(size.of_table)} of rows in memory; metadata of up to"
            f" {file_size(MAX_METADATA_BYTES)} is supported"
        )


def _reader(file: str) -> Any:
    """Reader of a parquet file that leaves repeated values in their dictionaries."""
    metadata = pq.read_metadata(file)
    columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    names = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(file, metadata=metadata, read_dictionary=names, buffer_size=_PROBE_BYTES)


def _row_groups(file: str) -> Iterator[tuple[int, int, int]]:
    """Number of rows, bytes of stored values and bytes of repeated values of each row group.

    Dictionary encoding stores a repeated value once, and a run of equal indices as its length. The
    bytes of repeated values are an upper bound: each value could be the longest of its dictionary.
    """
    reader = _reader(file)
    for i in range(reader.num_row_groups):
        group, stored, repeated = reader.metadata.row_group(i), 0, 0
        for column in range(group.num_columns):
            chunk, declared = group.column(column), reader.metadata.schema.column(column)
            is_text = chunk.physical_type == "BYTE_ARRAY"
            width = declared.length if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8
            size = max(chunk.total_uncompressed_size, chunk.num_values * width)
            stored += size
            if is_text and any("DICTIONARY" in encoding for encoding in chunk.encodings):
                longest = chunk.total_uncompressed_size
                is_large = chunk.num_values * longest > _BYTES_UNPROBED
                if is_large and size <= MAX_IMAGE_BYTES * group.num_rows:
                    longest = _longest_value(reader, i, chunk.path_in_schema)
                repeated += chunk.num_values * longest
        yield group.num_rows, stored, repeated


def _longest_value(reader: Any, group: int, column: str) -> int:
    """Length of the longest value in the dictionary of a column, in bytes."""
    first = next(reader.iter_batches(1, row_groups=[group], columns=[column]), None)
    if first is None:
        return 0
    values = first.column(0)
    while not isinstance(values, pa.DictionaryArray):
        values = values.field(0) if isinstance(values, pa.StructArray) else values.values
    return pc.max(pc.binary_length(values.dictionary)).as_py() or 0
