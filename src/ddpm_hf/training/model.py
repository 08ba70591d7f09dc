"""What is trained: the network and the scheduler, proposed from the images or taken over."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages, load_images, prepare_images
from ddpm_hf.data.sources import did_you_mean
from ddpm_hf.hub import fetch, open_pipeline, open_unet
from ddpm_hf.pipeline_ddpm_hf import image_facts
from ddpm_hf.scheduling_ddpm_hf import GaussianDDPMScheduler
from ddpm_hf.training.config import ConfigError, TrainingConfig
from ddpm_hf.training.processes import main_first

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


@dataclass(frozen=True)
class Parts:
    """What a run is made of; the configuration is complete."""

    config: TrainingConfig
    images: TrainingImages
    facts: ImageFacts
    num_skipped: int
    digest: str
    unet: UNet2DModel
    scheduler: GaussianDDPMScheduler

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a resumed run must share, as JSON values."""
        parts: dict[str, Any] = {"network": self.unet.config, "diffusion": self.scheduler.config}
        public = {
            part: {key: value for key, value in config.items() if key[0] != "_"}
            for part, config in parts.items()
        }
        images = {**self.facts.to_config()["image"], "number": len(self.images)}
        return {**public, "images": {**images, "digest": self.digest}}


def assemble(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
    dataset: Any,
) -> Parts:
    """The parts of a run: those given, the rest from the configuration.

    Raises:
        ConfigError, DataError: if one of them, or the way they fit together, cannot work.
    """
    device = accelerator.device.type
    pretrained_scheduler = None
    if config.pretrained is not None:
        if unet is not None:
            raise ConfigError("pretrained and unet= exclude each other: leave one out")
        unet, pretrained_scheduler = load_pretrained(config.pretrained)
    pretrained = unet if config.pretrained else None
    images, facts, digest = main_first(accelerator, lambda: _images(config, dataset, pretrained))
    shares = accelerator.num_processes * config.gradient_accumulation_steps
    if unet is None:
        torch.manual_seed(config.seed)  # the same first weights on every process and every start
        unet = build_unet(facts, device, config.unet_config)
    scheduler = scheduler or build_scheduler(config, pretrained_scheduler)
    check_fit(unet, scheduler, facts)
    if config.learning_rate is None:
        rate = 1e-4 if config.pretrained else rate_from_scratch(unet)
        config = dataclasses.replace(config, learning_rate=rate)
    config = propose(config, len(images), max(facts.height, facts.width), device, shares)
    # The network is convolutional: it is made for the size of these images from here on.
    unet.register_to_config(
        _ddpm_hf=facts.to_config(), sample_size=_sample_size(facts, size_multiple(unet))
    )
    return Parts(
        config,
        TrainingImages(
            images,
            seed=config.seed,
            random_flip=config.random_flip,
            size_multiple=size_multiple(unet),
        ),
        facts,
        len(getattr(images, "skipped", ())),
        digest,
        unet,
        scheduler,
    )


def _images(
    config: TrainingConfig, dataset: Any, pretrained: torch.nn.Module | None
) -> tuple[Any, ImageFacts, str]:
    """The images, what they are, and a digest that tells them from others.

    They are sized and coloured for the pretrained network, if any.
    """
    if dataset is None or isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)):
        dataset = build_images(config, dataset, pretrained)
    if isinstance(dataset, ImageDataset):
        # Some images, evenly spread: a large data set shall not be read for this.
        some = range(0, len(dataset), max(1, len(dataset) // 64))
        return dataset, dataset.facts, _digest(dataset.window(index) for index in some)
    if not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise ConfigError(
            "dataset must be a datasets.Dataset, what prepare_images() returns, or a map-style set "
            f"of at least one float tensor (C, H, W) in [-1, 1]; got {type(dataset).__name__}"
        )
    first = dataset[0]
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if not isinstance(first, torch.Tensor) or first.ndim != 3 or len(first) not in modes:
        got = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise ConfigError(
            f"dataset must hold float tensors (C, H, W) with 1 to 4 channels; the first is {got}"
        )
    channels, height, width = first.shape
    facts = ImageFacts(mode=modes[channels], height=height, width=width)
    return dataset, facts, _digest([first.detach().cpu().numpy()])


def _digest(images: Iterable[Any]) -> str:
    sums = hashlib.sha256()
    for image in images:
        sums.update(np.ascontiguousarray(image).tobytes())
    return sums.hexdigest()[:16]


def build_images(
    config: TrainingConfig, dataset: Any = None, pretrained: torch.nn.Module | None = None
) -> ImageDataset:
    """The images that the options name, decoded and resized once.

    Args:
        config: the options.
        dataset: a `datasets.Dataset` in place of the one that `config` names.
        pretrained: network whose size and mode are taken where the options leave them open.
    Raises:
        ConfigError, DataError: if the images cannot be used.
    """
    if dataset is None:
        if config.dataset is None:
            raise ConfigError("dataset is missing: name one, or pass dataset= to train()")
        dataset = load_images(
            config.dataset,
            config_name=config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
        )
    mode, resolution = _wanted_by(pretrained)
    return prepare_images(
        dataset,
        image_column=config.image_column,
        resolution=config.resolution or resolution,
        image_mode=config.image_mode or mode,
        crop=config.crop,
        on_bad_image=config.on_bad_image,
    )


def _wanted_by(unet: torch.nn.Module | None) -> tuple[str | None, int | None]:
    """Mode and resolution of the images that a pretrained network was made for."""
    if unet is None:
        return None, None
    facts = (image_facts(unet) or {}).get("image", {})
    by_channels = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    config: Any = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    return (
        facts.get("mode") or by_channels.get(config.in_channels),
        max(facts["height"], facts["width"]) if facts else size,
    )


def propose(
    config: TrainingConfig, num_images: int, size: int, device: str, num_shares: int = 1
) -> TrainingConfig:
    """`config` with every option about the course of the training that was left open filled in.

    Args:
        config: the options as given.
        num_images: how many images there are.
        size: their longer side in pixels.
        device: "cpu" or the kind of accelerator; a CPU gets a shorter run.
        num_shares: processes x accumulation steps, which share a batch equally.
    Returns:
        a complete configuration: the recipe that gives the same run again.
    Raises:
        ConfigError: if the batch does not divide into equal shares.
    """
    on_cpu = device == "cpu"
    usual = (32 if size <= 32 else 16) if on_cpu else (64 if size <= 64 else 32)
    batch_size = config.batch_size or max(usual // num_shares, 1) * num_shares
    if batch_size % num_shares:
        raise ConfigError(
            f"batch_size {batch_size} does not divide into {num_shares} equal shares (processes x "
            f"gradient_accumulation_steps); {batch_size // num_shares * num_shares or num_shares} "
            f"and {(batch_size // num_shares + 1) * num_shares} do"
        )
    # 400 passes over a small set, within what an evening (CPU) or a night (GPU) allows.
    passes = max(400 * num_images // batch_size, 2000)
    longest = (5000 if size <= 32 else 3000) if on_cpu else 50_000
    steps = config.max_train_steps or min(passes, longest)
    warmup = config.lr_warmup_steps
    return dataclasses.replace(
        config,
        max_train_steps=steps,
        batch_size=batch_size,
        lr_warmup_steps=min(steps // 20, 1000) if warmup is None else warmup,
        sample_steps=config.sample_steps or (250 if on_cpu else 1000),
        checkpointing_steps=config.checkpointing_steps or (250 if on_cpu else 1000),
    )


def rate_from_scratch(unet: torch.nn.Module) -> float:
    """The peak learning rate of a new network.

    DDPM's networks, of 128 channels, took 1e-4 to 2e-4 (2006.11239, appendix B); Adam's best rate
    falls with the width (2203.03466). The bound is what was tried, with 32 channels.
    """
    channels = getattr(getattr(unet, "config", None), "block_out_channels", (128,))
    return float(min(max(1e-4 * 128 / channels[0], 1e-4), 4e-4))


def build_unet(facts: ImageFacts, device: str, config_file: str | None = None) -> UNet2DModel:
    """A fresh UNet2DModel for such images, from `config_file` or proposed.

    Args:
        facts: mode and size of the images.
        device: "cpu" gets a quarter of the channels, so that a step takes a fraction of a second.
        config_file: JSON file with arguments of `UNet2DModel`.
    Raises:
        ConfigError: if the file cannot be read, or its network does not fit the images.
    """
    if config_file is not None:
        return _unet_from_file(config_file)
    size = max(facts.height, facts.width)
    # Halve down to 4 pixels for small images, to 8 for larger ones.
    levels = 1 + (size // (4 if size < 64 else 8)).bit_length() - 1
    multipliers = _CHANNEL_MULTIPLIERS[min(max(levels, 2), 6)]
    # At 16 pixels, as in DDPM; a CPU spends a third of its time there, and the middle block at the
    # lowest resolution has attention in any case.
    sides = [-(-size // 2**level) for level in range(len(multipliers))]
    attention = [device != "cpu" and 8 < side <= 16 for side in sides]
    return UNet2DModel(
        sample_size=_sample_size(facts, 2 ** (len(multipliers) - 1)),
        in_channels=facts.num_channels,
        out_channels=facts.num_channels,
        block_out_channels=tuple((32 if device == "cpu" else 128) * m for m in multipliers),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=64,  # 64 channels a head were best in 2105.05233, table 3
    )


def _sample_size(facts: ImageFacts, multiple: int) -> int | tuple[int, int]:
    """The images' size once padded to a multiple, as `UNet2DModel` takes it."""
    height, width = (-(-n // multiple) * multiple for n in (facts.height, facts.width))
    return height if height == width else (height, width)


def _unet_from_file(path: str) -> UNet2DModel:
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(arguments, dict):
            raise TypeError(f"it must hold an object, got {arguments!r:.50}")
        known = UNet2DModel._get_init_keys(UNet2DModel)
        for key in arguments:
            if key not in known and not key.startswith("_"):
                raise ValueError(f"it has no argument {key!r}{did_you_mean(key, known)}")
        unet: UNet2DModel = UNet2DModel.from_config(arguments)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"unet_config {path} does not make a UNet2DModel: {error}") from error
    return unet


def size_multiple(unet: torch.nn.Module) -> int:
    """Height and width of the network's input must be multiples of this."""
    blocks = getattr(getattr(unet, "config", None), "block_out_channels", (0,))
    return int(2 ** (len(blocks) - 1))


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


def load_pretrained(source: str) -> tuple[UNet2DModel, GaussianDDPMScheduler | None]:
    """Network with its weights, and scheduler, of a pipeline; no scheduler for a bare UNet2DModel.

    Args:
        source: Hub repository or local folder.
    Raises:
        ConfigError: if nothing of the kind is there.
    """
    try:
        folder = fetch(source)
        if not (folder / "model_index.json").is_file():
            return open_unet(folder, source), None
        pipeline = open_pipeline(folder, source)
        return pipeline.unet, pipeline.scheduler
    except (OSError, ValueError) as error:
        raise ConfigError(f"pretrained={source!r} cannot be loaded: {error}") from error


def check_fit(unet: Any, scheduler: GaussianDDPMScheduler, facts: ImageFacts) -> None:
    """Raise ConfigError if the network cannot be trained on such images by L_simple."""
    if not isinstance(unet, UNet2DModel):
        raise ConfigError(
            f"unet must be a diffusers UNet2DModel, got {type(unet).__name__}; for another network "
            "write a loop of your own around ddpm_hf.losses.simple_loss"
        )
    if unet.dtype != torch.float32 or not any(p.requires_grad for p in unet.parameters()):
        raise ConfigError(
            "unet must have float32 weights that require gradients; mixed_precision sets the "
            "precision of the arithmetic"
        )
    if scheduler.config.variance_type.startswith("learned"):
        raise ConfigError(
            f"variance_type is {scheduler.config.variance_type!r}, which L_simple does not train: "
            "use 'fixed_small' or 'fixed_large'"
        )
    config: Any = unet.config
    channels_in, channels_out = config.in_channels, config.out_channels
    if channels_in != facts.num_channels:
        raise ConfigError(
            f"the network takes {channels_in} channels but the images have {facts.num_channels} "
            f"({facts.mode}); set image_mode to one of {_modes_with(channels_in)}, or train a new "
            "network"
        )
    if channels_out != channels_in:
        raise ConfigError(
            f"the network predicts {channels_out} channels for {channels_in}: a learned variance, "
            "which L_simple does not train"
        )
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ConfigError("the network is class-conditional; training here is unconditional")


def _modes_with(channels: int) -> list[str]:
    return [m for m, n in {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}.items() if n == channels]
