# SPDX-License-Identifier: Apache-2.0
"""Numbers of classes that are given by name or number; imports no torch."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import config_extension

NO_CLASSES = "`guidance_scale` must be 1: this model has no numbered classes"
_MAX_NAMES = 20  # in a message


def class_numbers(labels: Any, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class numbers of labels that are given as numbers or names.

    Text is compared with the names exactly, then in the Unicode normalization NFKC, and is read as
    a number if no name is equal.

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


def check_null_class(config: Mapping[str, Any], class_names: Sequence[str] | None) -> None:
    """Check that a network has a trained null class, which classifier-free guidance needs.

    Args:
        config: configuration of the network.
        class_names: names of the classes, without the null class.
    Raises:
        ValueError: with the reason.
    """
    num_classes = config.get("num_class_embeds")
    if num_classes is None or config.get("class_embed_type") is not None:
        raise ValueError(NO_CLASSES)
    if class_names is not None and len(class_names) >= num_classes:
        raise ValueError(
            "`guidance_scale` must be 1: this model was trained without a null class, all of its "
            f"{num_classes} embeddings are classes"
        )
    if not config_extension.extension_of(config).get("has_null_class", True):
        raise ValueError(
            "`guidance_scale` must be 1: this model was trained with `class_dropout` 0, without the"
            " null class; pass a weaker model as `guide`, or train with `class_dropout` 0.1"
        )
