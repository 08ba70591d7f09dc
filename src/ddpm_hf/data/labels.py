"""Class labels beside the images: numbers and names, and a rule for each odd case.

| the column                                     | becomes                                         |
|------------------------------------------------|-------------------------------------------------|
| `ClassLabel` (sub-folders of a folder are one) | its numbers and names                           |
| text, whole numbers, true or false             | classes in sorted order, named as they are      |
| null, "" or a negative number                  | no label: -1, counted and warned about          |
| no label at all, as in many a test split       | refused: nothing to condition on                |
| one class                                      | refused likewise                                |
| hundreds of classes                            | as they are                                     |
| nearly as many values as rows: no classes      | refused, unless a `ClassLabel` declares them    |
| floating point and others                      | refused                                         |
"""

from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.errors import DataError
from ddpm_hf.text import did_you_mean

NO_LABEL = -1

Labels = NDArray[np.int64]
"""The class of each row, (N,), from 0; `NO_LABEL` where there is none."""

# Text of which each value occurs once or twice is a caption or a name.
_MANY_CLASSES, _ROWS_PER_CLASS = 10, 2


def class_columns(dataset: datasets.Dataset) -> list[str]:
    """The columns that say of themselves that they hold classes."""
    features = dataset.features
    return [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]


def known_class_names(dataset: datasets.Dataset) -> tuple[str, ...] | None:
    """The names in the column "label", or in the only column of classes, if any."""
    columns = class_columns(dataset)
    name = "label" if "label" in columns else columns[0] if len(columns) == 1 else None
    return tuple(dataset.features[name].names) if name else None


def read_labels(
    dataset: datasets.Dataset, label_column: str | Literal[True]
) -> tuple[Labels, tuple[str, ...]]:
    """The class of each row, and the names of the classes.

    Args:
        dataset: its rows.
        label_column: holds the classes; True finds the only column that is declared to.
    Raises:
        DataError: where the table above says so.
    """
    column = _only_class_column(dataset) if label_column is True else label_column
    if column not in dataset.features:
        raise DataError(f"there is no column {column!r}{did_you_mean(column, dataset.features)}")
    kind = dataset.features[column]
    values = dataset.with_format("arrow").select_columns([column])[:].column(column)
    if isinstance(kind, datasets.ClassLabel):
        numbers, names = values.fill_null(NO_LABEL).to_numpy().astype(np.int64), tuple(kind.names)
    else:
        _check_kind(column, kind)
        numbers, names = _numbered(column, values.to_pylist())
    present = np.unique(numbers[numbers >= 0])
    if len(present) < 2:
        found = f"only the class {names[present[0]]!r}" if len(present) else "no label at all"
        raise DataError(
            f"the column {column!r} holds {found} in these rows: there is nothing to condition on; "
            "train without labels, or take another split or column"
        )
    return np.maximum(numbers, NO_LABEL), names


def _only_class_column(dataset: datasets.Dataset) -> str:
    columns = class_columns(dataset)
    if "label" in columns or len(columns) == 1:
        return "label" if "label" in columns else columns[0]
    what = f"several columns of classes ({', '.join(columns)})" if columns else "no class labels"
    raise DataError(
        f"the data set has {what}: name the column that holds them, one of "
        f"{', '.join(dataset.features)}"
        + "; of a folder, put the images of each class into a sub-folder of its own"
        * (not columns)
    )


def _check_kind(column: str, kind: Any) -> None:
    dtype = str(getattr(kind, "dtype", kind))
    if not isinstance(kind, datasets.Value) or not dtype.startswith(
        ("string", "large_string", "int", "uint", "bool")
    ):
        raise DataError(
            f"the column {column!r} holds {dtype}: classes are a ClassLabel, text or whole numbers"
        )


def _numbered(column: str, values: list[Any]) -> tuple[Labels, tuple[str, ...]]:
    """Classes in sorted order."""
    classes = sorted({value for value in values if _is_label(value)})
    if len(classes) > max(_MANY_CLASSES, len(values) // _ROWS_PER_CLASS):
        raise DataError(
            f"the column {column!r} holds {len(classes):,} different values in {len(values):,} "
            "rows: they are no classes"
        )
    places = {value: place for place, value in enumerate(classes)}
    numbers = [places.get(value, NO_LABEL) for value in values]
    return np.array(numbers, np.int64), tuple(map(str, classes))


def _is_label(value: Any) -> bool:
    return value not in (None, "") and (isinstance(value, str) or value >= 0)
