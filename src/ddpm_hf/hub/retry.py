"""Failures of the Hub: which ones pass and are tried again, and what a person is told of the rest.

huggingface_hub (2.4) retries the upload of large files by itself, but not the creation of a
repository, the commit, or a download whose connection breaks. Repeating those is safe: a commit
that had gone through, though its answer was lost, makes the next one a no-op.
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

T = TypeVar("T")
WAITS_S: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0)
LONGEST_WAIT_S = 60.0  # whatever the server asks for
TOKEN_HELP = "run `hf auth login` or set HF_TOKEN (https://huggingface.co/settings/tokens)"

_logger = logging.getLogger(__name__)


class HubError(OSError):
    """The Hub could not be reached, or kept failing. Trying again later may help."""


def retry(
    action: Callable[[], T],
    repo_id: str,
    waits_s: Sequence[float],
    *,
    stop: threading.Event | None = None,
    repeat_unanswered: bool = True,
) -> T:
    """`action()`, repeated after failures that pass. What remains becomes one clear line.

    Args:
        action: what to do; must be safe to repeat.
        repo_id: named in errors.
        waits_s: seconds before each further attempt, spread by a quarter.
        stop: ends the waiting when it is set.
        repeat_unanswered: False if a lost answer makes repeating unsafe.
    Raises:
        ValueError: if what the user gave cannot work.
        HubError: if the Hub, or the way to it, still failed at the last attempt.
    """
    stop = stop or threading.Event()
    waits = list(waits_s)
    while True:
        try:
            return action()
        except Exception as error:
            if not is_temporary(error):
                _raise_explained(error, repo_id)
            unsafe = _status(error) is None and not repeat_unanswered
            wait_s = None if unsafe or not waits else _delay_s(error, waits.pop(0))
            reason = _reason(error)
            if wait_s is None or stop.is_set():
                raise HubError(f"the Hub failed for {repo_id}: {reason}") from error
            _logger.warning("%s: %s; trying again in %.1f s", repo_id, reason, wait_s)
            stop.wait(wait_s)


def is_temporary(error: BaseException) -> bool:
    """Whether it is a broken connection, a busy server, or a commit in between (409, 412)."""
    status = _status(error)
    if status is not None:
        return (status >= 500 and status != 507) or status in (408, 409, 412, 429)
    if _is_offline(error):
        return False
    # ConnectionError is what the Xet client raises; a proxy's page in place of JSON comes with no
    # status from some calls.
    kinds = (httpx.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return any(isinstance(e, kinds) for e in _chain(error))


def _is_offline(error: BaseException) -> bool:
    return any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error))


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and its causes: the client wraps some."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _http_error(error: BaseException) -> HfHubHTTPError | None:
    return next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)


def _status(error: BaseException) -> int | None:
    http_error = _http_error(error)
    return http_error.response.status_code if http_error else None


def _delay_s(error: BaseException, wait_s: float) -> float:
    """At least what the server asks for; spread, so that many clients do not return together."""
    http_error = _http_error(error)
    asked = http_error.response.headers.get("Retry-After", "") if http_error else ""
    least = min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else 0.0
    return max(wait_s * random.uniform(0.75, 1.25), least)


def _reason(error: BaseException) -> str:
    """The server's own words, or the root of the failure."""
    http_error = _http_error(error)
    if http_error:
        said = http_error.server_message or "no reason given"
        return shorten(f"{said} (HTTP {http_error.response.status_code})")
    root = _chain(error)[-1]
    return shorten(f"{type(root).__name__}: {root}")


def shorten(text: str, length: int = 300) -> str:
    """`text` on one line, cut to `length`, without tokens."""
    text = hide_tokens(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 3] + "..."


def _raise_explained(error: Exception, repo_id: str) -> None:
    """Raise what a person needs to know about a failure that repeating does not cure."""
    status, reason, cause = _status(error), _reason(error), _http_error(error)
    if _is_offline(error):
        text = f"HF_HUB_OFFLINE is set and there is no whole copy of {repo_id} in the cache"
    elif isinstance(cause, GatedRepoError):
        text = f"{repo_id} is gated: ask for access on its page, then {TOKEN_HELP}"
    elif isinstance(cause, RevisionNotFoundError):
        text = f"{repo_id} has no such revision: {reason}"
    elif isinstance(cause, RepositoryNotFoundError):
        text = f"{repo_id} is not on the Hub, or is private: check the name, or {TOKEN_HELP}"
    elif status == 401:
        text = f"the Hub does not accept the token for {repo_id}: {TOKEN_HELP}"
    elif status == 403:
        text = f"no right to write to {repo_id}: {reason}; use a token that may write there"
    elif status in (402, 413, 507):
        text = f"{repo_id} is too large for the Hub: {reason}"
    elif status is not None:
        text = f"the Hub refuses {repo_id}: {reason}"
    else:
        raise error
    raise ValueError(text) from error
