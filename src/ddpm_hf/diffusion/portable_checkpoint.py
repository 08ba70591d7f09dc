# SPDX-License-Identifier: Apache-2.0
"""The portable checkpoint on disk: written all or nothing, with the source files that travel in it.

model_index.json                 as stock diffusers reads it
pipeline.py                      what `custom_pipeline=` loads: imports the files below
ddpm_hf_<hash>/*.py              a copy of the folder that this file lies in
unet/, scheduler/                configurations and safetensors
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from . import atomic_files, checks

CardWriter = Callable[[str | None, Any], str]

_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|diffusion_pytorch_model\.(safetensors|bin)\.index(\.(?P<of_index>\w+))?\.json"
)


def checked_folder(save_directory: str | os.PathLike[str]) -> Path:
    """The folder to save to, absolute.

    Raises:
        ValueError: if the name is empty, is a file's, or a symbolic link would be followed.
    """
    if not os.fspath(save_directory):
        raise ValueError("save_directory is empty; pass the folder to write to")
    folder = Path(save_directory)
    for path in (folder, folder / "unet", folder / "scheduler", *folder.glob("ddpm_hf_*")):
        if path.is_symlink():
            raise ValueError(
                f"save_directory: {path} is a symbolic link, which is not followed; pass the "
                "folder that it points to"
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"save_directory: {path} is a file; pass a folder")
    return folder.absolute()


def check_finite(weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        ValueError: naming the first such weight.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"weight {name} of {what} holds values that are not finite")


def move_into_memory(model: torch.nn.Module) -> None:
    """Copy weights that still lie in their mapped file to where torch would have put them.

    A matrix product rounds by the alignment of its operands, so that a network used to differ by
    1e-7 from the one that was saved, and a file that was cut short ended the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def saving(folder: Path, variant: str | None) -> AbstractContextManager[Path]:
    """Where to write a checkpoint; see `atomic_files.replacing_files`. The index comes last."""
    return atomic_files.replacing_files(
        folder, last="model_index.json", stale=lambda: _stale(folder, variant)
    )


def _stale(folder: Path, variant: str | None) -> list[Path]:
    """Weights (of this variant) and source files, which an earlier save may have left."""
    weights = (path for path in (folder / "unet").iterdir() if _variant_of(path.name) == variant)
    return [*folder.glob("ddpm_hf_*/*.py"), *weights]


def weight_variants(folder: Path) -> set[str | None]:
    """Which variants of the weights a folder holds; None is the plain one."""
    return {_variant_of(path.name) for path in folder.iterdir()} - {"no weights"}


def _variant_of(file_name: str) -> str | None:
    """The variant that a file of weights belongs to, None for the plain one; "no weights" else."""
    found = _WEIGHTS.fullmatch(file_name)
    return found["variant"] or found["of_index"] if found else "no weights"


def forget_origin(config_file: Path) -> None:
    """Drop where the model was loaded from: a path that is private and means nothing elsewhere."""
    config = json.loads(config_file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def write_source(folder: Path) -> None:
    """Write the files that travel, and the `pipeline.py` through which diffusers imports them.

    They lie in a folder named after their content: the loader gives the code of all local
    checkpoints one namespace, and two versions in one process would run each other's.
    """
    sources = {p.stem: p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))}
    digest = hashlib.sha256(b"".join(sources.values())).hexdigest()[:12]
    package = f"ddpm_hf_{digest}"
    (folder / package).mkdir()
    for name, source in sources.items():
        (folder / package / f"{name}.py").write_bytes(source)
    lines = [
        '"""Loaded by diffusers with custom_pipeline= and trust_remote_code=True."""\n',
        f"from .{package}.pipeline import GaussianDDPMPipeline\n",
        "# The loader copies only the files that this one names.",
        *(f"from .{package}.{name} import __doc__ as _" for name in sources),
        '\n__all__ = ["GaussianDDPMPipeline"]',
        # The loader copies every pipeline.py to one place, and Python reuses compiled code if the
        # source has the same size and second, so another version gets another size.
        f"# {'.' * (int(digest, 16) % 4000)}\n",
    ]
    (folder / "pipeline.py").write_text("\n".join(lines), "utf-8")


def upload(folder: Path, repo_id: str, prefix: str = "", **options: Any) -> Any:
    """Upload what `save_pretrained` wrote, with a card; stale weights of its variant go.

    Args:
        folder: all files in it are uploaded.
        repo_id: an existing repository.
        prefix: folder in the repository, with "/" at its end; no card is written for one.
        **options: `token`, `commit_message`, `create_pr`.
    Returns:
        what huggingface_hub tells of the commit.
    """
    api = HfApi(token=options.pop("token"))
    files = {prefix + p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    variants = {_variant_of(Path(name).name) for name in files} - {"no weights"}

    def is_stale(name: str) -> bool:
        # Weights in one file would lose against the index of an earlier upload in several.
        is_weights = name.startswith(f"{prefix}unet/") and _variant_of(Path(name).name) in variants
        return is_weights or fnmatchcase(name, f"{prefix}ddpm_hf_*/*.py")

    template = files.pop("README.md", None)  # diffusers' own, of which nothing is filled in
    card = None if prefix or not template else _card_writer(api, folder, repo_id, template)
    return commit(api, repo_id, files, is_stale, card, **options)[0]


def _card_writer(api: HfApi, folder: Path, repo_id: str, template: Path) -> CardWriter:
    """The package's card, where it is installed; else that of diffusers, and none if there is one.

    What the repository knows of the training stands in its training.json, which an upload leaves.
    """
    lesser = template.read_text("utf-8")
    template.unlink()
    try:
        from ddpm_hf.hub.card import card_to_share
    except ImportError:  # this file travelled without the package
        return lambda remote, head: lesser if remote is None else remote

    def write(remote: str | None, head: Any) -> str:
        for file in {"training.json", "samples.png"} & {f.rfilename for f in head.siblings or []}:
            api.hf_hub_download(repo_id, file, revision=head.sha, local_dir=folder)
        try:
            return str(card_to_share(folder, repo_id, remote).text)
        except ValueError as error:  # of a broken training.json, say
            checks.warn(f"the model card could not be made: {error}")
            return lesser if remote is None else remote

    return write


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    is_stale: Callable[[str], bool],
    card: CardWriter | None,
    **options: Any,
) -> tuple[Any, Any]:
    """Make one commit on the head as it is now, so that no reader finds half a model.

    It fails if somebody else commits in between. `upload_folder` of huggingface_hub 2.4 splits
    large uploads into several commits.

    Args:
        api: the client.
        repo_id: an existing repository.
        files: what to upload, by path in the repository.
        is_stale: which of the other files to delete.
        card: called with the text of README.md there (None where there is none) and the head;
            returns the new text.
        **options: of `HfApi.create_commit`.
    Returns:
        what huggingface_hub tells of the commit, and of the head before.
    """
    head = api.model_info(repo_id, revision=options.get("revision"))
    present, files = {file.rfilename for file in head.siblings or []}, dict(files)
    if card is not None:
        remote = None
        if "README.md" in present:
            path = api.hf_hub_download(repo_id, "README.md", revision=head.sha)
            remote = Path(path).read_bytes().decode(errors="surrogateescape")
        files["README.md"] = card(remote, head).encode(errors="surrogateescape")
    added = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    stale = [CommitOperationDelete(name) for name in sorted(present - set(files)) if is_stale(name)]
    made = api.create_commit(repo_id, [*added, *stale], parent_commit=head.sha, **options)
    return made, head


def holds_only_pickles(source: str | os.PathLike[str], error: OSError) -> bool:
    """Whether loading failed because the weights of a folder or repository are all `.bin` files."""
    folder = Path(source)
    if folder.is_dir():
        return any(folder.rglob("*.bin")) and not any(folder.rglob("*.safetensors"))
    return "Could not find the necessary `safetensors` weights" in str(error)
