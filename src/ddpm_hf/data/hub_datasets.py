"""Datasets on the Hub: opened, and downloaded after a check of the disk space."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from huggingface_hub import HfApi, HfFileSystem, snapshot_download, try_to_load_from_cache
from huggingface_hub import constants as hub_constants

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import (
    check_free_space,
    check_table,
    existing_parent,
    parquet_size,
)
from ddpm_hf.utils.connection import is_hub_reachable
from ddpm_hf.utils.text import close_paths, counted, file_size

_PATHS_AT_ONCE = 500  # in one request
_ADVICE = "free disk space, set HF_HOME to a folder on another disk, or use `streaming`"


def hub_dataset(
    name: str, config_name: str | None = None, revision: str | None = None
) -> datasets.DatasetBuilder:
    """Builder of a dataset on the Hub, which has downloaded no data files yet.

    Args:
        name, config_name, revision: as of `load_images`.
    Raises:
        DataError: if there is no such dataset, or neither a connection nor a copy in the cache.
    """
    try:
        is_online = is_hub_reachable(name)
    except ValueError as error:
        raise DataError(f"{error}") from None
    try:
        with _reading_the_cache(not is_online):
            return datasets.load_dataset_builder(name, config_name, revision=revision)
    except Exception as error:  # also ImportError, for a protocol without its library
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DataError(
            f"{name!r} is not a local path{close_paths(name)}; as a Hub dataset: {reason:.500}"
        ) from None


@contextmanager
def _reading_the_cache(is_offline: bool) -> Iterator[None]:
    """Let `datasets` read its cache without attempts to connect, if there is no connection."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def prepare_checked(builder: datasets.DatasetBuilder, name: str) -> None:
    """Download and prepare a dataset of the Hub, within the disk space and in bounded memory.

    Args:
        builder: of the dataset; its reader gets the options that bound its memory.
        name: of the dataset.
    Raises:
        DataError: if the files or their rows are too large.
    """
    config, cache = builder.config, Path(builder.cache_dir)
    if not cache.is_dir():
        files = list(_files_of(chain(*(config.data_files or {}).values())))
        is_parquet = isinstance(config, ParquetConfig)
        _check_downloads(files, name, cache if is_parquet else None)
        if is_parquet:
            paths = [path for each in files for path in each.download()]
            size = parquet_size(paths)
            check_table(paths, size, cache, _ADVICE)
            for option, value in size.reader_options().items():
                setattr(config, option, value)
    builder.download_and_prepare()


@dataclass(frozen=True)
class _Files:
    """Files of a revision of a repository."""

    repo_id: str
    revision: str
    paths: list[str]

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Path and size of each file, as the Hub lists them."""
        for start in range(0, len(self.paths), _PATHS_AT_ONCE):
            paths = self.paths[start : start + _PATHS_AT_ONCE]
            found: list[Any] = HfApi().get_paths_info(
                self.repo_id, paths, revision=self.revision, repo_type="dataset"
            )
            yield from ((file.path, getattr(file, "size", 0)) for file in found)

    def is_cached(self, path: str) -> bool:
        """Whether a file was downloaded before."""
        known = try_to_load_from_cache(
            self.repo_id, path, revision=self.revision, repo_type="dataset"
        )
        return isinstance(known, str)

    def download(self) -> list[str]:
        """Local paths of the files."""
        root = snapshot_download(
            self.repo_id,
            revision=self.revision,
            repo_type="dataset",
            allow_patterns=[escape(path) for path in self.paths],
        )
        return [os.path.join(root, path) for path in self.paths]


def _files_of(locations: Iterable[str]) -> Iterator[_Files]:
    """The files on the Hub, by repository and revision; other locations are left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for location in locations:
        if location.startswith("hf://datasets/"):
            file: Any = HfFileSystem().resolve_path(location)
            found.setdefault((file.repo_id, file.revision), []).append(file.path_in_repo)
    for (repo_id, revision), paths in found.items():
        yield _Files(repo_id, revision, list(dict.fromkeys(paths)))


def _check_downloads(files: Iterable[_Files], name: str, table: Path | None) -> None:
    """Check the disk space for the downloads, and for the table of their rows in another cache.

    The table of a parquet file is at least about as large as the file.
    """
    sizes = [(each.is_cached(path), size) for each in files for path, size in each.sizes()]
    total, missing = sum(size for _, size in sizes), sum(size for known, size in sizes if not known)
    hub = Path(hub_constants.HF_HUB_CACHE)
    what = f"the dataset {name!r} ({counted(len(sizes), 'file')} of {file_size(total)}"
    if table is None or not _are_on_one_disk(hub, table):
        check_free_space(hub, missing, f"{what})", _ADVICE)
    if table is not None:
        needed = total + missing * _are_on_one_disk(hub, table)
        check_free_space(table, needed, f"{what}, and their table)", _ADVICE)


def _are_on_one_disk(first: Path, second: Path) -> bool:
    return existing_parent(first).stat().st_dev == existing_parent(second).stat().st_dev
