"""Files of a checkpoint that may be uploaded: an allow-list, and checks before the upload."""

import json
from pathlib import Path

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.config_extension import GAUSSIAN_SCHEDULER
from ddpm_hf.diffusion.portable_checkpoint import is_finite
from ddpm_hf.hub.card import SharedCard, card_to_share
from ddpm_hf.hub.card_update import metadata_of
from ddpm_hf.hub.model_files import refuse_links, scheduler_class
from ddpm_hf.hub.secrets import find_leak

UNET_CONFIG, SCHEDULER_CONFIG = "unet/config.json", "scheduler/scheduler_config.json"
# A push deletes files on the Hub that match these patterns and that it does not upload.
REPLACED_FILES = (
    "unet/diffusion_pytorch_model*.safetensors",
    "unet/diffusion_pytorch_model*.json",
    "ddpm_hf_*/*.py",
)
PUBLISHED_FILES = (
    *REPLACED_FILES,
    *("model_index.json", UNET_CONFIG, SCHEDULER_CONFIG, "pipeline.py"),
    *("README.md", "LICENSE*", "training.json", "recipe.yaml", "metrics.jsonl", "*.png"),
)
"""Patterns of the files that are uploaded; no other file is."""
Files = dict[str, Path | bytes]
"""Files to upload, by path in the repository."""


def prepare(folder: Path, repo_id: str) -> Files:
    """The files to upload without the card, after all checks that need no connection.

    Raises:
        ValueError: if the folder is not a checkpoint, is incomplete or damaged, has weights that
            are not finite, links, a secret or a local path.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if scheduler_class(folder, str(folder)) == GAUSSIAN_SCHEDULER:
        raise ValueError(
            f"{folder} was saved by a pipeline of diffusers and loads only where ddpm_hf is"
            " installed: save it with ddpm_hf.load(...).save_pretrained(...)"
        )
    files: Files = {path.relative_to(folder).as_posix(): path for path in published_files(folder)}
    _check_weights(folder, list(files))
    files.pop("README.md", None)
    checked_card(folder, repo_id)
    for name in (UNET_CONFIG, SCHEDULER_CONFIG):
        config = read_json(folder / name)
        if config.pop("_name_or_path", None):  # diffusers writes where it was loaded from
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
    for name, content in files.items():
        _refuse_leaks(name, content)
    return files


def published_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that may be uploaded; ValueError for a link."""
    files = {path for pattern in PUBLISHED_FILES for path in folder.glob(pattern) if path.is_file()}
    refuse_links(folder, files)
    return sorted(files)


def checked_card(
    folder: Path,
    repo_id: str,
    remote: str | None = None,
    license: str | None = None,
    space: str | None = None,
) -> SharedCard:
    """The card to upload; see `card_to_share`."""
    card = card_to_share(folder, repo_id, remote, license, space)
    if not card.is_from_hub:  # that text is on the Hub already
        _refuse_leaks("README.md", card.text.encode())
        metadata_of(card.text)
    return card


def _check_weights(folder: Path, names: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    weights = [name for name in names if name.endswith(".safetensors")]
    for required in (UNET_CONFIG, SCHEDULER_CONFIG):
        if required not in names:
            raise ValueError(f"{folder} is not a complete checkpoint: no {required}")
    if not weights:
        raise ValueError(f"{folder} has no safetensors weights; save_pretrained(...) writes them")
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as file:
                finite = {key: is_finite(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None
        if not all(finite.values()):
            weight = next(key for key in finite if not finite[key])
            raise ValueError(f"weight {weight} in {folder / name} is not finite")


def _refuse_leaks(name: str, content: Path | bytes) -> None:
    if name.endswith((".safetensors", ".png")):
        return
    data = content if isinstance(content, bytes) else content.read_bytes()
    if leak := find_leak(data.decode(errors="replace"), paths=not name.endswith(".py")):
        raise ValueError(f"{name} contains {leak}: remove it before you share the model")
