"""Class labels of sampled images."""

from collections.abc import Sequence

from diffusers import UNet2DModel

from ddpm_hf.diffusion.conditioning import class_numbers
from ddpm_hf.diffusion.image_processor import image_facts


def class_names_of(unet: UNet2DModel) -> tuple[str, ...] | None:
    """Names of the model's classes by number; None if they are unknown."""
    facts = image_facts(unet)
    return tuple(facts.class_names) if facts and facts.class_names else None


def label_cycle(unet: UNet2DModel, class_labels: Sequence[int | str] | None) -> list[int] | None:
    """Numbers of the classes that the images get in turn; None for an unconditional model.

    Args:
        unet: network of the model.
        class_labels: class numbers, also as text, or class names; None for all classes.
    Raises:
        ValueError: for labels of an unconditional model, or an unknown class.
    """
    num_classes, names = unet.config.num_class_embeds, class_names_of(unet)
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("this model was not trained on classes: leave out `class_labels`")
        return None
    if class_labels is None:
        return list(range(len(names) if names else num_classes))
    is_number = [str(n).isdecimal() and n not in (names or ()) for n in class_labels]
    labels = [int(n) if number else n for n, number in zip(class_labels, is_number, strict=True)]
    return class_numbers(labels, num_classes, names)
