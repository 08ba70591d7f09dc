"""Loading of checkpoints from the Hub or a folder, without running their code.

A name becomes a folder (`hub.download`), its files are checked (`hub.model_files`), and a pipeline
is built from them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.hub.download import fetch
from ddpm_hf.hub.model_files import OUR_SCHEDULERS, check_model, check_network
from ddpm_hf.hub.retry import shorten

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline


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
    import diffusers
    import torch
    from safetensors.torch import load_file

    from ddpm_hf.diffusion.image_format import image_facts
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
    from ddpm_hf.diffusion.portable_checkpoint import check_finite
    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    dtype = dtype or torch.float32
    with _one_line_errors(name):
        files = check_model(folder, name, dtype, variant, use_safetensors)
        unet = _build_unet(files.unet, name, dtype, variant, files.is_safe)
        image_facts(unet)  # raises if they are not valid
        kind = files.scheduler_class
        scheduler = GaussianDDPMScheduler if kind in OUR_SCHEDULERS else getattr(diffusers, kind)
        pipeline = GaussianDDPMPipeline(unet, scheduler.from_pretrained(files.scheduler))
        if files.averages is None:
            return pipeline
        weights = load_file(files.averages)
        check_finite(weights, name)
        # Checkpoints of compiled runs may have the parameter names of the compiled network.
        return with_weights(
            pipeline, {key.removeprefix("_orig_mod."): value for key, value in weights.items()}
        )


def open_unet(folder: Path, name: str, *, use_safetensors: bool = True) -> "UNet2DModel":
    """Network of a folder with its configuration and weights, in float32.

    Args:
        folder: folder of the network.
        name: name of the checkpoint in messages.
        use_safetensors: as for `load`.
    Raises:
        ValueError: if it cannot be loaded, or its weights are incomplete or not finite.
    """
    import torch

    with _one_line_errors(name):
        is_safe = check_network(folder, name, torch.float32, None, use_safetensors)
        return _build_unet(folder, name, torch.float32, None, is_safe)


def _build_unet(
    folder: Path, name: str, dtype: "torch.dtype", variant: str | None, is_safe: bool
) -> "UNet2DModel":
    """The network of checked files; ValueError if its weights are incomplete or not finite."""
    from diffusers import UNet2DModel

    from ddpm_hf.diffusion.portable_checkpoint import check_finite, move_into_memory

    try:  # diffusers initialises missing weights at random and only logs it
        unet, report = UNet2DModel.from_pretrained(
            folder, dtype=dtype, variant=variant, use_safetensors=is_safe, output_loading_info=True
        )
        mismatches = str({kind: keys for kind, keys in report.items() if keys} or "")
    except ValueError as error:  # a weight of another shape, with advice for programmers
        mismatches = f"{error}".removeprefix("Cannot load  because ").partition(". If you")[0]
    if mismatches:
        raise ValueError(f"the weights of {name} do not fit its config.json: {shorten(mismatches)}")
    check_finite(unet.state_dict(), name)
    move_into_memory(unet)
    return unet


def with_weights(
    pipeline: "GaussianDDPMPipeline", weights: Mapping[str, "torch.Tensor"]
) -> "GaussianDDPMPipeline":
    """The pipeline with other weights, without its calibration, which fits the old weights only.

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


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn errors of the libraries about a damaged or foreign checkpoint into one ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the libraries raise errors of every kind for foreign files
        from ddpm_hf.utils.backend_settings import is_out_of_memory  # loads torch

        if is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be loaded: {shorten(reason)}") from None
