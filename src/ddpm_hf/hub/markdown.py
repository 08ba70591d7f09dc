"""Values as Markdown that renders nothing of their own."""

import html
import re

NOT_RECORDED = "not recorded"


def inline(value: object) -> str:
    """Escaped text for one line or one table cell."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]{}#|~!$])", r"\\\1", text)


def setting_name(key: str) -> str:
    """Name of a setting, as code if it is an identifier."""
    return f"`{key}`" if key.isidentifier() else inline(key)


def number(value: object) -> str:
    """A number with thousands separators; other values as escaped text."""
    return f"{value:,}" if isinstance(value, int | float) else inline(value)
