"""Files of a model: which ones are loaded, and their checks before anything is built from them.

Checks of links, of the index and of sizes on disk need no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from ddpm_hf.diffusion.atomic_files import check_regular, read_json
from ddpm_hf.diffusion.config_extension import GAUSSIAN_SCHEDULER
from ddpm_hf.paths import EMA_WEIGHTS, ModelPaths, not_a_model, run_of_checkpoint

if TYPE_CHECKING:
    import torch

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "GaussianDDPMPipeline")
OUR_SCHEDULERS = ("DDPMScheduler", GAUSSIAN_SCHEDULER)
"""Classes that are loaded as a `GaussianDDPMScheduler`."""


@dataclass(frozen=True)
class ModelFiles:
    """Checked files of a model.

    Attributes:
        unet: folder of the network.
        is_safe: whether its weights are safetensors; otherwise they are pickled.
        scheduler: folder of scheduler_config.json.
        scheduler_class: class name of the scheduler.
        averages: weights of a training checkpoint, which replace those of the network.
    """

    unet: Path
    is_safe: bool
    scheduler: Path
    scheduler_class: str
    averages: Path | None


def loaded_files(weights: str) -> list[str]:
    """Patterns of the files to load, with one file type of weights and without code."""
    names = ["*config.json", "diffusion_pytorch_model*.json", f"diffusion_pytorch_model*.{weights}"]
    folders = ("", "unet/", "scheduler/")  # old repositories have no folders
    return [
        "model_index.json",
        "training.json",
        *(folder + name for folder in folders for name in names),
    ]


def has_weights(folder: Path, weights: str) -> bool:
    """Whether a model has weights of a file type, such as "safetensors"."""
    return any(folder.glob(f"*.{weights}")) or any(folder.glob(f"unet/*.{weights}"))


def refuse_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raise ValueError for a link to a file outside, or for a pipe, device or folder.

    Links in the cache of huggingface_hub are allowed.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for path in paths:
        real = path.resolve()
        if real != root / path.relative_to(folder) and real.parent != blobs:
            raise ValueError(f"{path} is a link to a file outside the folder; copy the file there")
        check_regular(path)


def _refuse_pointers(folder: Path) -> None:
    """Raise ValueError for a Git LFS pointer, which `git clone` may leave in place of weights."""
    for path in filter(Path.is_file, folder.glob("diffusion_pytorch_model*")):
        with path.open("rb") as file:
            if file.read(50).startswith(b"version https://git-lfs."):
                raise ValueError(
                    f"{path} is a Git LFS pointer to the weights: run `git lfs pull` in the folder"
                    " of the repository"
                )


def count_parameters(folder: Path) -> int:
    """Number of elements of the safetensors weights in a folder, those of one variant."""
    sizes: dict[str, int] = {}  # by name, because variants have the same names
    for path in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names = weights.keys()
            sizes |= {name: math.prod(weights.get_slice(name).get_shape()) for name in names}
    return sum(sizes.values())


def scheduler_class(folder: Path, name: str) -> str:
    """Class name of the scheduler in `model_index.json`.

    A stock `DDPMPipeline` saves a `GaussianDDPMScheduler` under the name of our module; all other
    components must be classes of diffusers.

    Raises:
        ValueError: if the index is missing or describes another kind of pipeline.
    """
    index = read_json(ModelPaths(folder).index)
    if not index:
        raise ValueError(not_a_model(folder, name))
    kind, parts = index.get("_class_name"), {k: v for k, v in index.items() if k[0] != "_"}
    if parts.get("scheduler") == ["ddpm_hf.diffusion.scheduling", GAUSSIAN_SCHEDULER]:
        parts["scheduler"] = ["diffusers", GAUSSIAN_SCHEDULER]
    known = (isinstance(part, list) and part[:1] == ["diffusers"] for part in parts.values())
    if isinstance(kind, list) or not all(known):
        raise ValueError(
            f"{name} requires code of its own, which this function never runs: read the code, then "
            "use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
        )
    if kind not in PIPELINES or parts.get("unet") != ["diffusers", "UNet2DModel"]:
        raise ValueError(
            f"{name} must contain a UNet2DModel and one of {', '.join(PIPELINES)}, got a {kind}"
        )
    return str(parts.get("scheduler", [None, None])[-1])


def check_model(
    folder: Path, name: str, dtype: "torch.dtype", variant: str | None, use_safetensors: bool
) -> ModelFiles:
    """Check the files of a pipeline, or of a training checkpoint and the model of its run.

    Args:
        folder: result of `fetch`.
        name: name of the checkpoint in messages.
        dtype: dtype of the weights in memory.
        variant, use_safetensors: as for `load`.
    Raises:
        ValueError: if files are missing, too large, or of another kind of model.
    """
    from ddpm_hf.diffusion.checkpoint_limits import check_scheduler_config, component_folder
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    averages = None
    if run := run_of_checkpoint(folder):
        if not run.model.index.is_file():
            raise ValueError(
                f"{name} is a training checkpoint, which is loaded with the network in"
                f" {run.model.root}, but that folder is missing: resume the run"
            )
        folder, averages = run.model.root, folder / EMA_WEIGHTS
    kind = scheduler_class(folder, name)
    unet, scheduler = component_folder(folder, "unet"), component_folder(folder, "scheduler")
    check_scheduler_config(scheduler / "scheduler_config.json")
    if kind not in (*OUR_SCHEDULERS, *GaussianDDPMScheduler._compatibles):
        raise ValueError(
            f"{name} has a {kind}, which does not sample from a DDPM; use a checkpoint with a "
            "scheduler compatible with DDPMScheduler"
        )
    is_safe = check_network(unet, name, dtype, variant, use_safetensors)
    return ModelFiles(unet, is_safe, scheduler, kind, averages)


def check_network(
    folder: Path, name: str, dtype: "torch.dtype", variant: str | None, use_safetensors: bool
) -> bool:
    """Check the files of a network; see `check_model`.

    Returns:
        whether the weights are safetensors; otherwise they are pickled.
    Raises:
        ValueError: for missing or refused weights, and for a network that does not fit into memory
            or has many more parameters than the weights.
    """
    from ddpm_hf.diffusion.checkpoint_limits import check_unet_config
    from ddpm_hf.diffusion.portable_checkpoint import weight_variants

    _refuse_pointers(folder)
    is_safe = any(folder.glob("*.safetensors"))
    is_local = Path(name).expanduser().exists()  # pickled weights of the Hub are not downloaded
    if is_local and not is_safe and not any(folder.glob("*.bin")):
        raise ValueError(f"{name} has no weights: it contains no .safetensors file")
    if use_safetensors and not is_safe:
        raise ValueError(
            f"{name} has no safetensors weights. Old repositories have pickled weights (.bin), a "
            "format that can run code; if you trust the author, pass `use_safetensors=False` and "
            "save the pipeline, which writes safetensors"
        )
    variants = weight_variants(folder)
    if variants and variant not in variants:
        choices = [f"pass `variant` {known!r}" for known in sorted(filter(None, variants))]
        choices += ["leave out `variant`"] * (None in variants)
        missing = f"`variant` {variant!r}" if variant else "weights without a variant"
        raise ValueError(f"{name} has no {missing}: {' or '.join(choices)}")
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{name} has no config.json of its network")
    num_parameters = check_unet_config(config, f"config.json of {name}", dtype)
    if is_safe and num_parameters > 2 * (num_stored := count_parameters(folder)):
        raise ValueError(
            f"the weights of {name} do not fit its config.json: {num_stored:,} of"
            f" {num_parameters:,} parameters"
        )
    return is_safe
