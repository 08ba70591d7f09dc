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
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

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


@contextmanager
def replacing(folder: Path, variant: str | None) -> Iterator[Path]:
    """A staging folder whose files take their places in `folder` once all of them are on disk.

    A new folder appears by one rename. In an existing one each file is replaced by a rename, the
    index last, so that no file is ever half-written, and files of others stay. After an error while
    writing `folder` is as before.
    """
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of one length, for a name of 255 bytes; of one name, so that the next save clears it away.
    name = f".saving-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:8]}"
    staging = (folder.parent if is_new else folder) / name
    shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left it
    staging.mkdir()
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        if is_new:
            staging.rename(folder)
            sync(folder.parent)
        else:
            _move_files(staging, folder, variant)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_files(staging: Path, folder: Path, variant: str | None) -> None:
    files = [p.relative_to(staging) for p in staging.rglob("*") if p.is_file()]
    for file in sorted(files, key=lambda p: (p.name == "model_index.json", p)):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(staging / file, folder / file)
    for stale in _stale(folder, variant):
        if stale.relative_to(folder) not in files:
            stale.unlink()
            with suppress(OSError):  # a folder that is not empty stays
                stale.parent.rmdir()
    for path in {folder, *((folder / file).parent for file in files)}:
        sync(path)


def _stale(folder: Path, variant: str | None) -> list[Path]:
    """Weights (of this variant) and source files, which an earlier save may have left."""
    weights = (path for path in (folder / "unet").iterdir() if _variant_of(path.name) == variant)
    return [*folder.glob("ddpm_hf_*/*.py"), *weights]


def _variant_of(file_name: str) -> str | None:
    """The variant that a file of weights belongs to, None for the plain one; "no weights" else."""
    found = _WEIGHTS.fullmatch(file_name)
    return found["variant"] or found["of_index"] if found else "no weights"


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    with suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
