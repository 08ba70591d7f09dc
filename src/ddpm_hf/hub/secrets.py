"""What must stay on this machine: tokens, passwords and the paths of people's folders."""

import re
from pathlib import Path

from huggingface_hub import get_token

from ddpm_hf.text import TOKEN

_LOCAL_PATH = re.compile(
    r"(?<![\w/.:~-])/(?:home|Users|root|tmp|var|mnt|media|opt|srv|scratch|workspace|content|kaggle)/"
    r"[^\s\"'`<>|)]+|\b[A-Za-z]:[\\/]+Users[\\/][^\s\"'`<>|)]+|file://\S+"
)


def find_leak(text: str, *, paths: bool = True) -> str | None:
    """What in `text` should stay on this machine, without repeating a secret; None if nothing.

    Args:
        text: content of a file that is about to be shared.
        paths: whether local paths count, as well as tokens and passwords.
    """
    if hide_tokens(text) != text:
        return "what looks like a token or password"
    places = [str(Path.home())] if len(str(Path.home())) > 1 else []
    found = _LOCAL_PATH.search(text) if paths else None
    if found:
        return f"the local path {found[0]!r}"
    return next((f"the local path {p!r}" for p in places if paths and p + "/" in text), None)


def hide_tokens(text: str) -> str:
    """`text`, with a placeholder for each token and password, that of this login included."""
    text = TOKEN.sub("[hidden]", text)
    token = get_token()
    return text.replace(token, "[hidden]") if token else text
