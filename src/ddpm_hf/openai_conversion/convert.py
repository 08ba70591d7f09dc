"""`convert`: a checkpoint of improved-diffusion or guided-diffusion as a pipeline."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf.diffusion.image_format import ImageFacts, set_image_facts
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.openai_conversion.flags import PRESETS, OpenAIFlags
from ddpm_hf.openai_conversion.network import scheduler_of, unet_config
from ddpm_hf.openai_conversion.weights import converted, flags_of_weights, read_state, weights_file
from ddpm_hf.utils.text import did_you_mean


def convert(
    weights: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    class_names: list[str] | None = None,
) -> GaussianDDPMPipeline:
    """A pipeline with the network and the diffusion of an improved- or guided-diffusion checkpoint.

        convert("cifar10_uncond_50M_500K.pt", preset="iddpm-cifar10").save_pretrained("cifar10")

    A network with `rescale_timesteps` sees t * 1000 / T. `UNet2DModel` takes t itself, so of 4,000
    timesteps every fourth is kept, with exact betas: the chain has 1,000 timesteps.

    Args:
        weights: `.pt` file with the state dict of the network, or the folder of a training run,
            whose newest EMA weights are used. Read with `weights_only=True`.
        preset: name of a published model, one of `PRESETS`.
        config: JSON file with the flags of the repositories' scripts, instead of `preset`. Flags
            that the shapes of the weights determine can be left out: `image_size`, the heads and
            the diffusion remain.
        class_names: names of the classes, in the order of their numbers.
    Returns:
        the pipeline on the CPU, in float32.
    Raises:
        ValueError: if the file is not such a state dict, its keys or shapes do not fit the flags
            (names them), or `UNet2DModel` cannot express the network (with the reason).
        OSError: if a file cannot be read.
    """
    if (preset is None) == (config is None):
        choices = ", ".join(PRESETS)
        raise ValueError(f"pass either `preset` or `config`; presets: {choices}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(
            f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}"
            f"{did_you_mean(preset, PRESETS)}"
        )
    given = PRESETS[preset] if preset else OpenAIFlags.read(Path(str(config)))
    state = read_state(weights_file(Path(weights).expanduser()))
    size = OpenAIFlags(**given).image_size
    flags = OpenAIFlags(**{**flags_of_weights(state, size), **given})
    num_classes = _num_classes(state, flags)
    config_of_unet, scheduler = unet_config(flags, num_classes), scheduler_of(flags)
    with torch.device("meta"):
        unet = UNet2DModel(**config_of_unet)
    unet.load_state_dict(converted(state, unet, flags), assign=True)
    names = _checked_names(class_names, num_classes)
    set_image_facts(unet, ImageFacts("RGB", size, size, 8, names))
    return GaussianDDPMPipeline(unet.eval(), scheduler)


def _num_classes(state: Mapping[str, Tensor], flags: OpenAIFlags) -> int | None:
    embedding = state.get("label_emb.weight")
    if (embedding is not None) != flags.class_cond:
        has = "has" if embedding is not None else "has no"
        raise ValueError(f"the network {has} classes, but class_cond is {flags.class_cond}")
    return None if embedding is None else len(embedding)


def _checked_names(names: list[str] | None, num_classes: int | None) -> tuple[str, ...] | None:
    if names is not None and len(names) != (num_classes or 0):
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes or 0} classes, got"
            f" {len(names)}"
        )
    return None if names is None else tuple(names)
