"""Limits of YAML that others wrote, checked before it is loaded."""

from typing import Any

import yaml

MAX_CHARACTERS = 2**18
MAX_DEPTH = 32


def load_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        ValueError: if it is invalid, or refused by `check_yaml`, in one line.
    """
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that may take any time or memory to load."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has a YAML alias, which is not supported")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
