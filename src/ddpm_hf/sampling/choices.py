"""What may be chosen for drawing: another scheduler of the same diffusion, and the classes."""

from collections.abc import Sequence

import diffusers
from diffusers import UNet2DModel

from ddpm_hf.diffusion.conditioning import class_numbers
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline, image_facts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler


def change_scheduler(
    pipeline: GaussianDDPMPipeline, name: str | None = None, spacing: str | None = None
) -> None:
    """Put another scheduler of the same diffusion in the place of the pipeline's.

    Args:
        pipeline: gets it.
        name: "DDPM", or of a scheduler of diffusers without its "Scheduler", such as "DDIM"; None
            leaves the kind as it is.
        spacing: its `timestep_spacing`; None leaves that as it is.
    Raises:
        ValueError: if the scheduler has no such spacing.
    """
    kind = type(pipeline.scheduler)
    if name is not None:
        kind = GaussianDDPMScheduler if name == "DDPM" else getattr(diffusers, f"{name}Scheduler")
    if spacing is not None and (
        "timestep_spacing" not in kind._get_init_keys(kind)
        or (spacing == "quadratic" and kind is not GaussianDDPMScheduler)
    ):
        raise ValueError(f"timestep_spacing={spacing} is not one of {kind.__name__}'s")
    if name is not None or spacing is not None:
        changes = {} if spacing is None else {"timestep_spacing": spacing}
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)


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
