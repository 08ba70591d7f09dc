"""The Space that serves a model with the page of `ddpm-hf app`: its files, and their upload."""

import json
import re
from collections.abc import Sequence
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    SpaceCard,
    SpaceCardData,
)
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_hf.hub.retry import retry
from ddpm_hf.utils.text import how_to_install

APP, REQUIREMENTS, CARD = "app.py", "requirements.txt", "README.md"
# The decorator of this package gives a function a GPU on ZeroGPU hardware, and does nothing
# elsewhere.
SPACES = "spaces==0.51.3"
_PACKAGE = Path(__file__).parents[1]
_APP = '''"""Page of the model {model}: the same as `ddpm-hf app {model}`."""

import spaces

from ddpm_hf.app.served_models import load_models
from ddpm_hf.app.server import start, wait

wait(start(load_models([{name}], hide_paths=True), gpu=spaces.GPU))
'''


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


def space_files(space_id: str, model_id: str, card: str | None = None) -> dict[str, bytes]:
    """Contents of the files of a Space by path.

    Args:
        space_id: name of the Space, "user/name".
        model_id: name of the model.
        card: existing card, whose text and metadata are kept, except for the version of gradio.
    """
    texts = {
        CARD: space_card(space_id, model_id) if card is None else _renewed(card),
        APP: _APP.format(model=model_id, name=json.dumps(model_id)),
        REQUIREMENTS: "".join(f"{line}\n" for line in pinned_requirements()),
    }
    return {
        **{name: text.encode() for name, text in texts.items()},
        **{
            f"ddpm_hf/{path.relative_to(_PACKAGE).as_posix()}": path.read_bytes()
            for path in sorted(_PACKAGE.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        },
    }


def space_card(space_id: str, model_id: str) -> str:
    """README.md of a new Space."""
    title = model_id.rpartition("/")[2]
    data = SpaceCardData(
        title=title,
        emoji="\N{GAME DIE}",
        colorFrom="indigo",
        colorTo="pink",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file=APP,
        pinned=False,
        license="apache-2.0",
        models=[model_id],
        tags=["ddpm", "ddpm-hf", "diffusion"],
    )
    text = Path(__file__).with_name("space_template.md").read_text("utf-8")
    return f"---\n{data.to_yaml()}\n---\n\n{text.format(title=title, model=model_id)}"


def _renewed(card: str) -> str:
    space = SpaceCard(card)
    space.data["sdk_version"] = version("gradio")
    return str(space)


def pinned_requirements() -> list[str]:
    """Direct dependencies of the page, at the versions that are installed here."""
    needed = {text.partition(";")[::2] for text in requires("ddpm-hf") or []}
    names = {re.split(r"[^\w.-]", name)[0] for name, marker in needed if "extra" not in marker}
    pins = (f"{name}=={version(name).partition('+')[0]}" for name in names | {"gradio"})
    return sorted([*pins, SPACES])
