# SPDX-License-Identifier: Apache-2.0
"""Class labels and classifier-free guidance. Travels with the weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from . import arithmetic, checks, images

ClassLabels = int | str | Sequence[int] | Sequence[str] | Tensor | None
Denoiser = arithmetic.Denoiser


def label_tensor(
    unet: UNet2DModel, class_labels: Any, batch_size: int, names: Sequence[str] | None
) -> Tensor | None:
    """Labels as the network takes them, one per image; None for an unconditional network.

    Args:
        unet: decides what labels are.
        class_labels: one class or one per image, as numbers or names.
        batch_size: B.
        names: what the classes are called, in the order of their numbers.

    Raises:
        ValueError: if the network knows no such class, or the number of labels does not fit.
    """
    if unet.class_embedding is None and class_labels is not None:
        raise ValueError(f"class_labels={class_labels!r}: this model knows no classes")
    if unet.class_embedding is None:
        return None
    if class_labels is None:
        raise ValueError("class_labels must be given: this model is class-conditional")
    if unet.config.class_embed_type is None:
        numbers = _class_numbers(class_labels, unet.config.num_class_embeds, names)
        class_labels = numbers * batch_size if len(numbers) == 1 else numbers
    labels = torch.as_tensor(class_labels)
    if labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"class_labels has shape {tuple(labels.shape)} for batch_size={batch_size}; pass one "
            "class, or one per image"
        )
    return labels


def _class_numbers(labels: Any, num_classes: int, names: Sequence[str] | None) -> list[int]:
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    by_name = {name: number for number, name in enumerate(names or ())}
    numbers: list[Any] = [by_name.get(n, n) if isinstance(n, str) else n for n in labels]
    numbers = [n.item() if isinstance(n, np.integer) else n for n in numbers]
    for number in numbers:
        if not images.is_int(number) or not 0 <= number < num_classes:
            known = f" or of {list(by_name)}" if by_name else ""
            raise ValueError(f"class_labels must be in 0..{num_classes - 1}{known}, got {number!r}")
    return numbers


def with_null_class(labels: Tensor | None, config: Any, names: Sequence[str] | None) -> Tensor:
    """The labels, then as many of the null class: the last embedding of the network.

    Raises:
        ValueError: if the network was not trained for guidance.
    """
    if labels is None or config.class_embed_type is not None:
        raise ValueError("guidance_scale must be 1: this model has no numbered classes")
    if names is not None and len(names) >= config.num_class_embeds:
        raise ValueError(
            "guidance_scale must be 1: this model was trained without a null class, all of its "
            f"{config.num_class_embeds} embeddings are classes"
        )
    return torch.cat([labels, torch.full_like(labels, config.num_class_embeds - 1)])


def guided_denoiser(
    unet: UNet2DModel,
    labels: Tensor | None,
    guidance_scale: float,
    names: Sequence[str] | None,
    num_outputs: int,
) -> Denoiser:
    """(x_t, t) -> the first `num_outputs` channels of the prediction, guided if asked.

    Args:
        unet: the network, run in its own dtype.
        labels: of `label_tensor`, on the network's device.
        guidance_scale: s in null + s (class - null); at 1 the network is run once, else twice.
        names: what the classes are called.
        num_outputs: channels that the scheduler reads.

    Raises:
        ValueError: if the scale is not finite, or the network was not trained for guidance.
        TypeError: if the scale is no number.

    Source: 2207.12598, eq. 6 with s = 1 + w.
    """
    checks.check_float(
        "guidance_scale", guidance_scale, "that is finite", -checks.FINITE, checks.FINITE
    )
    is_guided = guidance_scale != 1
    if is_guided:
        labels = with_null_class(labels, unet.config, names)
    num_channels = unet.config.in_channels

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x = x_t.to(unet.dtype)
        x = torch.cat([x, x]) if is_guided else x
        output: Tensor = unet(x, t, class_labels=labels).sample[:, :num_outputs].to(x_t.dtype)
        if not is_guided:
            return output
        conditional, unconditional = output.chunk(2)
        guided = torch.lerp(unconditional, conditional, guidance_scale)
        # Guidance moves the mean alone: a learned variance is the conditional network's.
        guided[:, num_channels:] = conditional[:, num_channels:]
        return guided

    return denoise
