"""Splits of a dataset: by the names of files and folders, and in expressions such as "test[:9]"."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import datasets

from ddpm_hf.data.errors import DataError
from ddpm_hf.utils.text import did_you_mean

SPLITS = ("train", "test", "validation", "valid", "val")

Splits = dict[str, datasets.Dataset]


def split_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split named in their path; all "train" if none is named."""
    groups: dict[str, list[str]] = {}
    for file in files:
        words = re.split("[^a-z]+", file.lower())
        for name in [name for name in SPLITS if name in words][:1]:
            groups.setdefault(name, []).append(file)
    return groups or {"train": list(files)}


def split_by_top_folder(files: Sequence[str]) -> dict[str, list[PurePath]]:
    """Files by split; all "train" unless the top folders are splits."""
    by_top: dict[str, list[PurePath]] = {}
    for file in map(PurePath, files):
        by_top.setdefault(file.parts[0] if len(file.parts) > 1 else "", []).append(file)
    splits = by_top.keys() & SPLITS
    if len(splits) > 1 or splits == by_top.keys():
        return {name: by_top[name] for name in splits}
    return {"train": [PurePath(file) for file in files]}


def all_splits(names: Iterable[Any]) -> str:
    """The expression for all splits."""
    return "+".join(sorted(map(str, names)))


def split_names(split: str | None, known: Iterable[Any]) -> list[str]:
    """Names in a split expression.

    Args:
        split: the expression; None for all splits.
        known: names of the splits; any name is accepted if there are none.
    Raises:
        DataError: if a name is unknown.
    """
    choices = sorted(map(str, known))
    names = [part.split("[")[0].strip() for part in (split or all_splits(known)).split("+")]
    for name in names:
        if choices and name not in choices:
            raise unknown_split(name, choices)
    return names


@contextmanager
def split_named_by(option: str) -> Iterator[None]:
    """Name `option` instead of `split` in errors about the split that the block reads."""
    try:
        yield
    except DataError as error:
        error.args = (str(error).replace("`split`", f"`{option}`"),)
        raise


def unknown_split(name: str, choices: Iterable[str]) -> DataError:
    """The error for a split that does not exist."""
    choices = list(choices)
    hint = did_you_mean(name, choices)
    return DataError(f"`split` must be one of {', '.join(choices)}, got {name!r}{hint}")


def take_split(splits: Mapping[str, datasets.Dataset], split: str | None) -> datasets.Dataset:
    """The rows of a split expression; None for all splits.

    Raises:
        DataError: if a split does not exist.
    """
    split_names(split, splits)
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split or all_splits(splits)).to_absolute(sizes)
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(chosen)
