"""A folder of images: which files are used, what is left out and why, splits, labels, metadata."""

import csv
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.decoding import EXTENSIONS
from ddpm_hf.data.errors import DataError
from ddpm_hf.paths import ModelPaths, RunPaths
from ddpm_hf.text import printable

SPLITS = ("train", "test", "validation", "valid", "val")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
_RUN = RunPaths(Path())
_RUN_FILES = (_RUN.config.name, _RUN.metrics.name)
_RUN_FOLDERS = (_RUN.samples.name, _RUN.model.root.name, _RUN.checkpoints.name, "logs")
_MODEL_INDEX = ModelPaths(Path()).index.name
IN_RUNS = "in folders of training runs"

Groups = dict[str, list[PurePath]]
Splits = dict[str, datasets.Dataset]


class Folder:
    """What lies in a folder, hidden files apart.

    Attributes:
        root: the folder.
        files: all that may be data, relative to it, sorted.
        left_out: how many images were left out, by the reason; so far those that training drew.

    Raises:
        DataError: if a link leaves the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self.files = sorted(self._walk())

    def images(self) -> list[str]:
        """The files whose names say that they are images which can be read."""
        return [file for file in self.files if suffix(file) in EXTENSIONS]

    def of_kind(self, kind: str) -> list[str]:
        """The files whose names end in `kind`."""
        return [file for file in self.files if suffix(file) == kind]

    def metadata(self) -> list[str]:
        """The files that describe images, as `imagefolder` knows them."""
        found = [file for file in self.files if os.path.basename(file) in _METADATA]
        return [file for file in found if _has_file_names(self.root / file)]

    def leave_out(self, files: Iterable[str]) -> None:
        """Count files that are not used by what they are."""
        self.left_out.update(map(_kind, files))

    def _walk(self) -> Iterator[str]:
        outside = []
        for place, subfolders, names in os.walk(self.root, onerror=_raise):
            names = [name for name in names if not name.startswith(".")]
            if _is_output({*subfolders, *names}) and place != str(self.root):
                self.left_out[IN_RUNS] += _count_images(place)
                subfolders.clear()
                continue
            if _is_output({*subfolders, *names}):
                names = [name for name in names if name not in _RUN_FILES]
                for name in {*subfolders} & {*_RUN_FOLDERS}:
                    self.left_out[IN_RUNS] += _count_images(os.path.join(place, name))
                    subfolders.remove(name)
            subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
            paths = [os.path.join(place, name) for name in (*subfolders, *names)]
            outside += [path for path in paths if _leaves(path, self.root)]
            yield from (
                path.removeprefix(f"{self.root}{os.sep}") for path in paths[len(subfolders) :]
            )
        if outside:
            raise DataError(
                f"{len(outside)} links leave the folder {str(self.root)!r}, such as "
                f"{outside[0]!r}: copy the files or give the folder that holds them"
            )


def _leaves(path: str, root: Path) -> bool:
    return os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root)


def _raise(error: OSError) -> None:
    raise error


def _is_output(names: set[str]) -> bool:
    """Whether a folder with these entries was written by a training run, or is a model."""
    return _MODEL_INDEX in names or {*_RUN_FILES} <= names


def _count_images(place: str) -> int:
    return sum(suffix(name) in EXTENSIONS for _, _, names in os.walk(place) for name in names)


def suffix(file: str) -> str:
    """How a file's name ends, in small letters."""
    return os.path.splitext(file)[1].lower()


def _kind(file: str) -> str:
    name = os.path.basename(file)
    return name if name in _SYSTEM_FILES else printable(suffix(file)) or "without a suffix"


def by_split(root: Path, files: list[str]) -> dict[str, list[str]]:
    """Files by the split that a word of their path names; all are "train" where none does."""
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split("[^a-z]+", file.lower())
        for name in [name for name in SPLITS if name in words][:1]:
            found.setdefault(name, []).append(file)
    groups = found or {"train": files}
    return {name: [glob.escape(str(root / f)) for f in group] for name, group in groups.items()}


def image_splits(folder: Folder, check: Callable[[Iterable[str]], list[str]]) -> Splits:
    """The wanted splits of a folder of images, by path, with labels or metadata where there are.

    Listed here: `imagefolder` takes a folder "my test shots" for the split "test".

    Args:
        folder: what lies in it; gets the count of what is left out.
        check: gives the wanted ones of the names of all splits, or raises DataError.
    """
    images, metadata = folder.images(), folder.metadata()
    folder.leave_out({*folder.files} - {*images, *metadata})
    groups = _split_by_top_folder(list(map(PurePath, images)))
    wanted = check(groups)
    num_grouped = sum(map(len, groups.values()))
    folder.left_out["outside of the split folders"] += len(images) - num_grouped
    if not metadata:
        return {name: _labelled_rows(folder.root, groups[name]) for name in wanted}
    splits = _described_rows(folder.root, metadata, list(groups))
    for name in wanted:
        rows = splits[name]
        listed = {path for column in _image_columns(rows) for path in _paths(rows, column)}
        present = {str(folder.root / file) for file in groups[name]}
        folder.left_out["not in the metadata"] += len(present - listed)
    return splits


def _split_by_top_folder(files: list[PurePath]) -> Groups:
    by_top: Groups = {}
    for file in files:
        by_top.setdefault(file.parts[0] if len(file.parts) > 1 else "", []).append(file)
    folders = by_top.keys() & SPLITS
    if len(folders) > 1 or folders == by_top.keys():
        return {name: by_top[name] for name in folders}
    return {"train": files}


def _labelled_rows(root: Path, files: list[PurePath]) -> datasets.Dataset:
    """Rows by path; the parent folder is the label where two or more lie at the same depth."""
    columns: dict[str, Any] = {"image": [printable(str(root / file)) for file in files]}
    features = {"image": datasets.Image()}
    labels = [printable(file.parent.name) for file in files]
    if len(set(labels)) > 1 and len({len(file.parts) for file in files}) == 1:
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
        columns["label"] = labels
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _has_file_names(file: Path) -> bool:
    """Whether a metadata file names images; an album's own metadata does not."""
    try:
        if file.suffix == ".parquet":
            names = pq.read_schema(file).names
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                is_csv = file.suffix == ".csv"
                names = next(csv.reader(lines)) if is_csv else list(json.loads(next(lines)))
    except (OSError, ValueError, TypeError, StopIteration, csv.Error, pa.ArrowException):
        return False
    ends = ("file_name", "file_names")
    return any(name in ends or str(name).endswith(("_file_name", "_file_names")) for name in names)


def _described_rows(root: Path, metadata: list[str], names: list[str]) -> Splits:
    """The rows of the metadata; `imagefolder` sees to it that their file names stay inside."""
    files = [glob.escape(str(root / file)) for file in metadata]
    rows = datasets.load_dataset("imagefolder", data_files={"train": files}, split="train")
    columns = _image_columns(rows)
    if len(names) == 1 or not columns:
        return dict.fromkeys(names, rows)
    tops = [PurePath(path).relative_to(root).parts[0] for path in _paths(rows, columns[0])]
    return {
        name: rows.select([row for row, top in enumerate(tops) if top == name]) for name in names
    }


def _image_columns(rows: datasets.Dataset) -> list[str]:
    return [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    """The paths in an image column; None where a cell holds none."""
    chunks = rows.with_format("arrow")[:].column(column).chunks
    return [path for chunk in chunks for path in chunk.field("path").to_pylist()]
