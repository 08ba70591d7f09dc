"""Classes of the training images, and notes for the plan about the images."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ddpm_hf.data import ImageDataset, ImageFacts
from ddpm_hf.data.labels import Labels
from ddpm_hf.training.config import ResolvedConfig
from ddpm_hf.utils.text import counted, share_that_has

_FEW_COLOURED = 0.05  # share of coloured images below which the plan mentions them
_UNBALANCED = 5  # ratio of class counts that the plan mentions
_PASSES_OF_COPIES = 1.5  # passes over the training images, relative to their number


def select_classes(is_conditional: bool, facts: ImageFacts) -> tuple[ImageFacts, list[str]]:
    """The facts without class names if training is unconditional, and notes for the plan."""
    names = facts.class_names
    if is_conditional or names is None:
        return facts, []
    shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return dataclasses.replace(facts, class_names=None), [
        f"the images have {len(names)} classes ({shown}); `class_conditional` trains on them"
    ]


def mode_notes(image_mode: str | None, images: object, is_pretrained: bool) -> list[str]:
    """Notes for the plan about the images that set the mode, or lose their colours to it.

    Args:
        image_mode: the option.
        images: all images of the run.
        is_pretrained: whether a pretrained network sets the mode.
    """
    if not isinstance(images, ImageDataset) or image_mode is not None:
        return []
    mode, count = images.facts.mode, len(images)
    colour, alpha = images.num_with_colour, images.num_with_alpha
    if is_pretrained:
        text = "colours, which are removed because the pretrained model is grayscale"
        is_reduced = colour and mode in ("L", "LA")
        return [f"{share_that_has(colour, count, 'image')} {text}"] if is_reduced else []
    notes = []
    if mode.endswith("A"):
        notes.append(
            f"{share_that_has(alpha, count, 'image')} transparent pixels, so the model gets an "
            f"alpha channel; `image_mode` {mode[:-1]} places them on white instead"
        )
    if mode.startswith("RGB") and colour < _FEW_COLOURED * count:
        notes.append(
            f"{share_that_has(colour, count, 'image')} colours, so the model gets colour channels; "
            f"`image_mode` L removes them"
        )
    return notes


def copy_notes(config: ResolvedConfig, num_images: int) -> list[str]:
    """A note for the plan if samples may become copies of the training images.

    Copies appeared after 64 to 128 passes over 50 faces and 320 to 480 over 200; 480 passes over
    1,000 gave none (docs/few_images.md).

    Args:
        config: the options.
        num_images: number of training images.
    """
    num_passes = config.max_train_steps * config.batch_size / num_images
    if num_passes < _PASSES_OF_COPIES * num_images:
        return []
    advice = "" if config.evaluate_steps else "; `evaluate_steps` measures it during training"
    images = counted(num_images, "image")
    return [f"{num_passes:,.0f} passes over {images}: samples may become copies of them{advice}"]


def count_classes(
    facts: ImageFacts, labels: Labels | None, held_out: Labels | None, class_dropout: float
) -> tuple[ImageFacts, list[str]]:
    """The facts with the number of training images of each class, and notes for the plan."""
    names = facts.class_names
    if labels is None or names is None:
        return facts, []
    counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    facts = dataclasses.replace(
        facts,
        class_counts=tuple(counts),
        has_null_class=class_dropout > 0 or bool((labels < 0).any()),
    )
    notes = []
    if untrained := [name for name, count in zip(names, counts, strict=True) if not count]:
        of_held_out = set() if held_out is None else {names[i] for i in held_out if i >= 0}
        why = " (`validation_split` holds out all of them)" * (of_held_out >= set(untrained))
        notes.append(
            f"no training image has the class {_shown(untrained)}{why}: `ddpm-hf sample` draws the"
            " other classes by default"
        )
    fewest, most = min(filter(None, counts), default=0), max(counts)
    if most >= _UNBALANCED * fewest:
        rare, common = names[counts.index(fewest)], names[counts.index(most)]
        notes.append(
            f"the classes are unbalanced: {counted(fewest, 'image')} of {rare!r}, {most:,} of "
            f"{common!r}"
        )
    return facts, notes


def _shown(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(map(repr, names[:count])) + ", ..." * (len(names) > count)
