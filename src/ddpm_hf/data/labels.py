"""Class labels of images: numbers and names from a column.

| the column                                     | becomes                                         |
|------------------------------------------------|-------------------------------------------------|
| `ClassLabel` (also the sub-folders of a folder)| its numbers and names                           |
| text, integers, booleans                       | classes in sorted order, named by their value   |
| null, "" or a negative number                  | no label: -1, with a warning and a count        |
| a number that its `ClassLabel` does not declare| error; -1 is no label                           |
| no label at all, as in many test splits        | error: nothing to condition on                  |
| a single class                                 | error: nothing to condition on                  |
| hundreds of classes                            | unchanged                                       |
| nearly as many values as rows                  | error, unless a `ClassLabel` declares them      |
| floating point and other types                 | error                                           |
"""

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.errors import DataError
from ddpm_hf.utils.text import did_you_mean, share_that_has

NO_LABEL = -1

Labels = NDArray[np.int64]
"""Class of each row, (N,), from 0; `NO_LABEL` for a row without label."""

# Text with more distinct values is a caption or a name.
_MANY_CLASSES, _ROWS_PER_CLASS = 10, 2


def known_class_names(dataset: datasets.Dataset) -> tuple[str, ...] | None:
    """Class names of the `ClassLabel` column "label", or of the only `ClassLabel` column."""
    column = _class_column(dataset)
    return tuple(dataset.features[column].names) if column else None


def declared_labels(dataset: datasets.Dataset) -> Labels | None:
    """Class of each row by the column of `known_class_names`; None without such a column."""
    column = _class_column(dataset)
    return _class_numbers(dataset, column) if column else None


def _class_column(dataset: datasets.Dataset) -> str | None:
    """The `ClassLabel` column "label", or the only `ClassLabel` column."""
    columns = _class_columns(dataset)
    return "label" if "label" in columns else columns[0] if len(columns) == 1 else None


def _class_columns(dataset: datasets.Dataset) -> list[str]:
    features = dataset.features
    return [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]


def _class_numbers(dataset: datasets.Dataset, column: str) -> Labels:
    numbers: Labels = _values(dataset, column).fill_null(NO_LABEL).to_numpy().astype(np.int64)
    return numbers


def _values(dataset: datasets.Dataset, column: str) -> Any:
    """A column as Arrow array."""
    return dataset.with_format("arrow").select_columns([column])[:].column(column)


def read_labels(
    dataset: datasets.Dataset, label_column: str | Literal[True], problem: str = ""
) -> tuple[Labels, tuple[str, ...]]:
    """Class of each row, and names of the classes.

    Args:
        dataset: rows with a label column.
        label_column: name of the column; True for the only `ClassLabel` column.
        problem: reason for missing labels, for the error message; empty if unknown.
    Raises:
        DataError: if the column is missing or unusable; see the table above.
    """
    column = find_label_column(dataset, label_column, problem)
    kind = dataset.features[column]
    if isinstance(kind, datasets.ClassLabel):
        numbers, names = _class_numbers(dataset, column), tuple(kind.names)
        _check_declared(column, numbers, names)
    else:
        _check_type(column, kind)
        numbers, names = _number_classes(column, _values(dataset, column).to_pylist())
    present = np.unique(numbers[numbers >= 0])
    if len(present) < 2:
        content = f"only the class {names[present[0]]!r}" if len(present) else "no label"
        raise DataError(
            f"column {column!r} must contain at least two classes in these rows, got {content};"
            " train without labels, or choose another split or column"
        )
    return np.maximum(numbers, NO_LABEL), names


def find_label_column(
    dataset: datasets.Dataset, label_column: str | Literal[True], problem: str = ""
) -> str:
    """Name of the label column; see `read_labels`."""
    column = label_column if label_column is not True else _class_column(dataset)
    if column is None:
        raise _no_class_column(dataset, problem)
    if column not in dataset.features:
        reason = problem or f"the columns are {', '.join(dataset.features)}"
        hint = did_you_mean(column, dataset.features)
        raise DataError(f"there is no column {column!r}{hint}; {reason}")
    return column


def _check_declared(column: str, numbers: Labels, names: Sequence[str]) -> None:
    rows = np.flatnonzero((numbers < NO_LABEL) | (numbers >= len(names)))
    if len(rows):
        values = ", ".join(map(str, np.unique(numbers[rows])[:10]))
        raise DataError(
            f"column {column!r} declares the {len(names)} classes 0..{len(names) - 1}, but"
            f" {len(rows):,} of {len(numbers):,} rows have other labels ({values}), such as row"
            f" {rows[0]}; correct the labels or the names of the ClassLabel"
        )


def _no_class_column(dataset: datasets.Dataset, problem: str) -> DataError:
    columns = _class_columns(dataset)
    others = [n for n, kind in dataset.features.items() if not isinstance(kind, datasets.Image)]
    hint = f"name the label column (`class_column`), one of {', '.join(others)}"
    if columns:
        return DataError(f"the dataset has several class columns, {', '.join(columns)}; {hint}")
    if problem:
        return DataError(f"the dataset has no class labels: {problem}")
    hints = [hint] * bool(others)
    hints.append("in a folder, put the images of each class into a sub-folder")
    return DataError("; ".join(["the dataset has no class labels", *hints]))


def _check_type(column: str, kind: Any) -> None:
    dtype = str(getattr(kind, "dtype", kind))
    if not isinstance(kind, datasets.Value) or not dtype.startswith(
        ("string", "large_string", "int", "uint", "bool")
    ):
        raise DataError(
            f"column {column!r} must be a ClassLabel, text or integers to be used as labels, got"
            f" {dtype}"
        )


def _number_classes(column: str, values: list[Any]) -> tuple[Labels, tuple[str, ...]]:
    """Class numbers in the sorted order of the values, and the names."""
    classes = sorted({value for value in values if _is_label(value)})
    if len(classes) > max(_MANY_CLASSES, len(values) // _ROWS_PER_CLASS):
        raise DataError(
            f"column {column!r} has {len(classes):,} distinct values in {len(values):,} rows: too"
            " many to be class labels"
        )
    number_of = {value: number for number, value in enumerate(classes)}
    numbers = [number_of.get(value, NO_LABEL) for value in values]
    return np.array(numbers, np.int64), tuple(map(str, classes))


def _is_label(value: Any) -> bool:
    return value not in (None, "") and (isinstance(value, str) or value >= 0)


def describe_unlabelled(labels: Labels) -> str | None:
    """A line with the number of images without label; None if all have one."""
    count = int((labels == NO_LABEL).sum())
    return f"{share_that_has(count, len(labels), 'image')} no label" if count else None
