"""Class labels of an image folder: class folders, or the dataset.json of EDM and StyleGAN."""

import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ddpm_hf.diffusion.atomic_files import read_text
from ddpm_hf.utils.text import printable

_MAX_BYTES = 2**28  # of a file that lists every image
_LABEL_FILE = "dataset.json"


@dataclass(frozen=True)
class FolderLabels:
    """Classes of the images of a folder.

    Attributes:
        classes: class of each image, a number in dataset.json and otherwise a folder name; None for
            an image without label. Empty if there are no labels.
        problem: why a folder that seems to contain classes has no labels; else empty.
        remarks: lines about images that are not directly in a class folder or not in dataset.json.
    """

    classes: Sequence[int | str | None] = ()
    problem: str = ""
    remarks: tuple[str, ...] = ()


def labels_by_split(
    root: Path, groups: Mapping[str, Sequence[PurePath]], others: Container[str]
) -> tuple[dict[str, FolderLabels], set[str]]:
    """Labels of the images of each split, and the dataset.json files that they are from.

    A dataset.json in the folder of a split takes precedence over one in the root, and both over
    class folders.

    Args:
        root: the image folder.
        groups: images by split, relative to `root`.
        others: files that are not images, relative to `root`.
    """
    is_split = all(file.parts[0] == name for name, files in groups.items() for file in files)
    labels: dict[str, FolderLabels] = {}
    used = set()
    for name, files in groups.items():
        labels[name] = _labels_of_class_folders(files, depth=int(is_split))
        for parent in [PurePath(), PurePath(name)][: 1 + is_split]:
            file = str(parent / _LABEL_FILE)
            if file in others and (of_file := _labels_of_file(root, parent, files)):
                labels[name] = of_file
                used.add(file)
    return labels, used


def _labels_of_class_folders(files: Sequence[PurePath], depth: int) -> FolderLabels:
    """Labels from the first folder below the root, or below the folder of the split.

    Args:
        files: images, relative to the root.
        depth: number of folders above the class folders: 1 for split folders, else 0.
    """
    parts = [[printable(part) for part in file.parts[depth:]] for file in files]
    classes = [names[0] if len(names) > 1 else None for names in parts]
    folders = sorted({name for name in classes if name is not None})
    if len(folders) < 2:
        return FolderLabels(problem=_single_folder(folders[0], parts) if folders else "")
    loose = [names for names in parts if len(names) == 1]
    nested = [names for names in parts if len(names) > 2]
    remarks = {
        "are outside of the class folders": loose,
        "are in a sub-folder of their class folder, which is their class": nested,
    }
    return FolderLabels(
        classes,
        remarks=tuple(
            f"{len(found)} of {len(files)} images {text}, such as {'/'.join(found[0])!r}"
            for text, found in remarks.items()
            if found
        ),
    )


def _single_folder(folder: str, parts: Sequence[Sequence[str]]) -> str:
    inner = Counter(names[1] for names in parts if len(names) > 2)
    problem = f"the only class folder is {folder!r}"
    if len(inner) < 2:
        return problem
    shown = ", ".join(map(repr, sorted(inner)[:5])) + ", ..." * (len(inner) > 5)
    return f"{problem}; to use its sub-folders {shown} as classes, pass the folder {folder!r}"


def _labels_of_file(root: Path, folder: PurePath, files: Sequence[PurePath]) -> FolderLabels | None:
    """Labels from a dataset.json; None if it holds other content.

    Args:
        root: the image folder.
        folder: folder of the dataset.json, relative to `root`.
        files: images, relative to `root`.
    """
    name = str(folder / _LABEL_FILE)
    try:
        content = json.loads(read_text(root / name, _MAX_BYTES))
    except (OSError, RecursionError, ValueError) as error:
        return FolderLabels(problem=f"{name!r} cannot be read: {error}")
    if not isinstance(content, dict) or "labels" not in content:
        return None
    try:
        labels = {str(file).replace("\\", "/"): value for file, value in _pairs(content["labels"])}
    except (TypeError, ValueError):
        return FolderLabels(problem=f"{name!r} does not list pairs of a file name and a label")
    if not labels:
        return FolderLabels(problem=f"{name!r} has no labels")
    other = next((value for value in labels.values() if type(value) is not int), None)
    if other is not None:
        return FolderLabels(problem=f"the labels in {name!r} must be integers, got {other!r:.40}")
    classes = [labels.get(file.relative_to(folder).as_posix()) for file in files]
    missing = [str(file) for file, label in zip(files, classes, strict=True) if label is None]
    if len(missing) == len(files):
        return FolderLabels(problem=f"{name!r} has no label for any image, such as {missing[0]!r}")
    remark = f"{len(missing)} of {len(files)} images are not in {name!r}"
    remarks = (f"{remark}, such as {missing[0]!r}",) if missing else ()
    return FolderLabels(
        [None if label is None or label < 0 else label for label in classes], remarks=remarks
    )


def _pairs(labels: Any) -> Sequence[tuple[Any, Any]]:
    pairs = labels.items() if isinstance(labels, dict) else labels or ()
    return [(file, label) for file, label in pairs]
