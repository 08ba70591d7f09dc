# SPDX-License-Identifier: Apache-2.0
"""Files of a portable checkpoint: written atomically, with a copy of this source folder.

model_index.json                 index for stock diffusers
pipeline.py                      loaded by `custom_pipeline=`; imports the files below
ddpm_hf_<hash>/*.py              copy of the folder of this file
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

from . import atomic_files

_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|diffusion_pytorch_model\.(safetensors|bin)\.index(\.(?P<index_variant>\w+))?\.json"
)
_NOT_WEIGHTS = "not weights"


def checked_folder(save_directory: str | os.PathLike[str]) -> Path:
    """Absolute path of the folder to save to.

    Raises:
        ValueError: for an empty path, a file, or a symbolic link.
    """
    if not os.fspath(save_directory):
        raise ValueError("`save_directory` must be the path of a folder, got an empty string")
    folder = Path(save_directory)
    for path in (folder, folder / "unet", folder / "scheduler", *folder.glob("ddpm_hf_*")):
        if path.is_symlink():
            raise ValueError(
                f"`save_directory` must not contain symbolic links, got {path}; pass the folder "
                "that it points to"
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"`save_directory` must be a folder, but {path} is a file")
    return folder.absolute()


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are finite; true for integers and for weights without data."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    # torch has no isfinite for float8.
    return bool((weight.float() if weight.itemsize == 1 else weight).isfinite().all())


def check_finite(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that all weights are finite.

    Args:
        weights: weights by name.
        source: name of the checkpoint in the message.
    Raises:
        ValueError: naming the first weight that is not finite.
    """
    for name, weight in weights.items():
        if not is_finite(weight):
            raise ValueError(f"weight {name} of {source} is not finite")


def move_into_memory(model: torch.nn.Module) -> None:
    """Copy memory-mapped weights to memory that torch allocates.

    Matrix products round differently for differently aligned operands, so that a mapped network
    differed by 1e-7 from the saved one; and truncation of the mapped file ended the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def saving(folder: Path, variant: str | None) -> AbstractContextManager[Path]:
    """Staging folder for a checkpoint, see `atomic_files.replacing_files`; the index comes last."""
    return atomic_files.replacing_files(
        folder, last="model_index.json", stale=lambda: _stale_files(folder, variant)
    )


def _stale_files(folder: Path, variant: str | None) -> list[Path]:
    """Weights of this variant and source files of an earlier save."""
    weights = (path for path in (folder / "unet").iterdir() if _variant_of(path.name) == variant)
    return [*folder.glob("ddpm_hf_*/*.py"), *weights]


def weight_variants(folder: Path) -> set[str | None]:
    """Variants of the weights in a folder; None for weights without a variant."""
    return {_variant_of(path.name) for path in folder.iterdir()} - {_NOT_WEIGHTS}


def _variant_of(file_name: str) -> str | None:
    """Variant of a weight file, None without a variant; `_NOT_WEIGHTS` for other files."""
    match = _WEIGHTS.fullmatch(file_name)
    return match["variant"] or match["index_variant"] if match else _NOT_WEIGHTS


def remove_origin(config_file: Path) -> None:
    """Remove the path that the model was loaded from: it may be private."""
    config = json.loads(config_file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def write_source(folder: Path) -> None:
    """Write the source files, and the `pipeline.py` through which diffusers imports them.

    Their folder is named after a hash of their content, because the loader imports the code of all
    local checkpoints into one namespace, where two versions would replace each other.
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
        # The loader copies every pipeline.py to one place, and Python reuses compiled code if size
        # and modification second of the source are equal: each version has another size.
        f"# {'.' * (int(digest, 16) % 4000)}\n",
    ]
    (folder / "pipeline.py").write_text("\n".join(lines), "utf-8")


def upload(folder: Path, repo_id: str, prefix: str = "", **options: Any) -> Any:
    """Upload the files of a saved checkpoint in one commit; delete stale weights of its variant.

    The model card in the folder is uploaded only if the repository has none.

    Args:
        folder: all of its files are uploaded.
        repo_id: existing repository.
        prefix: folder in the repository with a final "/", or empty.
        **options: `token`, `commit_message`, `create_pr`.
    Returns:
        commit of huggingface_hub.
    """
    api = HfApi(token=options.pop("token"))
    files = {prefix + p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    variants = {_variant_of(Path(name).name) for name in files} - {_NOT_WEIGHTS}

    def is_stale(name: str) -> bool:
        # An index of an earlier upload in several files would win over weights in one file.
        is_weights = name.startswith(f"{prefix}unet/") and _variant_of(Path(name).name) in variants
        return is_weights or fnmatchcase(name, f"{prefix}ddpm_hf_*/*.py")

    path = files.pop("README.md", None)
    if path is None:
        return commit(api, repo_id, files, is_stale, None, **options)[0]
    text = path.read_text("utf-8")

    def card(remote: str | None) -> str:
        return text if remote is None else remote

    return commit(api, repo_id, files, is_stale, card, **options)[0]


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    is_stale: Callable[[str], bool],
    card: Callable[[str | None], str] | None,
    **options: Any,
) -> tuple[Any, Any]:
    """Make one commit on top of the current head, so that no reader sees a partial model.

    It fails if another commit is made in between. `upload_folder` of huggingface_hub 2.4 splits
    large uploads into several commits.

    Args:
        api: client.
        repo_id: existing repository.
        files: files to upload, by path in the repository.
        is_stale: whether to delete another file, by its path.
        card: function from the current text of README.md (None if there is none) to the new text.
        **options: keyword arguments of `HfApi.create_commit`.
    Returns:
        new commit and previous head, as objects of huggingface_hub.
    """
    head = api.model_info(repo_id, revision=options.get("revision"))
    present, files = {file.rfilename for file in head.siblings or []}, dict(files)
    if card is not None:
        remote = None
        if "README.md" in present:
            path = api.hf_hub_download(repo_id, "README.md", revision=head.sha)
            remote = Path(path).read_bytes().decode(errors="surrogateescape")
        files["README.md"] = card(remote).encode(errors="surrogateescape")
    added = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    stale = [CommitOperationDelete(name) for name in sorted(present - set(files)) if is_stale(name)]
    made = api.create_commit(repo_id, [*added, *stale], parent_commit=head.sha, **options)
    return made, head


def has_only_pickles(source: str | os.PathLike[str], error: OSError) -> bool:
    """Whether loading failed because all weights of a folder or repository are `.bin` files."""
    folder = Path(source)
    if folder.is_dir():
        return any(folder.rglob("*.bin")) and not any(folder.rglob("*.safetensors"))
    return "Could not find the necessary `safetensors` weights" in str(error)
