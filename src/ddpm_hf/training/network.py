"""Network and scheduler of a new model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.checkpoint_limits import check_unet_config
from ddpm_hf.diffusion.image_format import padded_size
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.options import ModelOptions
from ddpm_hf.utils.text import did_you_mean

# Channel multipliers of the levels, by number of levels. 4 levels and 128 channels give the 35.7M
# network of DDPM (2006.11239, appendix B) for CIFAR-10, 6 levels the 114M one for 256 pixels.
_CHANNEL_MULTIPLIERS = {
    2: (1, 2),
    3: (1, 2, 2),
    4: (1, 2, 2, 2),
    5: (1, 1, 2, 2, 4),
    6: (1, 1, 2, 2, 4, 4),
}


def build_unet(
    facts: ImageFacts,
    device: str,
    config_file: str | None = None,
    scheduler: GaussianDDPMScheduler | None = None,
    num_classes: int | None = None,
) -> UNet2DModel:
    """A new UNet2DModel, from `config_file` or proposed for the images.

    Args:
        facts: mode and size of the images.
        device: "cpu" gets a quarter of the channels and one layer per block, so that an update
            takes a fraction of a second.
        config_file: JSON file with arguments of `UNet2DModel`; missing ones follow the images.
        scheduler: if its variance is learned, the network has output channels for it.
        num_classes: for a class-conditional network; it gets one more embedding, the null class.
    Raises:
        ConfigError: if the file cannot be read or does not describe a UNet2DModel.
    """
    arguments = {} if config_file is None else unet_arguments(config_file)
    return new_unet(facts, device, arguments, scheduler, num_classes)


def new_unet(
    facts: ImageFacts,
    device: str,
    arguments: Mapping[str, Any],
    scheduler: GaussianDDPMScheduler | None,
    num_classes: int | None,
) -> UNet2DModel:
    """Like `build_unet`, with the arguments of `UNet2DModel`; empty for a proposed network."""
    is_learned = scheduler is not None and scheduler.learns_variance
    inputs_and_outputs = {
        "in_channels": facts.num_channels,
        "out_channels": facts.num_channels * (2 if is_learned else 1),
        "num_class_embeds": num_classes and num_classes + 1,
    }
    if arguments:
        given = {key: value for key, value in arguments.items() if value is not None}
        unet: UNet2DModel = UNet2DModel.from_config({**inputs_and_outputs, **given})
        return unet
    size = max(facts.height, facts.width)
    # Downsample small images to 4 pixels, larger ones to 8.
    levels = 1 + (size // (4 if size < 64 else 8)).bit_length() - 1
    multipliers = _CHANNEL_MULTIPLIERS[min(max(levels, 2), 6)]
    # Attention at 16 pixels, as in DDPM. On a CPU it would take a third of the time, and the middle
    # block has attention in any case.
    sides = [-(-size // 2**level) for level in range(len(multipliers))]
    attention = [device != "cpu" and 8 < side <= 16 for side in sides]
    return UNet2DModel(
        **inputs_and_outputs,
        sample_size=sample_size(facts, 2 ** (len(multipliers) - 1)),
        layers_per_block=1 if device == "cpu" else 2,
        block_out_channels=tuple((32 if device == "cpu" else 128) * m for m in multipliers),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=64,  # channels per head, the choice of 2105.05233, section 3
    )


def unet_arguments(path: str) -> dict[str, Any]:
    """Arguments of `UNet2DModel` from a JSON file.

    Raises:
        ConfigError: if the file cannot be read or does not describe a UNet2DModel.
    """
    try:
        arguments = read_json(Path(path))
        if not arguments:
            raise ValueError("the file does not exist or is empty")
        known = UNet2DModel._get_init_keys(UNet2DModel)
        for key in arguments:
            if key not in known and not key.startswith("_"):
                raise ValueError(f"UNet2DModel has no argument {key!r}{did_you_mean(key, known)}")
        check_unet_config(arguments, dtype=torch.float32)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"`unet_config` {path} is not a valid UNet2DModel: {error}") from None
    return arguments


def sample_size(facts: ImageFacts, multiple: int) -> int | tuple[int, int]:
    """Size of the images padded to a multiple, as `sample_size` of `UNet2DModel`."""
    height, width = padded_size((facts.height, facts.width), multiple)
    return height if height == width else (height, width)


def build_scheduler(
    config: ModelOptions, pretrained: GaussianDDPMScheduler | None = None
) -> GaussianDDPMScheduler:
    """The scheduler: proposed or pretrained, with the given options applied.

    Args:
        config: the options.
        pretrained: scheduler of the model to fine-tune; None for a bare network, which is most
            likely trained with the defaults of diffusers.
    """
    names = ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    base: Any = pretrained.config if pretrained is not None else {}
    if config.pretrained is None:
        # On MNIST this gives clean digits after 750 updates; DDPM's linear betas with epsilon
        # prediction give gray ones.
        base = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler: GaussianDDPMScheduler = GaussianDDPMScheduler.from_config(base, **chosen)
    return scheduler
