# SPDX-License-Identifier: Apache-2.0
"""Numbers of classes that are given by name or number; imports no torch."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MAX_NAMES = 20  # in a message


def class_numbers(labels: Any, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class numbers of labels that are given as numbers or names.

    A text is the name of a class, else a name that is equal in the Unicode normalization NFKC, else
    a number.

    Args:
        labels: one label or several.
        num_classes: number of class embeddings.
        class_names: names of the classes, without the null class.
    Raises:
        ValueError: for an unknown class.
    """
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    names = list(class_names or ())[:num_classes]
    number_of = {**_normalized(names), **{name: number for number, name in enumerate(names)}}
    return [_class_number(label, number_of, len(names) or num_classes, names) for label in labels]


def _normalized(names: Sequence[str]) -> dict[str, int]:
    """Class numbers by normalized name, where that is unique."""
    plain = [unicodedata.normalize("NFKC", name) for name in names]
    count = Counter(plain)
    return {name: number for number, name in enumerate(plain) if count[name] == 1}


def _class_number(
    label: Any, number_of: Mapping[str, int], num_classes: int, names: Sequence[str]
) -> int:
    number = label.item() if isinstance(label, np.integer) else label
    if isinstance(label, str):
        plain = unicodedata.normalize("NFKC", label)
        number = number_of.get(label, number_of.get(plain, plain))
        number = int(number) if isinstance(number, str) and number.isdecimal() else number
    is_int = isinstance(number, int) and not isinstance(number, bool)
    if is_int and 0 <= number < num_classes:
        return int(number)
    choices = hint = ""
    if not isinstance(label, str) and str(number) in number_of:
        hint = f'; the name of a class is text: "{number}"'
    elif names:
        shown = ", ".join(map(repr, names[:_MAX_NAMES])) + ", ..." * (len(names) > _MAX_NAMES)
        choices = f" or one of {shown}"
    if number in (None, -1, num_classes):
        hint += "; for images of no class set `guidance_scale` to 0"
    raise ValueError(
        f"`class_labels` must be in [0, {num_classes - 1}]{choices}, got {label!r}{hint}"
    )
