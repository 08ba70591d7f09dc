"""The network and the diffusion of a run: new, loaded, or changed to what they shall learn."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.checkpoint_limits import check_unet_config
from ddpm_hf.diffusion.image_processor import image_facts, padded_size
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.load import fetch, open_pipeline, open_unet
from ddpm_hf.paths import ModelPaths
from ddpm_hf.text import did_you_mean
from ddpm_hf.training.config import ConfigError, TrainingConfig

# Channels of each level in units of the first, by number of levels. With 4 levels and 128
# channels this is the 35.7M network of DDPM (2006.11239, appendix B) for CIFAR-10, with 6 levels
# the 114M one for 256 pixels.
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
    """A fresh UNet2DModel for such images, from `config_file` or proposed.

    Args:
        facts: mode and size of the images.
        device: "cpu" gets a quarter of the channels, so that a step takes a fraction of a second.
        config_file: JSON file with arguments of `UNet2DModel`; numbers of channels and classes that
            it leaves out are those of the images.
        scheduler: where its variance is learned, the proposed network predicts that, too.
        num_classes: for a network that is told the class; one more embedding stands for "none".
    Raises:
        ConfigError: if the file cannot be read, or its network does not fit the images.
    """
    learned = scheduler is not None and scheduler.learns_variance
    ends = {
        "in_channels": facts.num_channels,
        "out_channels": facts.num_channels * (2 if learned else 1),
        "num_class_embeds": num_classes and num_classes + 1,
    }
    if config_file is not None:
        given = {k: v for k, v in unet_arguments(config_file).items() if v is not None}
        unet: UNet2DModel = UNet2DModel.from_config({**ends, **given})
        return unet
    size = max(facts.height, facts.width)
    # Halve down to 4 pixels for small images, to 8 for larger ones.
    levels = 1 + (size // (4 if size < 64 else 8)).bit_length() - 1
    multipliers = _CHANNEL_MULTIPLIERS[min(max(levels, 2), 6)]
    # At 16 pixels, as in DDPM; a CPU spends a third of its time there, and the middle block at the
    # lowest resolution has attention in any case.
    sides = [-(-size // 2**level) for level in range(len(multipliers))]
    attention = [device != "cpu" and 8 < side <= 16 for side in sides]
    return UNet2DModel(
        **ends,
        sample_size=sample_size(facts, 2 ** (len(multipliers) - 1)),
        block_out_channels=tuple((32 if device == "cpu" else 128) * m for m in multipliers),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=64,  # 64 channels a head were best in 2105.05233, table 3
    )


def unet_arguments(path: str) -> dict[str, Any]:
    """The arguments of a `UNet2DModel` in a JSON file; ConfigError if there is none to be made."""
    try:
        arguments = read_json(Path(path))
        if not arguments:
            raise ValueError("there is no such file, or it is empty")
        known = UNet2DModel._get_init_keys(UNet2DModel)
        for key in arguments:
            if key not in known and not key.startswith("_"):
                raise ValueError(f"it has no argument {key!r}{did_you_mean(key, known)}")
        check_unet_config(arguments, dtype=torch.float32)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"unet_config {path} does not make a UNet2DModel: {error}") from error
    return arguments


def sample_size(facts: ImageFacts, multiple: int) -> int | tuple[int, int]:
    """The images' size once padded to a multiple, as `UNet2DModel` takes it."""
    height, width = padded_size((facts.height, facts.width), multiple)
    return height if height == width else (height, width)


def build_scheduler(
    config: TrainingConfig, pretrained: GaussianDDPMScheduler | None = None
) -> GaussianDDPMScheduler:
    """The scheduler: proposed, or the pretrained model's, with the options over it.

    Args:
        config: the options.
        pretrained: the scheduler of the model that is fine-tuned. Where that is a bare network, the
            defaults of diffusers are the best guess of what it was trained with.
    """
    names = ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    before: Any = pretrained.config if pretrained is not None else {}
    if config.pretrained is None:
        # After 750 updates on MNIST these draw clean digits, DDPM's linear betas with epsilon grey
        # ones.
        before = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler: GaussianDDPMScheduler = GaussianDDPMScheduler.from_config(before, **chosen)
    return scheduler


def load_pretrained(
    source: str, allow_pickle: bool = False
) -> tuple[UNet2DModel, GaussianDDPMScheduler | None, dict[str, Any]]:
    """Network with its weights, scheduler, and what is known of its training.

    A bare UNet2DModel brings no scheduler; what is known may be nothing.

    Args:
        source: Hub repository or local folder.
        allow_pickle: open the weights in pickled .bin files.
    Raises:
        ConfigError: if nothing of the kind is there.
    """
    try:
        folder = fetch(source, use_safetensors=not allow_pickle)
        if not ModelPaths(folder).index.is_file():
            return open_unet(folder, source, use_safetensors=not allow_pickle), None, {}
        pipeline = open_pipeline(folder, source, use_safetensors=not allow_pickle)
        with contextlib.suppress(ValueError):
            return pipeline.unet, pipeline.scheduler, read_json(ModelPaths(folder).facts)
        return pipeline.unet, pipeline.scheduler, {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"pretrained={source!r} cannot be loaded: {error}") from error


def fit_to_variance(
    unet: UNet2DModel, scheduler: GaussianDDPMScheduler, before: GaussianDDPMScheduler | None
) -> list[str]:
    """Widen a pretrained network where its variance shall be learned from now on."""
    channels, now = unet.config.in_channels, scheduler.config.variance_type
    if now != "learned_range" or unet.config.out_channels != channels:
        return []
    fixed = before.config.variance_type if before is not None else "fixed_small"
    widen_for_learned_variance(unet, fixed)
    return [
        f"the network gets {channels} more channels, which predict its variance; they start so "
        f"that it samples as with {fixed}"
    ]


def fit_to_classes(unet: UNet2DModel, names: Sequence[str]) -> list[str]:
    """Give a pretrained network embeddings of these classes, and of none, where it has others.

    They start as the embedding of no class, which for an unconditional network is 0: until it has
    learned them, the network draws as it did without a class.
    """
    facts, before = image_facts(unet), unet.class_embedding
    count = len(names) + 1
    if before is not None and facts is not None and facts.class_names == tuple(names):
        return []
    if before is not None and not isinstance(before, torch.nn.Embedding):
        raise ConfigError(
            f"the network embeds classes by {unet.config.class_embed_type!r}, not by number: it "
            "cannot be given other classes"
        )
    width = unet.time_embedding.linear_2.out_features
    embedding = torch.nn.Embedding(count, width)
    none = torch.zeros(width) if before is None else before.weight[-1].detach()
    embedding.weight = torch.nn.Parameter(none.repeat(count, 1))
    unet.class_embedding = embedding
    unet.register_to_config(num_class_embeds=count)
    what = "embeddings" if before is None else "new embeddings, in the place of others,"
    return [f"the network gets {what} of {len(names)} classes; they start as that of no class"]


def widen_for_learned_variance(unet: UNet2DModel, variance_type: str) -> None:
    """Give a network of fixed variance the channels that predict v of 2102.09672, eq. 15.

    They start at the constant v that stands for the variance it was sampled with, so that the first
    step samples as before.

    Args:
        unet: changed in place.
        variance_type: "fixed_small", for v = -1, or "fixed_large", for v = 1; "_log" or not.
    """
    old, channels = unet.conv_out, unet.config.out_channels
    new = torch.nn.Conv2d(old.in_channels, 2 * channels, old.kernel_size, padding=old.padding)
    v = 1.0 if variance_type.startswith("fixed_large") else -1.0
    new.weight = torch.nn.Parameter(torch.cat([old.weight, torch.zeros_like(old.weight)]).detach())
    new.bias = torch.nn.Parameter(torch.cat([old.bias, torch.full_like(old.bias, v)]).detach())
    unet.conv_out = new
    unet.register_to_config(out_channels=2 * channels)
