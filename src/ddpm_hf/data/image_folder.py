"""Image folders: their files, and the rows of their images with labels or metadata.

Files are listed here, and only metadata is read by the `imagefolder` builder of `datasets`. That
builder (datasets 5.2) takes a folder "my test shots" for a split, fails on a file name that is not
UTF-8, includes images in folders of training runs, does not count what it ignores, and is 15 to 70
times slower for 4,000 files.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import datasets

from ddpm_hf.data.decoding import EXTENSIONS
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.folder_labels import labels_by_split
from ddpm_hf.data.folder_metadata import listed_images, metadata_files, rows_with_metadata
from ddpm_hf.data.splits import Splits, split_by_top_folder, split_names
from ddpm_hf.paths import ModelPaths, RunPaths
from ddpm_hf.utils.text import counted, printable

IN_RUNS = "in folders of training runs"
_IN_RESERVED = "in folders named __*"  # of programs, such as __MACOSX in archives
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
_RUN = RunPaths(Path())
_RUN_FILES = {_RUN.config.name, _RUN.metrics.name}
_RUN_PICTURES = {_RUN.loss_picture.name, _RUN.denoising_picture.name}
_RUN_FOLDERS = {_RUN.samples.name, _RUN.model.root.name, _RUN.checkpoints.name, "logs"}
_MODEL_INDEX = ModelPaths(Path()).index.name


@dataclass(frozen=True)
class Origin:
    """Origin of the rows of a dataset.

    Attributes:
        root: folder from which rows that contain only a path may read images; None for no folder.
        left_out: number of files of a folder that are not in the rows, by kind or reason.
        label_problem: why a folder that seems to contain classes has no labels; else empty.
        label_remarks: lines about images without a label of their own.
    """

    root: Path | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    label_problem: str = ""
    label_remarks: tuple[str, ...] = ()


class Folder:
    """Files of a folder, without hidden files and outputs of training runs.

    Attributes:
        root: the folder.
        files: paths relative to `root`, sorted.
        left_out: number of images in outputs of training runs and in folders named `__*`.

    Raises:
        DataError: if a link leads out of the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self.files = sorted(self._walk())

    def images(self) -> list[str]:
        """Files with the suffix of a supported image format."""
        return [file for file in self.files if suffix(file) in EXTENSIONS]

    def with_suffix(self, ending: str) -> list[str]:
        """Files with a given suffix, such as ".parquet"."""
        return [file for file in self.files if suffix(file) == ending]

    def _walk(self) -> Iterator[str]:
        outside = []
        for parent, subfolders, names in os.walk(self.root, onerror=_raise):
            names = [name for name in names if not name.startswith(".")]
            is_output = _is_output({*subfolders, *names})
            if is_output and parent != str(self.root):
                self._leave_out_images(parent, IN_RUNS)
                subfolders.clear()
                continue
            if is_output:
                self.left_out[IN_RUNS] += len(_RUN_PICTURES.intersection(names))
                names = [name for name in names if name not in _RUN_FILES | _RUN_PICTURES]
                for name in _RUN_FOLDERS.intersection(subfolders):
                    self._leave_out_images(os.path.join(parent, name), IN_RUNS)
                    subfolders.remove(name)
            for name in subfolders:
                if name.startswith("__"):
                    self._leave_out_images(os.path.join(parent, name), _IN_RESERVED)
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
                f"{counted(len(outside), 'link leads', 'links lead')} out of the folder"
                f" {str(self.root)!r}, such as {outside[0]!r}: copy the files, remove the links, or"
                " pass the folder that contains the files"
            )

    def _leave_out_images(self, folder: str, reason: str) -> None:
        names = (name for _, _, names in os.walk(folder) for name in names if name[0] != ".")
        self.left_out[reason] += sum(suffix(name) in EXTENSIONS for name in names)


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


def image_rows(folder: Folder, split: str | None) -> tuple[Splits, Origin]:
    """Rows of the images of a folder by split: their paths, with labels or metadata if present.

    Args:
        folder: the folder.
        split: split expression; None for all splits. Other splits may be missing in the result.
    Raises:
        DataError: if a split does not exist or the metadata cannot be read.
    """
    images, metadata = folder.images(), metadata_files(folder.root, folder.files)
    is_used = {*images, *metadata}
    others = [file for file in folder.files if file not in is_used]
    groups = split_by_top_folder(images)
    chosen = {name: groups[name] for name in split_names(split, groups)}
    left_out = folder.left_out.copy()
    left_out["outside of the split folders"] += len(images) - sum(map(len, groups.values()))
    if not metadata:
        return _rows_with_labels(folder.root, chosen, others, left_out)
    left_out.update(map(_kind, others))
    splits = rows_with_metadata(folder.root, metadata, list(groups))
    for name, files in chosen.items():
        present = {str(folder.root / file) for file in files}
        left_out["not in the metadata"] += len(present - listed_images(splits[name]))
    return splits, Origin(folder.root, +left_out)


def _rows_with_labels(
    root: Path,
    groups: Mapping[str, Sequence[PurePath]],
    others: Sequence[str],
    left_out: Counter[str],
) -> tuple[Splits, Origin]:
    """Rows by split, with labels from a dataset.json or from class folders.

    Args:
        root: the folder.
        groups: images by split.
        others: files that are not images.
        left_out: number of images that are not used, by reason.
    """
    labels, label_files = labels_by_split(root, groups, others)
    left_out.update(_kind(file) for file in others if file not in label_files)
    present = {label for one in labels.values() for label in one.classes if label is not None}
    names = [str(label) for label in sorted(present, key=lambda label: (str(type(label)), label))]
    splits = {
        name: _labelled_rows(root, files, labels[name].classes, names)
        for name, files in groups.items()
    }
    problem = next((one.problem for one in labels.values() if one.problem), "")
    remarks = tuple(remark for one in labels.values() for remark in one.remarks)
    return splits, Origin(root, +left_out, problem, remarks)


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
