"""The model that training starts from: pretrained, or that of the run that is resumed."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.atomic_files import read_json
from ddpm_hf.diffusion.image_format import image_facts, set_image_facts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.hub.download import fetch
from ddpm_hf.hub.load import open_pipeline, open_unet
from ddpm_hf.paths import ModelPaths, RunPaths, run_of_checkpoint
from ddpm_hf.training.checkpoint_record import CheckpointRecord
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.network import unet_arguments
from ddpm_hf.utils.digests import weights_digest


@dataclass(frozen=True)
class StartingModel:
    """What training starts from.

    Attributes:
        unet: network to fine-tune; None for a new one.
        scheduler: None for a bare network and for a new model.
        record: its training.json, if any.
        identity: digest of the weights and number of class embeddings, as JSON values.
        arguments: of a new network; empty for a proposed one.
    """

    unet: UNet2DModel | None = None
    scheduler: GaussianDDPMScheduler | None = None
    record: Mapping[str, object] = field(default_factory=dict)
    identity: Mapping[str, object] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def load_starting_model(options: TrainingConfig, record: CheckpointRecord | None) -> StartingModel:
    """Read the pretrained model or the network file of the options.

    If its path is that of the resumed run and is not on this machine, the model is that of the
    record, whose weights the checkpoint replaces.

    Args:
        options: the options.
        record: of the checkpoint that is resumed.
    Raises:
        ConfigError: if the model or the file cannot be read.
    """
    if options.pretrained is not None:
        if record and _is_gone("pretrained", options, record) and "pretrained" in record.parts:
            return _recorded_model(record, RunPaths(options.run_folder()))
        return _load(options.pretrained, options.use_safetensors)
    if options.unet_config is None:
        return StartingModel()
    if record and _is_gone("unet_config", options, record):
        return StartingModel(arguments=record.parts["network"])
    return StartingModel(arguments=unet_arguments(options.unet_config))


def _is_gone(name: str, options: TrainingConfig, record: CheckpointRecord) -> bool:
    """Whether the path of an option is that of the resumed run, and is not on this machine."""
    path = getattr(options, name)
    return path == record.config.get(name) and not os.path.exists(path)


def _load(source: str, use_safetensors: bool) -> StartingModel:
    """A pipeline or a bare UNet2DModel, from the Hub or a local folder."""
    try:
        folder = fetch(source, use_safetensors=use_safetensors)
        if not ModelPaths(folder).index.is_file() and not run_of_checkpoint(folder):
            unet = open_unet(folder, source, use_safetensors=use_safetensors)
            return StartingModel(unet, identity=_identity(unet))
        pipeline = open_pipeline(folder, source, use_safetensors=use_safetensors)
        record: Mapping[str, object] = {}
        with contextlib.suppress(ValueError):
            record = read_json(ModelPaths(folder).facts)
        unet = pipeline.unet
        return StartingModel(unet, pipeline.scheduler, record, _identity(unet))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`pretrained` {source!r} cannot be loaded: {error}") from None


def _identity(unet: UNet2DModel) -> dict[str, object]:
    return {"weights": weights_digest(unet), "num_class_embeds": unet.config.num_class_embeds}


def _recorded_model(record: CheckpointRecord, paths: RunPaths) -> StartingModel:
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
    return StartingModel(unet, scheduler, base, identity)


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


def without_calibration(
    scheduler: GaussianDDPMScheduler,
) -> tuple[GaussianDDPMScheduler, list[str]]:
    """The scheduler without the calibration of other weights, and notes for the plan.

    Training uses the published variances.
    """
    if scheduler.x_0_mse is None and not (scheduler.calibrated_timesteps or scheduler.recommended):
        return scheduler, []
    uncalibrated = GaussianDDPMScheduler.from_config(
        scheduler.config, x_0_mse=None, calibrated_timesteps=None, recommended=None
    )
    note = "the pretrained calibration was removed; run `ddpm-hf calibrate` after training"
    return uncalibrated, [note]
