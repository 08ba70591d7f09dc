"""Files of a Space that serves a model: the page of `ddpm-hf app`."""

import json
import re
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

import ddpm_hf

APP, REQUIREMENTS, CARD = "app.py", "requirements.txt", "README.md"
# The decorator of this package gives a function a GPU on ZeroGPU hardware, and does nothing
# elsewhere.
SPACES = "spaces==0.51.3"
_PACKAGE = Path(ddpm_hf.__file__).parent
_APP = '''"""Page of the model {model}: the same as `ddpm-hf app {model}`."""

import spaces

from ddpm_hf.app.served_models import load_models
from ddpm_hf.app.server import start, wait

wait(start(load_models([{name}], hide_paths=True), gpu=spaces.GPU))
'''


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
