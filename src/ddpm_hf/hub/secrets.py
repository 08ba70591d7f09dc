"""Detection of tokens, passwords and local paths in files before an upload."""

import re
from pathlib import Path

from huggingface_hub import get_token

from ddpm_hf.utils.text import TOKEN

_LOCAL_PATH = re.compile(
    r"(?<![\w/.:~-])/(?:home|Users|root|tmp|var|mnt|media|opt|srv|scratch|workspace|content|kaggle)/"
    r"[^\s\"'`<>|)]+|\b[A-Za-z]:[\\/]+Users[\\/][^\s\"'`<>|)]+|file://\S+"
)


def find_leak(text: str, *, paths: bool = True) -> str | None:
    """Description of a secret or local path in `text`, without the secret itself; None if clean.

    Args:
        text: content of a file.
        paths: whether to search for local paths too.
    """
    if hide_tokens(text) != text:
        return "a string with the form of a token or password"
    home, path = str(Path.home()), _LOCAL_PATH.search(text)
    if paths and path:
        return f"the local path {path[0]!r}"
    is_in_home = len(home) > 1 and home + "/" in text
    return f"the local path {home!r}" if paths and is_in_home else None


def hide_tokens(text: str) -> str:
    """`text` with "[hidden]" in place of tokens, passwords, and the token in use."""
    text = TOKEN.sub("[hidden]", text)
    token = get_token()
    return text.replace(token, "[hidden]") if token else text
