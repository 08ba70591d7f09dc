"""Formatting of messages: counts, durations, close matches, printable names, redacted secrets.

Imports only the standard library, so that a wrong path is reported before torch is loaded.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

TOKEN = re.compile(
    r"\b(?:hf_|api_org_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-)[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
# Also the user of a URL, which may be a token, and its query string.
_SECRETS = (
    (TOKEN, "[hidden]"),
    (re.compile(r"(?<=://)[^/@\s'\"]+(?=@)"), "[hidden]"),
    (re.compile(r"(?<=://)([^\s'\"?]*)\?[^\s'\"]*"), r"\1?[hidden]"),
    (
        re.compile(
            # After a colon, a word without digits is text: "needs a token: run ..."
            r"(?i)\b(token|password|passwd|secret|api[_-]?key|authorization)"
            r"(=|: *(?=\D*\d))[^\s&'\"]+"
        ),
        r"\1\2[hidden]",
    ),
)


def is_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Hint with close matches, to append to a message; empty without any."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def close_paths(text: str) -> str:
    """Hint with existing paths similar to a missing one; empty without any."""
    path = Path(text).expanduser()
    return did_you_mean(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])


def check_local_path(text: str) -> None:
    """Raise ValueError if `text` is a local path, not a Hub id, that does not exist."""
    is_local = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    is_pattern = "://" in text or any(char in text for char in "*?[")
    if is_local and not is_pattern and not os.path.exists(os.path.expanduser(text)):
        raise ValueError(without_secrets(f"{text!r} does not exist{close_paths(text)}"))


def public_name(source: str) -> str:
    """A Hub id unchanged; for a local path only its last part, to keep private paths out."""
    path = os.path.expanduser(source)
    is_pattern = any(char in source for char in "*?[")
    is_id = source.count("/") == 1 and not is_pattern and not source.startswith((".", "/", "~"))
    return source if is_id and not os.path.exists(path) else os.path.basename(os.path.abspath(path))


def without_secrets(text: str) -> str:
    """`text` with passwords and tokens replaced by "[hidden]"."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, "[hidden]")
    return text


def escaped(value: object) -> str:
    r"""One short line of text for a terminal; control characters appear as \xNN or \uNNNN."""
    return visible(str(value).replace("\n", "\\n"))[:200]


def visible(text: str) -> str:
    r"""`text` with all control characters but line breaks as \xNN or \uNNNN.

    The characters would move the cursor, change the title of the terminal, or reverse the text.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def printable(name: str) -> str:
    r"""File name as valid UTF-8, with invalid bytes as \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def how_to_install(extra: str) -> str:
    """How to install an optional dependency group of this package, which is not on PyPI."""
    return f"run pip install '.[{extra}]' in a clone of ddpm_hf, which is not on PyPI yet"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Number and noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def share_that_has(part: int, number: int, noun: str, plural: str | None = None) -> str:
    """Subject and verb: "1 of 241 images has", "3 of 241 images have"."""
    return f"{part:,} of {counted(number, noun, plural)} {'has' if part == 1 else 'have'}"


def file_size(num_bytes: float) -> str:
    """Readable size: "0.25 MB", "12 GB", "1,200 GB"."""
    value, unit = (num_bytes / 1e9, "GB") if num_bytes >= 1e9 else (num_bytes / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def duration(seconds: float) -> str:
    """Readable duration: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
