"""Image folders: file listing, splits, labels and metadata.

Files are listed here, and only metadata is read by the `imagefolder` builder of `datasets`. That
builder (datasets 5.2) takes a folder "my test shots" for a split, fails on a file name that is not
UTF-8, includes images in folders of training runs, does not count what it ignores, and is 15 to 70
times slower for 4,000 files.
"""

import csv
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.decoding import EXTENSIONS
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import MAX_LINE_BYTES, check_lines, check_metadata
from ddpm_hf.data.folder_labels import (
    LABEL_FILE,
    FolderLabels,
    labels_of_class_folders,
    labels_of_file,
)
from ddpm_hf.data.metadata_csv import with_text_columns, with_types
from ddpm_hf.paths import ModelPaths, RunPaths
from ddpm_hf.text import printable

SPLITS = ("train", "test", "validation", "valid", "val")
IN_RUNS = "in folders of training runs"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
_RUN = RunPaths(Path())
_RUN_FILES = {_RUN.config.name, _RUN.metrics.name}
_RUN_PICTURES = {_RUN.loss_picture.name, _RUN.denoising_picture.name}
_RUN_FOLDERS = {_RUN.samples.name, _RUN.model.root.name, _RUN.checkpoints.name, "logs"}
_MODEL_INDEX = ModelPaths(Path()).index.name

Splits = dict[str, datasets.Dataset]


class Folder:
    """Files of a folder, without hidden files and outputs of training runs.

    Attributes:
        root: the folder.
        files: paths relative to `root`, sorted.
        left_out: number of images that are not used, by reason.
        label_problem: why there are no labels, if the folder suggests some.
        label_remarks: lines about images without a class folder of their own.

    Raises:
        DataError: if a link leads out of the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self.label_problem = ""
        self.label_remarks: list[str] = []
        self.files = sorted(self._walk())

    def images(self) -> list[str]:
        """Files with the suffix of a supported image format."""
        return [file for file in self.files if suffix(file) in EXTENSIONS]

    def with_suffix(self, ending: str) -> list[str]:
        """Files with a given suffix, such as ".parquet"."""
        return [file for file in self.files if suffix(file) == ending]

    def metadata(self) -> list[str]:
        """Metadata files of `imagefolder` that name images."""
        files = [file for file in self.files if os.path.basename(file) in _METADATA]
        return [file for file in files if _has_file_names(self.root / file)]

    def leave_out(self, files: Iterable[str]) -> None:
        """Count unused files by kind."""
        self.left_out.update(map(_kind, files))

    def _walk(self) -> Iterator[str]:
        outside = []
        for parent, subfolders, names in os.walk(self.root, onerror=_raise):
            names = [name for name in names if not name.startswith(".")]
            is_output = _is_output({*subfolders, *names})
            if is_output and parent != str(self.root):
                self._leave_out_images(parent)
                subfolders.clear()
                continue
            if is_output:
                self.left_out[IN_RUNS] += len(_RUN_PICTURES.intersection(names))
                names = [name for name in names if name not in _RUN_FILES | _RUN_PICTURES]
                for name in _RUN_FOLDERS.intersection(subfolders):
                    self._leave_out_images(os.path.join(parent, name))
                    subfolders.remove(name)
            subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
            files = [os.path.join(parent, name) for name in names]
            special = [file for file in files if not os.path.isfile(file) and os.path.exists(file)]
            if special:
                raise DataError(f"{special[0]!r} is not a regular file: move it out of the folder")
            paths = [*(os.path.join(parent, name) for name in subfolders), *files]
            outside += [path for path in paths if _leads_outside(path, self.root)]
            yield from (file.removeprefix(f"{self.root}{os.sep}") for file in files)
        if outside:
            raise DataError(
                f"{len(outside)} links lead out of the folder {str(self.root)!r}, such as"
                f" {outside[0]!r}: copy the files, or pass the folder that contains them"
            )

    def _leave_out_images(self, folder: str) -> None:
        names = (name for _, _, names in os.walk(folder) for name in names)
        self.left_out[IN_RUNS] += sum(suffix(name) in EXTENSIONS for name in names)


def _leads_outside(path: str, root: Path) -> bool:
    return os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root)


def _raise(error: OSError) -> None:
    raise error


def _is_output(names: set[str]) -> bool:
    """Whether a folder with these entries is a model or was written by a training run."""
    return _MODEL_INDEX in names or names >= _RUN_FILES


def suffix(file: str) -> str:
    """Suffix of a file name in lower case."""
    return os.path.splitext(file)[1].lower()


def _kind(file: str) -> str:
    name = os.path.basename(file)
    return name if name in _SYSTEM_FILES else printable(suffix(file)) or "without a suffix"


def by_split(root: Path, files: list[str]) -> dict[str, list[str]]:
    """Paths of files by the split named in them; all "train" if none is named."""
    groups: dict[str, list[str]] = {}
    for file in files:
        words = re.split("[^a-z]+", file.lower())
        for name in [name for name in SPLITS if name in words][:1]:
            groups.setdefault(name, []).append(file)
    return {
        name: [str(root / file) for file in group]
        for name, group in (groups or {"train": files}).items()
    }


def image_splits(folder: Folder, wanted: Callable[[Iterable[str]], list[str]]) -> Splits:
    """The wanted splits of an image folder: rows of paths, with labels or metadata if present.

    Args:
        folder: the folder; its count of unused files and its facts about labels are updated.
        wanted: selects splits from the names of all splits, or raises DataError.
    """
    images, metadata = folder.images(), folder.metadata()
    others = {*folder.files} - {*images, *metadata}
    groups = _split_by_top_folder(images)
    names = wanted(groups)
    num_grouped = sum(map(len, groups.values()))
    folder.left_out["outside of the split folders"] += len(images) - num_grouped
    if not metadata:
        return _rows_with_labels(folder, {name: groups[name] for name in names}, others)
    folder.leave_out(others)
    splits = _rows_with_metadata(folder.root, metadata, list(groups))
    for name in names:
        rows = splits[name]
        listed = {path for column in _image_columns(rows) for path in _paths(rows, column)}
        present = {str(folder.root / file) for file in groups[name]}
        folder.left_out["not in the metadata"] += len(present - listed)
    return splits


def _split_by_top_folder(files: Sequence[str]) -> dict[str, list[PurePath]]:
    """Files by split; all "train" unless the top folders are splits."""
    by_top: dict[str, list[PurePath]] = {}
    for file in map(PurePath, files):
        by_top.setdefault(file.parts[0] if len(file.parts) > 1 else "", []).append(file)
    splits = by_top.keys() & SPLITS
    if len(splits) > 1 or splits == by_top.keys():
        return {name: by_top[name] for name in splits}
    return {"train": [PurePath(file) for file in files]}


def _rows_with_labels(
    folder: Folder, groups: Mapping[str, Sequence[PurePath]], others: Iterable[str]
) -> Splits:
    """Rows of paths by split, with labels from a dataset.json or from class folders.

    Args:
        folder: the folder; its facts about labels and unused files are updated.
        groups: images by split.
        others: files that are not images.
    """
    is_split = all(file.parts[0] == name for name, files in groups.items() for file in files)
    labels: dict[str, FolderLabels] = {}
    used = set()
    for name, files in groups.items():
        labels[name] = labels_of_class_folders(files, depth=int(is_split))
        for parent in [PurePath(), PurePath(name)][: 1 + is_split]:
            label_file = str(parent / LABEL_FILE)
            of_file = label_file in others and labels_of_file(folder.root, parent, files)
            if of_file:
                labels[name] = of_file
                used.add(label_file)
        folder.label_problem = folder.label_problem or labels[name].problem
        folder.label_remarks += labels[name].remarks
    folder.leave_out({*others} - used)
    present = {label for one in labels.values() for label in one.classes if label is not None}
    names = [str(label) for label in sorted(present, key=lambda label: (str(type(label)), label))]
    return {
        name: _labelled_rows(folder.root, files, labels[name].classes, names)
        for name, files in groups.items()
    }


def _labelled_rows(
    root: Path,
    files: Sequence[PurePath],
    labels: Sequence[int | str | None],
    names: Sequence[str],
) -> datasets.Dataset:
    columns: dict[str, list[str | None]] = {
        "image": [printable(str(root / file)) for file in files]
    }
    features = datasets.Features({"image": datasets.Image()})
    if labels:
        features["label"] = datasets.ClassLabel(names=list(names))
        columns["label"] = [None if label is None else str(label) for label in labels]
    return datasets.Dataset.from_dict(columns, features=features)


def _has_file_names(file: Path) -> bool:
    """Whether a metadata file names images, as opposed to the metadata of a photo album."""
    try:
        if file.suffix == ".parquet":
            names = pq.read_schema(file).names
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                first = lines.readline(MAX_LINE_BYTES)
                is_csv = file.suffix == ".csv"
                names = next(csv.reader([first])) if is_csv else list(json.loads(first))
    except (
        OSError,
        RecursionError,
        ValueError,
        TypeError,
        StopIteration,
        csv.Error,
        pa.ArrowException,
    ):
        return False
    return any(re.search("(^|_)file_names?$", str(name)) for name in names)


def _rows_with_metadata(root: Path, metadata: Sequence[str], names: Sequence[str]) -> Splits:
    """Rows of the metadata by split; `imagefolder` rejects file names outside the folder."""
    rows = _read_metadata(root, metadata)
    columns = _image_columns(rows)
    if len(names) == 1 or not columns:
        return dict.fromkeys(names, rows)
    paths = _paths(rows, columns[0])
    tops = [PurePath(path).relative_to(root).parts[0] for path in paths]
    return {
        name: rows.select([row for row, top in enumerate(tops) if top == name]) for name in names
    }


def _read_metadata(root: Path, metadata: Sequence[str]) -> datasets.Dataset:
    """The rows of all metadata files, in the order of the files.

    Read one by one, because the builder takes several files in random order.
    """
    tables = []
    for file in metadata:
        if suffix(file) == ".parquet":
            check_metadata(root / file)
        else:
            check_lines(root / file)
        pattern = glob.escape(str(root / file))
        rows = datasets.load_dataset("imagefolder", data_files={"train": [pattern]}, split="train")
        columns = _image_columns(rows)
        if suffix(file) == ".csv" and columns:
            rows = with_text_columns(rows, root / file, _paths(rows, columns[0]))
        tables.append(rows)
    rows = datasets.concatenate_datasets(tables)
    return with_types(rows) if {suffix(file) for file in metadata} == {".csv"} else rows


def _image_columns(rows: datasets.Dataset) -> list[str]:
    return [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    """Paths in an image column; None for a cell without path."""
    chunks = rows.with_format("arrow")[:].column(column).chunks
    return [path for chunk in chunks for path in chunk.field("path").to_pylist()]
