"""What may be chosen for drawing: another scheduler of the same diffusion, and the classes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import UNet2DModel

from ddpm_hf.diffusion.conditioning import class_numbers
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.scheduler_spec import SchedulerSpec

# The linear betas end at 4e-5, which Karras' sigmas suit; the cosine's at 2e-9.
_LEAST_SIGNAL_OF_KARRAS = 1e-6


def change_scheduler(pipeline: GaussianDDPMPipeline, sampler: SchedulerSpec) -> None:
    """Put another scheduler of the same diffusion in the place of the pipeline's.

    Args:
        pipeline: gets it.
        sampler: which; its `eta` is an argument of the call.
    Raises:
        ValueError: if the scheduler has no such option, or makes nothing of it.
    """
    kind = type(pipeline.scheduler)
    if (name := sampler.scheduler) is not None:
        kind = GaussianDDPMScheduler if name == "DDPM" else getattr(diffusers, f"{name}Scheduler")
    for option, value in sampler.options.items():
        is_ours = kind is GaussianDDPMScheduler
        if option not in kind._get_init_keys(kind) or (value == "quadratic" and not is_ours):
            raise ValueError(f"{option}={value} is not one of {kind.__name__}'s")
    if name is None and not sampler.options:
        return
    try:
        scheduler = kind.from_config(pipeline.scheduler.config, **sampler.options)
    except (ArithmeticError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{sampler}: {error}") from error
    signal = float(scheduler.alphas_cumprod[-1])
    if scheduler.config.get("use_karras_sigmas") and signal < _LEAST_SIGNAL_OF_KARRAS:
        raise ValueError(
            f"use_karras_sigmas: these betas end in almost pure noise (alpha_bar = {signal:.1g}),"
            " where Karras' sigmas would spend nearly all of the steps"
        )
    pipeline.scheduler = scheduler


@contextmanager
def sampled_by(pipeline: GaussianDDPMPipeline, sampler: SchedulerSpec) -> Iterator[None]:
    """Inside, the pipeline has the scheduler of `sampler`; see `change_scheduler`."""
    own = pipeline.scheduler
    try:
        change_scheduler(pipeline, sampler)
        yield
    finally:
        pipeline.scheduler = own


def use_recommended(pipeline: GaussianDDPMPipeline) -> dict[str, Any]:
    """Give the pipeline the sampler that `ddpm-hf calibrate --sweep` found, and say how to call it.

        images = pipe(4, **use_recommended(pipe)).images

    Args:
        pipeline: gets the scheduler.
    Returns:
        the arguments of its call; {} for a model of which nothing was found.
    Raises:
        ValueError: if what was found is unknown here.
    """
    found = recommended(pipeline)
    if found is None:
        return {}
    sampler = SchedulerSpec.parse(found["scheduler"])
    change_scheduler(pipeline, sampler)
    eta = {} if sampler.eta is None else {"eta": sampler.eta}
    return {"num_inference_steps": found["num_inference_steps"], **eta}


def recommended(pipeline: GaussianDDPMPipeline) -> dict[str, Any] | None:
    """The "scheduler" and "num_inference_steps" that a sweep found best, or None."""
    scheduler = pipeline.scheduler
    if "recommended" not in extension_of(scheduler.config):
        return None
    if not isinstance(scheduler, GaussianDDPMScheduler):  # another one carries it along unread
        scheduler = GaussianDDPMScheduler.from_config(scheduler.config)
    return scheduler.recommended


def calibrated_timesteps(
    pipeline: GaussianDDPMPipeline, spacing: str, num_inference_steps: int | None
) -> list[int]:
    """Timesteps that a calibrated scheduler chooses, which are no part of its configuration.

    Args:
        pipeline: its scheduler chooses them.
        spacing: "likelihood", or "calibrated" for DDIM.
        num_inference_steps: K.
    Raises:
        ValueError: if the scheduler is of another kind or not calibrated so, or K is missing.
    """
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, GaussianDDPMScheduler):
        raise ValueError(f"timestep_spacing={spacing} is not one of {type(scheduler).__name__}'s")
    if num_inference_steps is None:
        raise ValueError(f"num_inference_steps must be given with timestep_spacing={spacing}")
    scheduler.set_timesteps(num_inference_steps, timestep_spacing=spacing)
    timesteps: list[int] = scheduler.timesteps.tolist()
    return timesteps


def class_names_of(unet: UNet2DModel) -> tuple[str, ...] | None:
    """What its classes are called, in the order of their numbers, where it says so."""
    facts = image_facts(unet)
    return tuple(facts.class_names) if facts and facts.class_names else None


def classes_in_turn(
    unet: UNet2DModel, class_labels: Sequence[int | str] | None
) -> list[int] | None:
    """The numbers of the classes that images are drawn of, in turn; None without classes.

    Args:
        unet: knows the classes.
        class_labels: numbers, also as text, or names; None is every class.
    Raises:
        ValueError: for labels of a model without numbered classes, or a class it does not know.
    """
    num_classes, names = unet.config.num_class_embeds, class_names_of(unet)
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("class_labels must be left out: this model was not trained on classes")
        return None
    if class_labels is None:
        return list(range(len(names) if names else num_classes))
    is_number = [str(n).isdecimal() and n not in (names or ()) for n in class_labels]
    labels = [int(n) if number else n for n, number in zip(class_labels, is_number, strict=True)]
    return class_numbers(labels, num_classes, names)
