"""Opening checkpoints, of the Hub or in a folder, without ever running their code."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.config_extension import GAUSSIAN_SCHEDULER
from ddpm_hf.hub.retry import WAITS_S, retry, shorten
from ddpm_hf.paths import ModelPaths

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "GaussianDDPMPipeline")


def load(
    repo_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> "GaussianDDPMPipeline":
    """A pipeline from the Hub or from a folder: ours, or any other `DDPMPipeline`'s.

    Never runs code from the repository. Offline it loads what an earlier call left in the cache.

    Args:
        repo_or_path: a folder, or "user/name" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: for a private repository; by default that of `hf auth login` or HF_TOKEN.
        dtype: of the weights; torch.float32 by default, whatever they were saved in.
        variant: of the weights, such as "fp16", where a checkpoint has several.
        use_safetensors: False opens weights in pickled `.bin` files, which could carry code, where
            there are no others.
    Raises:
        ValueError: if there is no such checkpoint or revision, the token may not read it, it is of
            another kind, or its weights are incomplete or not finite.
        HubError: if the Hub fails and the cache has no copy.
    """
    name = os.fspath(repo_or_path)
    folder = fetch(name, revision=revision, token=token, use_safetensors=use_safetensors)
    return open_pipeline(
        folder, name, dtype=dtype, variant=variant, use_safetensors=use_safetensors
    )


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    use_safetensors: bool = True,
) -> Path:
    """The folder of a checkpoint: the one of that name, or the cache's copy of a repository.

    Raises:
        ValueError: if there is neither, or the folder holds links to other places.
        HubError: if the Hub fails and the cache has no copy.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        patterns = _loaded_files("safetensors" if use_safetensors else "*")
        refuse_links(folder, (path for pattern in patterns for path in folder.glob(pattern)))
        return folder
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder of the checkpoint")
    check_repo_id(name, may_be_folder=True)

    def download(weights: str) -> Path:
        patterns = _loaded_files(weights)
        found = snapshot_download(name, revision=revision, token=token, allow_patterns=patterns)
        if not _has_weights(Path(found), weights):
            # Without an answer from the Hub, the client returns whatever part of the repository is
            # in the cache (a README, say). Asking again raises the reason.
            HfApi(token=token).model_info(name, revision=revision)
        return Path(found)

    folder = retry(lambda: download("safetensors"), name, WAITS_S)
    if not use_safetensors and not _has_weights(folder, "safetensors"):
        folder = retry(lambda: download("bin"), name, WAITS_S)
    return folder


def _loaded_files(weights: str) -> list[str]:
    """The files that a pipeline is made of, with weights of one kind, and no code."""
    names = ["*config.json", "diffusion_pytorch_model*.json", f"diffusion_pytorch_model*.{weights}"]
    folders = ("", "unet/", "scheduler/")  # early repositories are flat
    return [
        "model_index.json",
        "training.json",
        *(folder + name for folder in folders for name in names),
    ]


def _has_weights(folder: Path, weights: str) -> bool:
    return any(folder.glob(f"*.{weights}")) or any(folder.glob(f"unet/*.{weights}"))


def scheduler_class(folder: Path, name: str) -> str:
    """The scheduler's class; ValueError unless the index is of a pipeline of our kind.

    All parts must be of diffusers, but for our scheduler, which a stock `DDPMPipeline` that was
    given one saves under its own name.
    """
    index = read_json(ModelPaths(folder).index)
    if not index:
        inner = folder / "model"
        hint = f"; did you mean {inner}?" if ModelPaths(inner).index.is_file() else ""
        raise ValueError(f"{name} is not a checkpoint of a pipeline: no model_index.json{hint}")
    kind, parts = index.get("_class_name"), {k: v for k, v in index.items() if k[0] != "_"}
    if parts.get("scheduler") == ["ddpm_hf.diffusion.scheduling", GAUSSIAN_SCHEDULER]:
        parts["scheduler"] = ["diffusers", GAUSSIAN_SCHEDULER]
    known = (isinstance(part, list) and part[:1] == ["diffusers"] for part in parts.values())
    if isinstance(kind, list) or not all(known):
        raise ValueError(
            f"{name} needs code of its own, which is never run here: read it, then use "
            "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
        )
    if kind not in PIPELINES or parts.get("unet") != ["diffusers", "UNet2DModel"]:
        raise ValueError(f"{name} holds a {kind}; only {PIPELINES} with a UNet2DModel work here")
    return str(parts.get("scheduler", [None, None])[-1])


def open_pipeline(
    folder: Path,
    name: str,
    *,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> "GaussianDDPMPipeline":
    """The pipeline in a folder that `fetch` gave.

    Args:
        folder: holds the checkpoint.
        name: what errors call it.
        dtype, variant, use_safetensors: as for `load`.
    Raises:
        ValueError: if it cannot be opened, or its weights are incomplete or not finite.
    """
    import diffusers

    from ddpm_hf.diffusion.checkpoint_limits import check_scheduler_config, component_folder
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    with _one_line_about(name):
        kind = scheduler_class(folder, name)
        check_scheduler_config(component_folder(folder, "scheduler") / "scheduler_config.json")
        ours = kind in ("DDPMScheduler", GAUSSIAN_SCHEDULER)
        if not ours and kind not in GaussianDDPMScheduler._compatibles:
            raise ValueError(f"{name} has a {kind}, which does not sample DDPMs")
        scheduler = GaussianDDPMScheduler if ours else getattr(diffusers, kind)
        unet = open_unet(
            component_folder(folder, "unet"),
            name,
            dtype=dtype,
            variant=variant,
            use_safetensors=use_safetensors,
        )
        image_facts(unet)
        path = component_folder(folder, "scheduler")
        return GaussianDDPMPipeline(unet, scheduler.from_pretrained(path))


def open_unet(
    folder: Path,
    name: str,
    *,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> "UNet2DModel":
    """The network whose configuration and weights lie in a folder; arguments and errors as above.

    Raises:
        ValueError: if it cannot be opened, or its weights are incomplete or not finite.
    """
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.checkpoint_limits import check_unet_config
    from ddpm_hf.diffusion.portable_checkpoint import (
        check_finite,
        move_into_memory,
        weight_variants,
    )

    is_safe = any(folder.glob("*.safetensors"))
    if use_safetensors and not is_safe:
        raise ValueError(
            f"{name} has no safetensors weights. Old repositories hold them in pickled .bin files, "
            "a format that can carry code; if you trust the author, load it once with "
            "use_safetensors=False and save_pretrained() it: that writes safetensors"
        )
    variants = weight_variants(folder)
    if variant is None and variants and None not in variants:
        found = " or ".join(f"variant={v!r}" for v in sorted(filter(None, variants)))
        raise ValueError(f"{name} has no weights without a variant: pass {found}")
    with _one_line_about(name):
        config = folder / "config.json"
        check_unet_config(read_json(config), f"config.json of {name}", dtype or torch.float32)
        # Where a file lacks weights, diffusers makes up random ones and only logs it.
        unet, report = UNet2DModel.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=is_safe,
            output_loading_info=True,
        )
    if wrong := {kind: keys for kind, keys in report.items() if keys}:
        raise ValueError(f"the weights of {name} do not fit its config.json: {shorten(str(wrong))}")
    check_finite(unet.state_dict(), name)
    move_into_memory(unet)
    return unet


@contextmanager
def _one_line_about(name: str) -> Iterator[None]:
    """Whatever the libraries raise about a damaged or foreign checkpoint, as one ValueError."""
    try:
        yield
    except ValueError:
        raise
    except (OSError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot be opened: {shorten(str(error))}") from error


def check_repo_id(repo_id: str, *, may_be_folder: bool = False) -> None:
    """Raise ValueError unless it can be the name of a repository; to push, with its owner."""
    wrong = "neither a folder here nor" if may_be_folder else "not"
    try:
        validate_repo_id(repo_id)
        if may_be_folder or "/" in repo_id:
            return
    except HFValidationError:
        pass
    raise ValueError(f"{repo_id!r} is {wrong} a name on the Hub (user/name)")


def refuse_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links, except those of huggingface_hub's cache, where every file is one."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for path in paths:
        real = path.resolve()
        if real != root / path.relative_to(folder) and real.parent != blobs:
            raise ValueError(f"{path} is a link to another place: put the file itself there")
