"""Network and scheduler of a run: new, pretrained, or adapted to other classes or variances."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.checkpoint_limits import check_unet_config
from ddpm_hf.diffusion.image_format import image_facts, padded_size, set_image_facts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.digests import weights_digest
from ddpm_hf.hub.download import fetch
from ddpm_hf.hub.load import open_pipeline, open_unet
from ddpm_hf.paths import ModelPaths, RunPaths, run_of_checkpoint
from ddpm_hf.text import did_you_mean
from ddpm_hf.training.checkpoint_record import CheckpointRecord
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.options import ModelOptions

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
    is_learned = scheduler is not None and scheduler.learns_variance
    inputs_and_outputs = {
        "in_channels": facts.num_channels,
        "out_channels": facts.num_channels * (2 if is_learned else 1),
        "num_class_embeds": num_classes and num_classes + 1,
    }
    if config_file is not None:
        arguments = {k: v for k, v in unet_arguments(config_file).items() if v is not None}
        unet: UNet2DModel = UNet2DModel.from_config({**inputs_and_outputs, **arguments})
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
        attention_head_dim=64,  # 64 channels per head were best in 2105.05233, table 3
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


@dataclass(frozen=True)
class PretrainedModel:
    """A model to fine-tune; empty for a new model.

    Attributes:
        scheduler: None for a bare network and for a new model.
        record: its training.json, if any.
        identity: digest of the weights and number of class embeddings, as JSON values.
    """

    unet: UNet2DModel | None = None
    scheduler: GaussianDDPMScheduler | None = None
    record: Mapping[str, object] = field(default_factory=dict)
    identity: Mapping[str, object] = field(default_factory=dict)


def load_pretrained(source: str, use_safetensors: bool = True) -> PretrainedModel:
    """Load a pipeline or a bare UNet2DModel.

    Args:
        source: Hub repository or local folder.
        use_safetensors: False also opens pickled .bin weights.
    Raises:
        ConfigError: if there is no such model, or it cannot be loaded.
    """
    try:
        folder = fetch(source, use_safetensors=use_safetensors)
        if not ModelPaths(folder).index.is_file() and not run_of_checkpoint(folder):
            unet = open_unet(folder, source, use_safetensors=use_safetensors)
            return PretrainedModel(unet, identity=_identity(unet))
        pipeline = open_pipeline(folder, source, use_safetensors=use_safetensors)
        record: Mapping[str, object] = {}
        with contextlib.suppress(ValueError):
            record = read_json(ModelPaths(folder).facts)
        unet = pipeline.unet
        return PretrainedModel(unet, pipeline.scheduler, record, _identity(unet))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`pretrained` {source!r} cannot be loaded: {error}") from None


def _identity(unet: UNet2DModel) -> dict[str, object]:
    return {"weights": weights_digest(unet), "num_class_embeds": unet.config.num_class_embeds}


def is_recorded_and_gone(options: ModelOptions, name: str, record: CheckpointRecord | None) -> bool:
    """Whether the path of an option is that of the resumed run, and is not on this machine."""
    path = getattr(options, name)
    is_recorded = record is not None and path is not None and path == record.config.get(name)
    return is_recorded and not os.path.exists(path)


def recorded_model(record: CheckpointRecord, paths: RunPaths) -> PretrainedModel:
    """The pretrained model of a resumed run, without its weights, which the checkpoint replaces.

    Args:
        record: of the checkpoint.
        paths: of the run.
    """
    image, identity = record.parts["images"], record.parts["pretrained"]
    # Class embeddings that are added later come last among the parameters, and the optimizer's
    # moments are saved by the index of their parameter.
    unet: UNet2DModel = UNet2DModel.from_config(
        record.parts["network"], num_class_embeds=identity["num_class_embeds"]
    )
    side = min(image["height"], image["width"])
    set_image_facts(unet, ImageFacts(image["mode"], side, side, image["bit_depth"]))
    scheduler = GaussianDDPMScheduler.from_config(record.parts["diffusion"])
    base: Any = {}
    with contextlib.suppress(ValueError):
        base = read_json(paths.model.facts).get("base") or {}
    return PretrainedModel(unet, scheduler, base, identity)


def adapt_to_variance(
    unet: UNet2DModel,
    scheduler: GaussianDDPMScheduler,
    pretrained_scheduler: GaussianDDPMScheduler | None,
) -> list[str]:
    """Add output channels to a pretrained network if its variance is newly learned.

    Returns:
        notes for the plan.
    """
    channels, before = unet.config.in_channels, pretrained_scheduler
    is_learned = scheduler.config.variance_type == "learned_range"
    if not is_learned or unet.config.out_channels != channels:
        return []
    fixed = before.config.variance_type if before is not None else "fixed_small"
    widen_for_learned_variance(unet, fixed)
    return [
        f"the network gets {channels} more output channels for its variance; they are initialized "
        f"to sample as with {fixed}"
    ]


def adapt_to_classes(unet: UNet2DModel, names: Sequence[str]) -> list[str]:
    """Replace the class embeddings of a pretrained network if it has other classes or none.

    New embeddings start as the null class of the network, which is 0 for an unconditional one: at
    first the network samples as without a class.

    Returns:
        notes for the plan.
    Raises:
        ConfigError: if the network embeds classes in another way than by index.
    """
    facts, old = image_facts(unet), unet.class_embedding
    count = len(names) + 1
    if old is not None and facts is not None and facts.class_names == tuple(names):
        return []
    if old is not None and not isinstance(old, torch.nn.Embedding):
        raise ConfigError(
            f"class_embed_type of the network is {unet.config.class_embed_type!r}: only class "
            "indices can be trained; use another `pretrained` network"
        )
    width = unet.time_embedding.linear_2.out_features
    embedding = torch.nn.Embedding(count, width)
    null = torch.zeros(width) if old is None else old.weight[-1].detach()
    embedding.weight = torch.nn.Parameter(null.repeat(count, 1))
    unet.class_embedding = embedding
    unet.register_to_config(num_class_embeds=count)
    what = "embeddings" if old is None else "new embeddings, which replace the pretrained ones,"
    return [f"the network gets {what} of {len(names)} classes, initialized as the null class"]


def widen_for_learned_variance(unet: UNet2DModel, variance_type: str) -> None:
    """Add the output channels that predict v (2102.09672, eq. 15) to a network, in place.

    They start at the constant v of the fixed variance, so that sampling is unchanged at first.

    Args:
        unet: network with a fixed variance.
        variance_type: "fixed_small" (v = -1) or "fixed_large" (v = 1), with or without "_log".
    """
    old, channels = unet.conv_out, unet.config.out_channels
    new = torch.nn.Conv2d(old.in_channels, 2 * channels, old.kernel_size, padding=old.padding)
    v = 1.0 if variance_type.startswith("fixed_large") else -1.0
    new.weight = torch.nn.Parameter(torch.cat([old.weight, torch.zeros_like(old.weight)]).detach())
    new.bias = torch.nn.Parameter(torch.cat([old.bias, torch.full_like(old.bias, v)]).detach())
    unet.conv_out = new
    unet.register_to_config(out_channels=2 * channels)
