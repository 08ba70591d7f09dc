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
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from . import files

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


def saving(folder: Path, variant: str | None) -> AbstractContextManager[Path]:
    """Where to write a checkpoint; see `files.replacing_files`. The index comes last."""
    return files.replacing_files(
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
    """Write the files that travel, and the `pipeline.py` by which diffusers comes to them.

    They lie in a folder named after their content: the loader gives the code of all local
    checkpoints one namespace, and two versions in one process would run each other's.
    """
    sources = {p.stem: p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))}
    digest = hashlib.sha256(b"".join(sources.values())).hexdigest()[:12]
    package = f"ddpm_hf_{digest}"
    (folder / package).mkdir()
    for name, source in sources.items():
        (folder / package / f"{name}.py").write_bytes(source)
    door = [
        '"""Loaded by diffusers with custom_pipeline= and trust_remote_code=True."""\n',
        f"from .{package}.pipeline import GaussianDDPMPipeline\n",
        "# The loader copies only the files that this one names.",
        *(f"from .{package}.{name} import __doc__ as _" for name in sources),
        '\n__all__ = ["GaussianDDPMPipeline"]',
        # The loader copies every pipeline.py to one place, and Python takes compiled code for
        # current if the source has the same size and second: another version, another size.
        f"# {'.' * (int(digest, 16) % 4000)}\n",
    ]
    (folder / "pipeline.py").write_text("\n".join(door), "utf-8")


def upload(folder: Path, repo_id: str, prefix: str = "", **commit: Any) -> Any:
    """Upload a folder in one commit, so that no reader finds half a model.

    What an earlier upload left of the same weights goes in the same commit. `upload_folder` of
    huggingface_hub 2.4 splits large uploads into several commits.

    Args:
        folder: all files in it are uploaded, but no README.md where the repository has one:
            whoever wrote that, it stays.
        repo_id: an existing repository.
        prefix: folder in the repository, with "/" at its end.
        **commit: `token`, `commit_message`, `create_pr`.
    """
    api = HfApi(token=commit.pop("token"))
    head = api.model_info(repo_id)
    files = {prefix + p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    if any(file.rfilename == "README.md" for file in head.siblings or []):
        files.pop("README.md", None)
    added = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    # Weights in one file would lose against the index of an earlier upload in several.
    variants = {_variant_of(Path(name).name) for name in files} - {"no weights"}
    others = {file.rfilename for file in head.siblings or []} - set(files)
    stale = [
        CommitOperationDelete(name)
        for name in sorted(others)
        if (name.startswith(f"{prefix}unet/") and _variant_of(Path(name).name) in variants)
        or fnmatchcase(name, f"{prefix}ddpm_hf_*/*.py")
    ]
    return api.create_commit(repo_id, [*added, *stale], parent_commit=head.sha, **commit)


def holds_only_pickles(source: str | os.PathLike[str], error: OSError) -> bool:
    """Whether loading failed because the weights of a folder or repository are all `.bin` files."""
    folder = Path(source)
    if folder.is_dir():
        return any(folder.rglob("*.bin")) and not any(folder.rglob("*.safetensors"))
    return "Could not find the necessary `safetensors` weights" in str(error)
