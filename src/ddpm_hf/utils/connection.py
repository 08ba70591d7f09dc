"""Connection to the Hub, checked before its clients repeat each request for half a minute.

Imports no torch.
"""

import os
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from ddpm_hf.utils.text import check_local_path, close_paths

CONNECTION_TIMEOUT_S = 5.0
RESTART_WAITS_S = (0.5, 1.0, 1.5, None)


class HubError(OSError):
    """The Hub could not be reached or kept failing; a later attempt may succeed."""


def check_endpoint() -> None:
    """Raise ValueError if HF_ENDPOINT is not the address of a website."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not endpoint.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"HF_ENDPOINT must start with https://, as in https://huggingface.co, got {endpoint!r}"
        )


def check_connection(repo_id: str) -> None:
    """Check that the Hub can be connected to, waiting a few seconds for one that restarts.

    Args:
        repo_id: repository, for the message.
    Raises:
        ValueError: if HF_ENDPOINT has no scheme.
        HubError: if there is no connection.
    """
    check_endpoint()
    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or url.scheme in getproxies():
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    for wait_s in RESTART_WAITS_S:
        try:
            socket.create_connection((url.hostname or "", port), CONNECTION_TIMEOUT_S).close()
            return
        except OSError as error:
            if wait_s is None or not isinstance(error, ConnectionRefusedError):
                text = f"no connection to {constants.ENDPOINT} for {repo_id}: {error}"
                raise HubError(text) from None
            time.sleep(wait_s)


def check_dataset(source: str) -> None:
    """Check the name of a dataset before torch is loaded.

    Raises:
        ValueError: for a local path that does not exist, and for a name that is neither a path nor
            a dataset which the Hub or the cache may have.
    """
    check_local_path(source)
    is_path = os.path.exists(os.path.expanduser(source))
    if source and not is_path and not any(mark in source for mark in ("://", *"*?[")):
        is_hub_reachable(source)


def is_hub_reachable(name: str) -> bool:
    """Whether there is a connection to the Hub for a dataset; without one, the cache has it.

    Args:
        name: name of the dataset.
    Raises:
        ValueError: if it is not the name of a dataset on the Hub, or there is neither a connection
            nor a copy in the cache of `datasets`.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{name!r} does not exist{close_paths(name)}")
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    try:
        check_connection(name)
    except HubError as error:
        problem = str(error)
    if problem and not _is_dataset_cached(name):
        raise ValueError(
            f"{name!r} is not a local path{close_paths(name)}; as a Hub dataset: {problem}, and the"
            " cache has no copy"
        )
    return not problem


def _is_dataset_cached(name: str) -> bool:
    import datasets  # takes a second
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(last)])
    return any(Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/*/*/*"))
