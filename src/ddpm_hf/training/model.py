"""Network and scheduler of a run: new, pretrained or given, and checked with its images."""

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageFacts
from ddpm_hf.diffusion.image_format import set_image_facts, size_multiple
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.training.component_checks import check_runs, check_scheduler, check_trainable
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.network import build_scheduler, new_unet, sample_size
from ddpm_hf.training.pretrained import (
    StartingModel,
    adapt_to_classes,
    adapt_to_variance,
    without_calibration,
)


def build_model(
    options: TrainingConfig,
    base: StartingModel,
    facts: ImageFacts,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
) -> tuple[UNet2DModel, GaussianDDPMScheduler, list[str]]:
    """Network on the device, scheduler, and notes for the plan.

    Args:
        options: the options, with those of the resumed run filled in.
        base: what training starts from.
        facts: mode, size and classes of the images, which the configuration of the network records.
        accelerator: device and precision.
        unet, scheduler: replace those that the options describe; see `train`.
    Raises:
        ConfigError: if network, scheduler and images do not fit together.
    """
    if scheduler is None:
        scheduler = build_scheduler(options, base.scheduler)
    scheduler, notes = without_calibration(check_scheduler(scheduler))
    names, device = facts.class_names or (), accelerator.device
    if unet is None and base.unet is not None:
        unet = base.unet
        notes += adapt_to_variance(unet, scheduler, base.scheduler)
        notes += adapt_to_classes(unet, names) if names else []
    elif unet is None:
        torch.manual_seed(options.seed)  # the same initial weights on every process
        unet = new_unet(facts, device.type, base.arguments, scheduler, len(names) or None)
    check_trainable(unet, scheduler, facts)
    set_image_facts(unet, facts)
    unet.register_to_config(sample_size=sample_size(facts, size_multiple(unet)))
    with accelerator.autocast():
        check_runs(unet.to(device))
    return unet, scheduler, notes
