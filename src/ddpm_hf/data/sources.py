"""Loading of image datasets: folders, parquet and arrow files, `save_to_disk`, the Hub."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
from huggingface_hub import constants as hub_constants
from huggingface_hub.file_download import repo_folder_name

from ddpm_hf.data.decoding import EXTENSIONS, install_hint
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import check_table, parquet_size
from ddpm_hf.data.hub_datasets import hub_dataset, prepare_checked
from ddpm_hf.data.image_folder import Folder, Origin, image_rows, suffix
from ddpm_hf.data.labels import read_labels
from ddpm_hf.data.splits import all_splits, split_by_name, split_names, take_split
from ddpm_hf.diffusion.atomic_files import read_json

_ORIGIN_ATTRIBUTE = "_ddpm_hf_origin"
_SAVED_FILES = ("state.json", "dataset_dict.json")  # of `save_to_disk`


def load_images(
    source: str | os.PathLike[str],
    *,
    config_name: str | None = None,
    split: str | None = "train",
    revision: str | None = None,
) -> datasets.Dataset:
    """Load the rows of an image dataset, without decoding the images.

    Args:
        source: a folder of images (the first folders below the root or the split become labels, or
            the labels in a dataset.json), a parquet or arrow file, a glob or
            folder of such files, a `save_to_disk` folder, or a dataset on the Hub. An existing
            path takes precedence over the Hub.
        config_name: configuration of a Hub dataset.
        split: name or slice as in `datasets`: "train", "test[:500]", "train+test". In an image
            folder, sub-folders named train, test, validation, valid or val are splits if there are
            at least two of them or nothing else; otherwise the whole folder is "train". Parquet and
            arrow files in a folder belong to the split named in their path. Files given by path or
            glob are "train". None for all splits.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        DataError: if the source, configuration or split does not exist, contains no images or rows,
            or refers to something outside itself (links, paths, URLs).
    """
    text = os.fspath(source)
    if not text:
        raise DataError("the dataset has no name; pass a folder, a file or a dataset on the Hub")
    path = Path(text).expanduser()
    is_local = path.exists() or any(char in text for char in "*?[")
    if is_local and (config_name or revision):
        name = "config_name" if config_name else "revision"
        raise DataError(f"`{name}` applies to datasets on the Hub, but {text!r} is a local path")
    with _as_data_error(text):
        if path.is_dir():
            dataset, origin = _from_folder(path.resolve(), split)
        elif is_local:
            dataset, origin = _from_files(text, split), Origin()
        else:
            dataset, origin = _from_hub(text, config_name, split, revision)
    if len(dataset) == 0:
        raise DataError(f"{text!r} has no rows{f' in split {split!r}' if split else ''}")
    setattr(dataset, _ORIGIN_ATTRIBUTE, origin)
    return dataset


def check_folder_labels(folder: Path, split: str, label_column: str | None) -> None:
    """Check that an image folder has labels; other folders are left unchecked.

    Args:
        folder: the folder.
        split: the split to train on.
        label_column: name of the column; None for the declared one.
    Raises:
        DataError: if it has none, or cannot be loaded.
    """
    files = Folder(folder.resolve())
    if files.images() and not {*_SAVED_FILES} & {*files.files}:
        dataset = load_images(folder, split=split)
        problem = origin_of(dataset, "image").label_problem
        read_labels(dataset, label_column or True, problem)


def origin_of(dataset: datasets.Dataset, column: str) -> Origin:
    """Origin of rows; without root if unknown.

    `load_images` records the origin on its result; `select` and similar methods lose it. A foreign
    parquet file may name any file on this machine, so that an unknown origin must not be trusted.
    For rows in the cache of `datasets.load_dataset("imagefolder", ...)`, which names only files
    that it listed, the root is the common folder of the files.
    """
    origin: Origin | None = getattr(dataset, _ORIGIN_ATTRIBUTE, None)
    if origin is not None:
        return origin
    if not _is_cached_imagefolder(dataset):
        return Origin()
    chunks = dataset.with_format("arrow")[:].column(column).chunks
    paths = {path for chunk in chunks for path in chunk.field("path").to_pylist() if path}
    folders = {os.path.dirname(path) for path in paths if os.path.isabs(path)}
    return Origin(Path(os.path.commonpath(folders)) if folders else None)


def _is_cached_imagefolder(dataset: datasets.Dataset) -> bool:
    """Whether all rows are in files that `imagefolder` wrote into the cache of `datasets`."""
    table = dataset.data
    is_joined = isinstance(table, datasets.table.ConcatenationTable)
    blocks = [block for row in table.blocks for block in row] if is_joined else [table]
    cache = Path(datasets.config.HF_DATASETS_CACHE, "imagefolder").resolve()
    return all(
        isinstance(block, datasets.table.MemoryMappedTable)
        and Path(block.path).resolve().is_relative_to(cache)
        for block in blocks
    )


@contextmanager
def _as_data_error(source: str) -> Iterator[None]:
    """Convert errors of `datasets` and the Hub client to a DataError that names the source."""
    readers = logging.getLogger("datasets.packaged_modules")
    level = readers.level
    readers.setLevel(logging.CRITICAL)  # they log each error before they raise it
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the libraries raise errors of every kind for foreign files
        from ddpm_hf.utils.backend_settings import is_out_of_memory  # loads torch

        if is_out_of_memory(error):
            raise
        # The message of DatasetGenerationError is uninformative; that of its cause is not.
        is_wrapper = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (error.__cause__ if is_wrapper else None) or error
        if isinstance(cause, DataError):
            raise cause from None
        reason = " ".join(f"{cause}".split()) or type(cause).__name__
        raise DataError(f"{source!r} cannot be loaded: {reason:.500}") from None
    finally:
        readers.setLevel(level)


def _from_folder(root: Path, split: str | None) -> tuple[datasets.Dataset, Origin]:
    folder = Folder(root)
    if {*_SAVED_FILES} & {*folder.files}:
        return _from_saved(root, split), Origin()
    if folder.images():
        splits, origin = image_rows(folder, split)
        return take_split(splits, split), origin
    suffixes = Counter(map(suffix, folder.files))
    for kind in ("parquet", "arrow"):
        if tables := folder.with_suffix(f".{kind}"):
            groups = split_by_name(tables)
            paths = {name: [str(root / file) for file in files] for name, files in groups.items()}
            return _from_builder(kind, split, paths), Origin()
    content = [f"{count} {name or 'other'}" for name, count in suffixes.most_common(5)]
    content += [f"{count} {reason}" for reason, count in (+folder.left_out).items()]
    found = f"images, parquet or arrow files, but {', '.join(content)}" if content else "files"
    raise DataError(
        f"{str(root)!r} contains no {found}; supported images are {' '.join(sorted(EXTENSIONS))}"
        f"{install_hint(suffixes)}"
    )


def _from_saved(root: Path, split: str | None) -> datasets.Dataset:
    for index in [*root.rglob("state.json"), *root.glob("dataset_dict.json")]:
        content = read_json(index)
        try:
            files = [data_file["filename"] for data_file in content.get("_data_files") or []]
            names = [os.fspath(name) for name in [*files, *(content.get("splits") or [])]]
        except (LookupError, TypeError) as error:
            raise DataError(f"{str(index)!r} is damaged: {error!r}") from None
        for name in names:
            if not (index.parent / name).resolve().is_relative_to(root):
                raise DataError(f"{str(index)!r} names {name!r}, which is outside {str(root)!r}")
    saved = datasets.load_from_disk(str(root))
    is_dict = isinstance(saved, datasets.DatasetDict)
    if split is None and not is_dict:
        return saved
    return take_split(dict(saved) if is_dict else {"train": saved, str(saved.split): saved}, split)


def _from_files(pattern: str, split: str | None) -> datasets.Dataset:
    path = Path(pattern).expanduser()
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise DataError(f"{pattern!r} matches no file")
    if special := [file for file in files if not os.path.isfile(file)]:
        raise DataError(f"{special[0]!r} is not a regular file")
    kinds = {suffix(file) for file in files}
    if kinds not in ({".parquet"}, {".arrow"}):
        raise DataError(
            f"the files of {pattern!r} must be all parquet or all arrow, got"
            f" {', '.join(sorted(kinds)) or 'no suffix'}; pass a folder for image files,"
            " and unpack archives"
        )
    data_files = {"train": [os.path.abspath(file) for file in files]}
    return _from_builder(kinds.pop()[1:], split, data_files)


def _from_builder(
    kind: str, split: str | None, data_files: dict[str, list[str]]
) -> datasets.Dataset:
    paths = list(chain(*data_files.values()))
    size = parquet_size(paths) if kind == "parquet" else None
    options = size.reader_options() if size else {}
    patterns = {name: list(map(glob.escape, files)) for name, files in data_files.items()}
    builder = datasets.load_dataset_builder(kind, data_files=patterns, **options)
    split_names(split, builder.config.data_files)
    if size:
        advice = "free disk space, or set HF_HOME to a folder on another disk"
        check_table(paths, size, Path(builder.cache_dir), advice)
    builder.download_and_prepare()
    return builder.as_dataset(split=split or all_splits(data_files))


def _from_hub(
    name: str, config_name: str | None, split: str | None, revision: str | None
) -> tuple[datasets.Dataset, Origin]:
    builder = hub_dataset(name, config_name, revision)
    split_names(split, builder.info.splits or builder.config.data_files or ())
    prepare_checked(builder, name)
    folder = repo_folder_name(repo_id=builder.repo_id or name, repo_type="dataset")
    root = Path(hub_constants.HF_HUB_CACHE, folder).resolve()
    return builder.as_dataset(split=split or all_splits(builder.info.splits or ())), Origin(root)
