"""Creation and update of the Space of a model, in one commit."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_hf.hub.retry import retry
from ddpm_hf.hub.space_files import APP, CARD, space_files
from ddpm_hf.text import how_to_install


def check_gradio() -> None:
    """Raise ValueError without the extra, whose version a Space pins."""
    if find_spec("gradio") is None:
        raise ValueError(f"`space` needs the extra `app`: {how_to_install('app')}")


def push_space(
    space_id: str, model_id: str, *, public: bool, token: str | None, waits_s: Sequence[float]
) -> str:
    """Create or update the Space that serves a model.

    Args:
        space_id: "user/name"; created if it does not exist.
        model_id: name of the model on the Hub.
        public: make a new Space public. Does not change an existing one.
        token: by default that of `hf auth login` or HF_TOKEN.
        waits_s: seconds before each retry.
    Returns:
        address of the Space.
    Raises:
        ValueError: if the Space contains another application.
        HubError: if the Hub fails after all retries.
    """
    api = HfApi(token=token, library_name="ddpm_hf")
    retry(lambda: _commit(api, space_id, model_id, public), space_id, waits_s)
    return f"{api.endpoint}/spaces/{space_id}"


def _commit(api: HfApi, space_id: str, model_id: str, public: bool) -> None:
    try:
        head = api.space_info(space_id)
    except RepositoryNotFoundError:
        api.create_repo(
            space_id, repo_type="space", space_sdk="gradio", private=not public, exist_ok=True
        )
        head = api.space_info(space_id)
    present = {file.rfilename for file in head.siblings or []}
    _refuse_other_app(api, space_id, present, head.sha)
    card = None
    if CARD in present and APP in present:
        path = api.hf_hub_download(space_id, CARD, repo_type="space", revision=head.sha)
        card = Path(path).read_text("utf-8")
    files = space_files(space_id, model_id, card)
    stale = {name for name in present - set(files) if name.startswith("ddpm_hf/")}
    api.create_commit(
        space_id,
        [
            *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ],
        commit_message=f"Serve {model_id}",
        repo_type="space",
        parent_commit=head.sha,
    )


def _refuse_other_app(api: HfApi, space_id: str, present: set[str], revision: str | None) -> None:
    if APP not in present:
        return
    path = api.hf_hub_download(space_id, APP, repo_type="space", revision=revision)
    if "from ddpm_hf.app" not in Path(path).read_text("utf-8", errors="replace"):
        raise ValueError(f"{space_id} contains another application: choose another name")
