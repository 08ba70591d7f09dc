"""Text in messages: counts, durations, suggestions, printable names, secrets removed.

Imports only the standard library, so that a wrong path is reported before torch is loaded.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

TOKEN = re.compile(
    r"\b(?:hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
# Of a URL also a user alone, which may be a token, and whatever its query holds.
_SECRETS = (
    (TOKEN, "[hidden]"),
    (re.compile(r"(?<=://)[^/@\s'\"]+(?=@)"), "[hidden]"),
    (re.compile(r"(?<=://)([^\s'\"?]*)\?[^\s'\"]*"), r"\1?[hidden]"),
)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with the close matches, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def close_paths(text: str) -> str:
    """A hint with what lies beside a path that does not exist, or nothing."""
    path = Path(text).expanduser()
    return did_you_mean(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])


def check_local_path(text: str) -> None:
    """Raises ValueError if `text` can only be a path, no name on the Hub, and nothing is there."""
    is_local = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    is_pattern = "://" in text or any(char in text for char in "*?[")
    if is_local and not is_pattern and not os.path.exists(os.path.expanduser(text)):
        raise ValueError(without_secrets(f"{text!r} does not exist{close_paths(text)}"))


def public_name(source: str) -> str:
    """A Hub id as it is; of a local path the last part: where it lies is nobody else's business."""
    path = os.path.expanduser(source)
    is_local = os.path.exists(path) or source.count("/") != 1 or source.startswith((".", "/", "~"))
    return os.path.basename(os.path.abspath(path)) if is_local else source


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens in it."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def printable(name: str) -> str:
    r"""A file's name as UTF-8; bytes that are none become \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: "1 image", "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
