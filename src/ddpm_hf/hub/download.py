"""From the name of a model to its folder: on this machine, or downloaded from the Hub."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.hub.model_files import has_weights, loaded_files, refuse_links, scheduler_class
from ddpm_hf.hub.retry import WAITS_S, retry
from ddpm_hf.paths import model_of_run
from ddpm_hf.utils.connection import HubError, check_connection

_logger = logging.getLogger(__name__)
_Copies = dict[tuple[str, str | None, bool], Path]
_COPIES: ContextVar[_Copies] = ContextVar("copies")


@contextmanager
def downloading_once() -> Iterator[None]:
    """Context manager: in the block, `fetch` asks the Hub once for each repository.

    So all files of a repository are of one commit, even if a new one is pushed meanwhile.
    """
    token = _COPIES.set({})
    try:
        yield
    finally:
        _COPIES.reset(token)


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    use_safetensors: bool = True,
) -> Path:
    """Folder of a checkpoint: the local folder `name`, or the copy of a repository in the cache.

    Raises:
        ValueError: if neither exists, or the folder contains links to files outside.
        HubError: if the Hub fails and the cache has no copy.
    """
    given = Path(name).expanduser()
    folder = model_of_run(given)
    if folder != given:
        warnings.warn(f"{name} is a training run: its model is {folder}", stacklevel=3)
    if name and folder.is_dir():
        patterns = loaded_files("safetensors" if use_safetensors else "*")
        refuse_links(folder, (path for pattern in patterns for path in folder.glob(pattern)))
        return folder
    if folder.is_file():
        raise ValueError(f"{name} is a file; pass the folder of the checkpoint")
    copies, key = _COPIES.get({}), (name, revision, use_safetensors)
    if key not in copies:
        copies[key] = _download(name, revision, token, use_safetensors)
    return copies[key]


def _download(repo_id: str, revision: str | None, token: str | None, use_safetensors: bool) -> Path:
    """The copy of a repository in the cache, up to date if there is a connection."""

    def snapshot(weights: str, *, is_offline: bool) -> Path:
        copy = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=loaded_files(weights),  # of other files the cache may lack some
            local_files_only=is_offline,
        )
        return Path(copy)

    def current_copy(weights: str) -> Path:
        copy = snapshot(weights, is_offline=False)
        if not has_weights(copy, weights):
            # If the Hub does not answer, the client returns an incomplete copy from the cache (only
            # a README, for example). A second request raises the reason.
            HfApi(token=token).model_info(repo_id, revision=revision)
        return copy

    check_repo_id(repo_id, may_be_folder=True)
    try:
        check_connection(repo_id)
    except HubError as error:
        # The client would repeat each request for half a minute before it turns to its cache.
        for weights in ("safetensors",) if use_safetensors else ("safetensors", "bin"):
            with suppress(LocalEntryNotFoundError):
                if has_weights(copy := snapshot(weights, is_offline=True), weights):
                    _logger.warning("%s; the copy in the cache is used", error)
                    return copy
        raise HubError(f"{error}, and the cache has no copy") from None
    _refuse_other_pipeline(repo_id, revision, token)
    copy = retry(lambda: current_copy("safetensors"), repo_id, WAITS_S)
    if not use_safetensors and not has_weights(copy, "safetensors"):
        copy = retry(lambda: current_copy("bin"), repo_id, WAITS_S)
    return copy


def _refuse_other_pipeline(repo_id: str, revision: str | None, token: str | None) -> None:
    """Raise ValueError for another kind of pipeline, before its weights are downloaded."""

    def index() -> Path | None:
        with suppress(EntryNotFoundError):  # a missing index is reported after the download
            file = hf_hub_download(repo_id, "model_index.json", revision=revision, token=token)
            return Path(file)
        return None

    if path := retry(index, repo_id, WAITS_S):
        scheduler_class(path.parent, repo_id)


def check_repo_id(repo_id: str, *, may_be_folder: bool = False) -> None:
    """Raise ValueError for an invalid repository name.

    Args:
        repo_id: the name; must have an owner unless `may_be_folder`.
        may_be_folder: whether the user may have meant a local folder.
    """
    problem = "neither a local folder nor" if may_be_folder else "not"
    try:
        validate_repo_id(repo_id)
        if may_be_folder or "/" in repo_id:
            return
    except HFValidationError:
        pass
    raise ValueError(f"{repo_id!r} is {problem} the name of a repository on the Hub (user/name)")
