"""Loading of checkpoints from the Hub or a folder, without running their code."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddpm_hf.connection import HubError, check_connection, check_endpoint
from ddpm_hf.diffusion.atomic_files import check_regular, read_json
from ddpm_hf.diffusion.config_extension import GAUSSIAN_SCHEDULER
from ddpm_hf.hub.retry import WAITS_S, retry, shorten
from ddpm_hf.hub.stored_weights import count_parameters
from ddpm_hf.paths import (
    EMA_WEIGHTS,
    ModelPaths,
    RunPaths,
    model_of_run,
    not_a_model,
    run_of_checkpoint,
)

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline

_logger = logging.getLogger(__name__)
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "GaussianDDPMPipeline")


def load(
    repo_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
    torch_dtype: "torch.dtype | None" = None,
) -> "GaussianDDPMPipeline":
    """Pipeline of a checkpoint of this package or of any `DDPMPipeline`.

    Never runs code from the repository. Offline, it loads the copy in the cache.

    Args:
        repo_or_path: a folder, or "user/name" on the Hub. The folder of a training run stands for
            its model, and RUN/checkpoints/step-N for that model with the weights at step N.
        revision: branch, tag or commit on the Hub.
        token: token for a private repository; by default that of `hf auth login` or HF_TOKEN.
        dtype: dtype of the weights; by default torch.float32, whatever they were saved in.
        variant: variant of the weights, such as "fp16", if a checkpoint has several.
        use_safetensors: False also opens pickled `.bin` weights, which can run code, if there are
            no safetensors.
        torch_dtype: the same as `dtype`, by its name in older versions of diffusers.
    Raises:
        ValueError: if the checkpoint or revision does not exist or may not be read, has another
            kind of pipeline, or its weights are incomplete or not finite.
        HubError: if the Hub fails and the cache has no copy.
    """
    if torch_dtype is not None:
        if dtype not in (None, torch_dtype):
            raise ValueError(f"pass `dtype` or `torch_dtype`, got {dtype} and {torch_dtype}")
        dtype = torch_dtype
    if isinstance(dtype, str):
        raise TypeError(f"`dtype` must be a torch.dtype, such as torch.float16, got {dtype!r}")
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
    """Folder of a checkpoint: the local folder `name`, or the copy of a repository in the cache.

    Raises:
        ValueError: if neither exists, or the folder contains links to files outside.
        HubError: if the Hub fails and the cache has no copy.
    """
    given = Path(name).expanduser()
    folder = model_of_run(given)
    if folder != given:
        warnings.warn(f"{name} is a training run: its model is {folder}", stacklevel=3)
    if name and folder.is_dir():
        patterns = _loaded_files("safetensors" if use_safetensors else "*")
        refuse_links(folder, (path for pattern in patterns for path in folder.glob(pattern)))
        return folder
    if folder.is_file():
        raise ValueError(f"{name} is a file; pass the folder of the checkpoint")
    check_repo_id(name, may_be_folder=True)
    check_endpoint()
    try:
        check_connection(name)
    except HubError as error:
        # The client would repeat each request for half a minute before it turns to its cache.
        copy = _cached_copy(name, revision, use_safetensors)
        if copy is None:
            raise HubError(f"{error}, and the cache has no copy") from None
        _logger.warning("%s; the copy in the cache is used", error)
        return copy

    def download(weights: str) -> Path:
        patterns = _loaded_files(weights)
        copy = snapshot_download(name, revision=revision, token=token, allow_patterns=patterns)
        if not _has_weights(Path(copy), weights):
            # If the Hub does not answer, the client returns an incomplete copy from the cache (only
            # a README, for example). A second request raises the reason.
            HfApi(token=token).model_info(name, revision=revision)
        return Path(copy)

    folder = retry(lambda: download("safetensors"), name, WAITS_S)
    if not use_safetensors and not _has_weights(folder, "safetensors"):
        folder = retry(lambda: download("bin"), name, WAITS_S)
    return folder


def _cached_copy(name: str, revision: str | None, use_safetensors: bool) -> Path | None:
    """The copy of a repository in the cache, or None without its weights."""
    for weights in ("safetensors",) if use_safetensors else ("safetensors", "bin"):
        patterns = _loaded_files(weights)  # of other files the cache may lack some
        with suppress(LocalEntryNotFoundError):
            copy = snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=True
            )
            if _has_weights(Path(copy), weights):
                return Path(copy)
    return None


def _loaded_files(weights: str) -> list[str]:
    """Patterns of the files to load, with one file type of weights and without code."""
    names = ["*config.json", "diffusion_pytorch_model*.json", f"diffusion_pytorch_model*.{weights}"]
    folders = ("", "unet/", "scheduler/")  # old repositories have no folders
    return [
        "model_index.json",
        "training.json",
        *(folder + name for folder in folders for name in names),
    ]


def _has_weights(folder: Path, weights: str) -> bool:
    return any(folder.glob(f"*.{weights}")) or any(folder.glob(f"unet/*.{weights}"))


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


def open_pipeline(
    folder: Path,
    name: str,
    *,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> "GaussianDDPMPipeline":
    """Pipeline of a checkpoint folder.

    Args:
        folder: result of `fetch`.
        name: name of the checkpoint in messages.
        dtype, variant, use_safetensors: as for `load`.
    Raises:
        ValueError: if it cannot be loaded, or its weights are incomplete or not finite.
    """
    if run := run_of_checkpoint(folder):
        return _open_training_checkpoint(folder, run, name, dtype)

    import diffusers

    from ddpm_hf.diffusion.checkpoint_limits import check_scheduler_config, component_folder
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    with _one_line_errors(name):
        kind = scheduler_class(folder, name)
        check_scheduler_config(component_folder(folder, "scheduler") / "scheduler_config.json")
        ours = kind in ("DDPMScheduler", GAUSSIAN_SCHEDULER)
        if not ours and kind not in GaussianDDPMScheduler._compatibles:
            raise ValueError(
                f"{name} has a {kind}, which does not sample from a DDPM; use a checkpoint with a "
                "scheduler compatible with DDPMScheduler"
            )
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


def _open_training_checkpoint(
    folder: Path, run: RunPaths, name: str, dtype: "torch.dtype | None"
) -> "GaussianDDPMPipeline":
    """The model of a run with the averaged weights of one of its training checkpoints."""
    from safetensors.torch import load_file

    from ddpm_hf.diffusion.portable_checkpoint import check_finite

    if not run.model.index.is_file():
        raise ValueError(
            f"{name} is a training checkpoint, which is loaded with the network in {run.model.root}"
            ", but that folder is missing: resume the run"
        )
    pipeline = open_pipeline(run.model.root, name, dtype=dtype)
    weights = load_file(folder / EMA_WEIGHTS)
    check_finite(weights, name)
    # Checkpoints of compiled runs may have the parameter names of the compiled network.
    return with_weights(
        pipeline, {key.removeprefix("_orig_mod."): value for key, value in weights.items()}
    )


def with_weights(
    pipeline: "GaussianDDPMPipeline", weights: Mapping[str, "torch.Tensor"]
) -> "GaussianDDPMPipeline":
    """The pipeline with other weights, and without its calibration, which is that of the old ones.

    Args:
        pipeline: changed in place.
        weights: of the network, by name.
    """
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    pipeline.unet.load_state_dict(weights)
    pipeline.scheduler = GaussianDDPMScheduler.from_config(
        pipeline.scheduler.config, x_0_mse=None, calibrated_timesteps=None, recommended=None
    )
    return pipeline


def open_unet(
    folder: Path,
    name: str,
    *,
    dtype: "torch.dtype | None" = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> "UNet2DModel":
    """Network of a folder with its configuration and weights.

    Args:
        folder: folder of the network.
        name, dtype, variant, use_safetensors: as for `open_pipeline`.
    Raises:
        ValueError: if it cannot be loaded, or its weights are incomplete or not finite.
    """
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.portable_checkpoint import check_finite, move_into_memory

    is_safe = _has_safetensors(folder, name, use_safetensors)
    _check_variant(folder, name, variant)
    with _one_line_errors(name):
        _check_size(folder, name, dtype or torch.float32, is_safe)
        try:  # diffusers initialises missing weights at random and only logs it
            unet, report = UNet2DModel.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant,
                use_safetensors=is_safe,
                output_loading_info=True,
            )
            mismatches = str({kind: keys for kind, keys in report.items() if keys} or "")
        except ValueError as error:  # a weight of another shape, with advice for programmers
            mismatches = f"{error}".removeprefix("Cannot load  because ").partition(". If you")[0]
    if mismatches:
        raise ValueError(f"the weights of {name} do not fit its config.json: {shorten(mismatches)}")
    check_finite(unet.state_dict(), name)
    move_into_memory(unet)
    return unet


def _has_safetensors(folder: Path, name: str, use_safetensors: bool) -> bool:
    """Whether a folder has safetensors; raises ValueError for no weights and refused ones."""
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
    return is_safe


def _check_variant(folder: Path, name: str, variant: str | None) -> None:
    from ddpm_hf.diffusion.portable_checkpoint import weight_variants

    variants = weight_variants(folder)
    if variant is None and variants and None not in variants:
        known = " or ".join(repr(v) for v in sorted(filter(None, variants)))
        raise ValueError(f"{name} has only variants of its weights; pass `variant` {known}")


def _check_size(folder: Path, name: str, dtype: "torch.dtype", is_safe: bool) -> None:
    """Raise ValueError before a network is built that does not fit into memory or its weights."""
    from ddpm_hf.diffusion.checkpoint_limits import check_unet_config

    config = read_json(folder / "config.json")
    num_parameters = check_unet_config(config, f"config.json of {name}", dtype)
    if is_safe and num_parameters > 2 * (num_stored := count_parameters(folder)):
        raise ValueError(
            f"the weights of {name} do not fit its config.json: {num_stored:,} of"
            f" {num_parameters:,} parameters"
        )


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn errors of the libraries about a damaged or foreign checkpoint into one ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the libraries raise errors of every kind for foreign files
        from ddpm_hf.backend_settings import is_out_of_memory  # loads torch

        if is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be loaded: {shorten(reason)}") from None


def check_repo_id(repo_id: str, *, may_be_folder: bool = False) -> None:
    """Raise ValueError for an invalid repository name.

    Args:
        repo_id: the name; must have an owner unless `may_be_folder`.
        may_be_folder: whether the user may have meant a local folder.
    """
    problem = "neither a local folder nor" if may_be_folder else "not"
    try:
        validate_repo_id(repo_id)
        if may_be_folder or "/" in repo_id:
            return
    except HFValidationError:
        pass
    raise ValueError(f"{repo_id!r} is {problem} the name of a repository on the Hub (user/name)")


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
