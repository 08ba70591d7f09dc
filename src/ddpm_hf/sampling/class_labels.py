"""Class labels of sampled images."""

from collections.abc import Sequence

from diffusers import UNet2DModel

from ddpm_hf.diffusion.class_choice import class_numbers
from ddpm_hf.diffusion.image_format import image_facts
from ddpm_hf.sampling.options import NOT_CONDITIONAL


def class_names_of(unet: UNet2DModel) -> tuple[str, ...] | None:
    """Names of the model's classes by number; None if they are unknown."""
    facts = image_facts(unet)
    return tuple(facts.class_names) if facts and facts.class_names else None


def label_cycle(unet: UNet2DModel, class_labels: Sequence[int | str] | None) -> list[int] | None:
    """Numbers of the classes that the images get in turn; None for an unconditional model.

    Args:
        unet: network of the model.
        class_labels: class names, or numbers, also as text; None for all classes that the model was
            trained on.
    Raises:
        ValueError: for labels of an unconditional model, or an unknown class.
    """
    num_classes, facts = unet.config.num_class_embeds, image_facts(unet)
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(NOT_CONDITIONAL)
        return None
    if class_labels is None:
        return (facts and facts.trained_classes) or list(range(num_classes))
    return class_numbers(list(class_labels), num_classes, class_names_of(unet))
