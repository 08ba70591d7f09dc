"""What a run is made of: images, network and diffusion, given, loaded or proposed, and checked."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.image_processor import set_image_facts, size_multiple
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.losses import Loss
from ddpm_hf.training.component_checks import check_runs, check_scheduler, check_trainable
from ddpm_hf.training.config import ConfigError, TrainingConfig
from ddpm_hf.training.dataset_setup import HeldOut, Selection, open_images, split_off_validation
from ddpm_hf.training.network import (
    build_scheduler,
    build_unet,
    fit_to_classes,
    fit_to_variance,
    load_pretrained,
    sample_size,
    unet_arguments,
)
from ddpm_hf.training.objective import Objective, build_objective, choose_objective
from ddpm_hf.training.proposals import propose, rate_from_scratch
from ddpm_hf.training.rank_coordination import main_first


@dataclass(frozen=True)
class Parts:
    """What a run is made of; the configuration is complete."""

    config: TrainingConfig
    images: TrainingImages | Selection
    facts: ImageFacts
    num_skipped: int
    digest: str
    unet: UNet2DModel
    scheduler: GaussianDDPMScheduler
    objective: Objective
    held_out: HeldOut | None
    left_out: dict[str, int]
    base: dict[str, Any] | None = None  # training.json of the pretrained model
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a resumed run must share, as JSON values."""
        parts: dict[str, Any] = {"network": self.unet.config, "diffusion": self.scheduler.config}
        public = {
            part: {key: value for key, value in config.items() if key[0] != "_"}
            for part, config in parts.items()
        }
        images = {**self.facts.to_config()["image"], "number": len(self.images)}
        objective = {"name": self.objective.name}
        return {**public, "images": {**images, "digest": self.digest}, "objective": objective}

    @cached_property
    def hold_out(self) -> dict[str, Any] | None:
        """Which images of a data set a share held out, for others to find again, as JSON values."""
        source = self.images.images.images if isinstance(self.images, Selection) else None
        if self.held_out is None or not isinstance(source, ImageDataset):
            return None
        draw = HoldOut(len(self.held_out), len(source), self.config.seed)
        return {**dataclasses.asdict(draw), "digest": draw.digest(source)}


def assemble(
    config: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
    dataset: Any,
    loss: Loss | None,
) -> Parts:
    """The parts of a run: those given, the rest from the configuration.

    Raises:
        ConfigError, DataError: if one of them, or the way they fit together, cannot work.
    """
    device = accelerator.device.type
    pretrained_scheduler, base = None, None
    if config.pretrained is not None:
        if unet is not None:
            raise ConfigError("pretrained and unet= exclude each other: leave one out")
        unet, pretrained_scheduler, base = load_pretrained(config.pretrained, config.allow_pickle)
    if config.unet_config is not None:
        unet_arguments(config.unet_config)  # refused before images are prepared
    pretrained = unet if config.pretrained else None
    images, facts, digest = main_first(
        accelerator, lambda: open_images(config, dataset, pretrained), config.ddp_timeout
    )
    facts, notes = _with_classes_in_use(config, facts)
    names = facts.class_names
    shares = accelerator.num_processes * config.gradient_accumulation_steps
    if scheduler is None:
        scheduler = build_scheduler(config, pretrained_scheduler)
    scheduler = check_scheduler(scheduler)
    if scheduler.x_0_mse is not None or scheduler.calibrated_timesteps or scheduler.recommended:
        # Measured on the network as it was; and the loss is that of the published variances.
        scheduler = GaussianDDPMScheduler.from_config(
            scheduler.config, x_0_mse=None, calibrated_timesteps=None, recommended=None
        )
        notes += ["the calibration of the model as it was is dropped: calibrate it when it is done"]
    if unet is None:
        torch.manual_seed(config.seed)  # the same first weights on every process and every start
        unet = build_unet(
            facts, device, config.unet_config, scheduler, len(names) if names else None
        )
    if config.pretrained:
        notes += fit_to_variance(unet, scheduler, pretrained_scheduler)
        notes += fit_to_classes(unet, names) if names else []
    check_trainable(unet, scheduler, facts)
    config = choose_objective(config, scheduler)
    if config.learning_rate is None:
        rate = 1e-4 if config.pretrained else rate_from_scratch(unet)
        config = dataclasses.replace(config, learning_rate=rate)
    config = propose(config, len(images), max(facts.height, facts.width), device, shares)
    # The network is convolutional: it is made for the size of these images from here on.
    set_image_facts(unet, facts)
    unet.register_to_config(sample_size=sample_size(facts, size_multiple(unet)))
    with accelerator.autocast():
        check_runs(unet.to(accelerator.device))
    training, held_out = split_off_validation(config, images, facts, unet, dataset is None)
    return Parts(
        config,
        training,
        facts,
        len(getattr(images, "skipped", ())),
        digest,
        unet,
        scheduler,
        build_objective(config, scheduler, facts, loss),
        held_out,
        dict(getattr(images, "left_out", {})),
        base,
        tuple(notes),
    )


def _with_classes_in_use(config: TrainingConfig, facts: ImageFacts) -> tuple[ImageFacts, list[str]]:
    """`facts` without the names of classes that are not trained on, and a word about these."""
    names = facts.class_names
    if config.class_conditional or names is None:
        return facts, []
    shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return dataclasses.replace(facts, class_names=None), [
        f"the images have {len(names)} classes ({shown}); class_conditional trains on them"
    ]
