"""Where images come from: a folder, parquet or arrow files, a `save_to_disk` folder, or the Hub."""

import difflib
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import datasets
from huggingface_hub import constants as hub_constants
from huggingface_hub.file_download import repo_folder_name

from ddpm_hf.data.decoding import EXTENSIONS

_SPLITS = ("train", "test", "validation", "valid", "val")
_ROOT_ATTRIBUTE = "_ddpm_hf_image_root"
# ImportError: fsspec misses a library for a protocol that a repository asks for.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    datasets.exceptions.DatasetsError,
)


class DataError(ValueError):
    """Data that cannot be used: one clear line, then one line per bad image where there are any."""


def load_images(
    source: str | os.PathLike[str],
    *,
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> datasets.Dataset:
    """The rows of an image data set, not yet decoded.

    Args:
        source: a folder of images (its class folders become labels), a parquet or arrow file, a
            glob or a folder of such files, a `save_to_disk` folder, or a data set on the Hub. An
            existing path comes before the Hub.
        config_name: configuration of a Hub data set.
        split: name or slice as in `datasets`: "train", "test[:500]", "train+test". In a folder of
            images, sub-folders named train, test, validation, valid or val are splits if there
            are two of them or nothing else; otherwise the whole folder is "train". In a folder
            of parquet files those words in their names are. Files given by path or glob are
            "train".
        revision: branch, tag or commit of a Hub data set.

    Raises:
        DataError: if the source, configuration or split does not exist, holds no images or no
            rows, or reaches outside itself (links, paths, URLs).
    """
    text = os.fspath(source)
    if not text:
        raise DataError("the data set has no name: give a folder, a file or a data set of the Hub")
    path = Path(text).expanduser()
    is_local = path.exists() or any(char in text for char in "*?[")
    if is_local and (config_name or revision):
        name = "config_name" if config_name else "revision"
        raise DataError(f"{name} is for data sets on the Hub, but {text!r} is a local path")
    with _as_data_error(text):
        if path.is_dir():
            dataset, root = _from_folder(path.resolve(), split)
        elif is_local:
            dataset, root = _from_files(text, split), None
        else:
            dataset, root = _from_hub(text, config_name, split, revision)
    if len(dataset) == 0:
        raise DataError(f"{text!r} has no rows in split {split!r}")
    setattr(dataset, _ROOT_ATTRIBUTE, root)
    return dataset


def known_image_root(dataset: datasets.Dataset) -> Path | None:
    """The folder from which `load_images` lets rows that hold only a path be read, if any.

    It belongs to that very object and does not survive `select` and the like: a row of somebody's
    parquet file may name any file of this machine, so that not knowing has to mean refusing.
    """
    root: Path | None = getattr(dataset, _ROOT_ATTRIBUTE, None)
    return root


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with the close matches, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


@contextmanager
def _as_data_error(source: str) -> Iterator[None]:
    """The many errors of `datasets` and the Hub client as one line that names the source."""
    try:
        yield
    except DataError:
        raise
    except _LOADING_ERRORS as error:
        # "An error occurred while generating the dataset" says nothing; its cause does.
        is_wrapper = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (error.__cause__ if is_wrapper else None) or error
        raise DataError(f"{source!r} cannot be loaded: {cause}") from error


def _from_folder(root: Path, split: str) -> tuple[datasets.Dataset, Path | None]:
    files = _list_files(root)
    if {"state.json", "dataset_dict.json"} & set(files):
        return _from_saved(root, split), None
    images = [file for file in files if _suffix(file) in EXTENSIONS]
    if images and any(os.path.basename(file).startswith("metadata.") for file in files):
        return _from_builder("imagefolder", split, data_dir=glob.escape(str(root))), root
    if images:
        return _from_image_files(root, images, split), root
    suffixes = Counter(map(_suffix, files))
    for kind in ("parquet", "arrow"):
        if suffixes[f".{kind}"]:
            tables = [file for file in files if _suffix(file) == f".{kind}"]
            return _from_builder(kind, split, data_files=_by_split(root, tables)), None
    found = ", ".join(f"{count} {suffix or 'other'}" for suffix, count in suffixes.most_common(5))
    raise DataError(
        f"{str(root)!r} holds no images, parquet or arrow files, but {found or 'nothing'}; "
        f"images may be {' '.join(sorted(EXTENSIONS))}"
    )


def _by_split(root: Path, files: list[str]) -> dict[str, list[str]]:
    """Files by the split that a word of their path names; all are "train" where none does."""
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split("[^a-z]+", file.lower())
        for name in [name for name in _SPLITS if name in words][:1]:
            found.setdefault(name, []).append(file)
    groups = found or {"train": files}
    return {name: [glob.escape(str(root / f)) for f in group] for name, group in groups.items()}


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _list_files(root: Path) -> list[str]:
    """Files under `root`, relative to it, sorted, without hidden ones. Links may not leave it."""
    files, outside = [], []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
        names = [name for name in names if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in [*subfolders, *names]):
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                outside.append(path)
        files += [os.path.join(folder, name).removeprefix(f"{root}{os.sep}") for name in names]
    if outside:
        raise DataError(
            f"{len(outside)} links leave the folder {str(root)!r}, such as {outside[0]!r}: copy "
            "the files or give the folder that holds them"
        )
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _from_image_files(root: Path, files: list[str], split: str) -> datasets.Dataset:
    """Listed here: `imagefolder` takes a folder "my test shots" for the split "test"."""
    by_top: dict[str, list[PurePath]] = {}
    for file in map(PurePath, files):
        by_top.setdefault(file.parts[0] if len(file.parts) > 1 else "", []).append(file)
    folders = by_top.keys() & _SPLITS
    if len(folders) > 1 or folders == by_top.keys():
        groups = {name: by_top[name] for name in folders}
    else:
        groups = {"train": [file for group in by_top.values() for file in group]}
    names = _check_split(split, groups)
    return _take({name: _labelled_rows(root, groups[name]) for name in names}, split)


def _labelled_rows(root: Path, files: list[PurePath]) -> datasets.Dataset:
    """Rows by path; the parent folder is the label where two or more lie at the same depth."""
    columns: dict[str, Any] = {"image": [str(root / file) for file in files]}
    features = {"image": datasets.Image()}
    labels = [file.parent.name for file in files]
    if len(set(labels)) > 1 and len({len(file.parts) for file in files}) == 1:
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
        columns["label"] = labels
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _from_saved(root: Path, split: str) -> datasets.Dataset:
    for index in [*root.rglob("state.json"), *root.glob("dataset_dict.json")]:
        content = json.loads(index.read_text(encoding="utf-8"))
        files = [data_file["filename"] for data_file in content.get("_data_files", [])]
        for name in [*files, *content.get("splits", [])]:
            if not (index.parent / name).resolve().is_relative_to(root):
                raise DataError(f"{str(index)!r} names {name!r}, outside of {str(root)!r}")
    saved = datasets.load_from_disk(str(root))
    is_dict = isinstance(saved, datasets.DatasetDict)
    return _take(dict(saved) if is_dict else {"train": saved, str(saved.split): saved}, split)


def _from_files(pattern: str, split: str) -> datasets.Dataset:
    path = Path(pattern).expanduser()
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise DataError(f"{pattern!r} matches no file")
    kinds = {_suffix(file) for file in files}
    if kinds not in ({".parquet"}, {".arrow"}):
        raise DataError(
            f"{pattern!r} is {', '.join(sorted(kinds)) or 'no known file'}: give a folder of "
            "images, or parquet or arrow files of one kind"
        )
    data_files = {"train": [glob.escape(os.path.abspath(file)) for file in files]}
    return _from_builder(kinds.pop()[1:], split, data_files=data_files)


def _from_builder(kind: str, split: str, **where: Any) -> datasets.Dataset:
    builder = datasets.load_dataset_builder(kind, **where)
    _check_split(split, builder.config.data_files)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _from_hub(
    name: str, config_name: str | None, split: str, revision: str | None
) -> tuple[datasets.Dataset, Path]:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(f"{name!r} does not exist{_path_hint(name)}")
    try:
        builder = datasets.load_dataset_builder(name, config_name, revision=revision)
    except _LOADING_ERRORS as error:
        hint = _path_hint(name)
        raise DataError(f"{name!r} is no path here{hint}; as a Hub data set: {error}") from error
    _check_split(split, builder.info.splits or builder.config.data_files or ())
    builder.download_and_prepare()
    folder = repo_folder_name(repo_id=builder.repo_id or name, repo_type="dataset")
    return builder.as_dataset(split=split), Path(hub_constants.HF_HUB_CACHE, folder).resolve()


def _path_hint(name: str) -> str:
    path = Path(name).expanduser()
    return did_you_mean(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])


def _check_split(split: str, known: Iterable[Any]) -> list[str]:
    """The names in a split expression. All must be known, unless nothing is known yet."""
    names = [part.split("[")[0].strip() for part in split.split("+")]
    choices = sorted(map(str, known))
    for name in names:
        if choices and name not in choices:
            hint = did_you_mean(name, choices)
            raise DataError(f"split {name!r} does not exist{hint}; choices: {', '.join(choices)}")
    return names


def _take(splits: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    _check_split(split, splits)
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(chosen)
