"""Errors of the Hub: retries of temporary ones, and one-line messages for the others.

huggingface_hub (2.4) retries uploads of large files, but not the creation of a repository, the
commit, or a download whose connection breaks. Repeating these is safe: if a commit succeeded but
its answer was lost, the next one changes nothing.
"""

import json
import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from ddpm_hf.hub.secrets import hide_tokens
from ddpm_hf.utils.connection import HubError

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
WAITS_S: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0)
MAX_RETRY_AFTER_S = 60.0
TOKEN_HELP = "run `hf auth login` or set HF_TOKEN (https://huggingface.co/settings/tokens)"

_logger = logging.getLogger(__name__)


def retry(
    action: Callable[[], T],
    repo_id: str,
    waits_s: Sequence[float],
    *,
    stop: threading.Event | None = None,
    repeat_unanswered: bool = True,
) -> T:
    """Result of `action()`, repeated after temporary errors.

    Args:
        action: a function that is safe to repeat.
        repo_id: repository, for messages.
        waits_s: seconds before each retry, randomised by 25 %.
        stop: event that ends the retries.
        repeat_unanswered: whether to retry after a lost answer.
    Raises:
        ValueError: for a permanent error, with a one-line message.
        HubError: if the last attempt failed with a temporary error.
    """
    stop = stop or threading.Event()
    waits = list(waits_s)
    while True:
        try:
            return action()
        except Exception as error:
            if not is_temporary(error):
                _raise_explained(error, repo_id)
            is_unsafe = _status(error) is None and not repeat_unanswered
            wait_s = None if is_unsafe or not waits else _delay_s(error, waits.pop(0))
            reason = _reason(error)
            if wait_s is None or stop.is_set():
                raise HubError(f"the Hub failed for {repo_id}: {reason}") from None
            _logger.warning("%s: %s; next attempt in %.1f s", repo_id, reason, wait_s)
            stop.wait(wait_s)


def is_temporary(error: BaseException) -> bool:
    """Whether it is a broken connection, a busy server, or a concurrent commit (409, 412)."""
    status = _status(error)
    if status is not None:
        return (status >= 500 and status != 507) or status in (408, 409, 412, 429)
    if _find(error, OfflineModeIsEnabled):
        return False
    # The Xet client raises ConnectionError. Some calls raise JSONDecodeError, without a status, for
    # an HTML page of a proxy.
    kinds = (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return _find(error, *kinds) is not None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _find(error: BaseException, *kinds: type[E]) -> E | None:
    """The first error of these kinds among the error and its causes."""
    return next((e for e in _chain(error) if isinstance(e, kinds)), None)


def _status(error: BaseException) -> int | None:
    http_error = _find(error, HfHubHTTPError)
    return http_error.response.status_code if http_error else None


def _delay_s(error: BaseException, wait_s: float) -> float:
    """Random delay, so that clients do not return together; at least Retry-After of the server."""
    http_error = _find(error, HfHubHTTPError)
    header = http_error.response.headers.get("Retry-After", "") if http_error else ""
    retry_after_s = min(float(header), MAX_RETRY_AFTER_S) if header.isdigit() else 0.0
    return max(wait_s * random.uniform(0.75, 1.25), retry_after_s)


def _reason(error: BaseException) -> str:
    """Message of the server, or the root cause."""
    http_error = _find(error, HfHubHTTPError)
    if http_error:
        message = http_error.server_message or "no reason given"
        return shorten(f"{message} (HTTP {http_error.response.status_code})")
    cause = _chain(error)[-1]
    return shorten(f"{type(cause).__name__}: {cause}")


def shorten(text: str, length: int = 300) -> str:
    """`text` on one line, cut to `length`, without tokens."""
    text = hide_tokens(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 3] + "..."


def _raise_explained(error: Exception, repo_id: str) -> None:
    """Raise ValueError with reason and fix for a known error of the Hub, else the error itself."""
    status, reason, cause = _status(error), _reason(error), _find(error, HfHubHTTPError)
    if _find(error, OfflineModeIsEnabled):
        text = f"HF_HUB_OFFLINE is set and the cache has no complete copy of {repo_id}"
    elif isinstance(cause, GatedRepoError):
        text = f"{repo_id} is gated: request access on its page, then {TOKEN_HELP}"
    elif isinstance(cause, RevisionNotFoundError):
        text = f"{repo_id} has no such revision: {reason}"
    elif isinstance(cause, RepositoryNotFoundError):
        text = f"{repo_id} is not on the Hub, or is private: check the name, or {TOKEN_HELP}"
    elif status == 401:
        text = f"the Hub does not accept the token for {repo_id}: {TOKEN_HELP}"
    elif status == 403:
        text = f"no right to write to {repo_id}: {reason}; use a token with write access"
    elif status in (402, 413, 507):
        text = f"{repo_id} is too large for the Hub: {reason}"
    elif status is not None:
        text = f"the Hub refuses {repo_id}: {reason}"
    else:
        raise error
    raise ValueError(text) from None
