# SPDX-License-Identifier: Apache-2.0
"""Class labels and guidance: classifier-free, by a weaker model, in an interval of noise levels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from . import image_processor, tensor_ops

ClassLabels = int | str | Sequence[int] | Sequence[str] | Tensor | None
Denoiser = tensor_ops.Denoiser


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
        numbers = class_numbers(class_labels, unet.config.num_class_embeds, names)
        class_labels = numbers * batch_size if len(numbers) == 1 else numbers
    labels = torch.as_tensor(class_labels)
    if labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"class_labels has shape {tuple(labels.shape)} for batch_size={batch_size}; pass one "
            "class, or one per image"
        )
    return labels


def class_numbers(labels: Any, num_classes: int, names: Sequence[str] | None) -> list[int]:
    """The numbers of classes that are given as numbers or as names.

    Raises:
        ValueError: if there is no such class.
    """
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    by_name = {name: number for number, name in enumerate(names or ())}
    numbers: list[Any] = [by_name.get(n, n) if isinstance(n, str) else n for n in labels]
    numbers = [n.item() if isinstance(n, np.integer) else n for n in numbers]
    for number in numbers:
        if not image_processor.is_int(number) or not 0 <= number < num_classes:
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


def denoiser_of(unet: UNet2DModel, labels: Tensor | None, num_outputs: int) -> Denoiser:
    """(x_t, t) -> the first `num_outputs` channels of the prediction, without guidance.

    Args:
        unet: the network, run in its own dtype.
        labels: of `label_tensor`, on the network's device.
        num_outputs: channels that the scheduler reads.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output: Tensor = unet(x_t.to(unet.dtype), t, class_labels=labels).sample
        return output[:, :num_outputs].to(x_t.dtype)

    return denoise


def classifier_free(
    unet: UNet2DModel,
    labels: Tensor | None,
    guidance_scale: float,
    names: Sequence[str] | None,
    num_outputs: int,
) -> Denoiser:
    """The prediction for the class, pushed away from that for no class; one run for both.

    Args:
        unet, labels, num_outputs: as for `denoiser_of`.
        guidance_scale: s in null + s (class - null).
        names: what the classes are called.

    Raises:
        ValueError: if the network was not trained for guidance.

    Source: 2207.12598, eq. 6 with s = 1 + w.
    """
    both = denoiser_of(unet, with_null_class(labels, unet.config, names), num_outputs)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = both(torch.cat([x_t, x_t]), t).chunk(2)
        return _extrapolated(unconditional, conditional, guidance_scale, unet.config.in_channels)

    return denoise


def autoguided(
    unet: UNet2DModel,
    guide: UNet2DModel,
    labels: Tensor | None,
    guidance_scale: float,
    num_outputs: int,
) -> Denoiser:
    """The prediction, pushed away from that of a weaker model of the same data.

    Args:
        unet, labels, num_outputs: as for `denoiser_of`.
        guide: the weaker model, of `check_guide`; told the class where it knows classes.
        guidance_scale: s in guide + s (network - guide).

    Source: 2406.02507, eq. 5.
    """
    num_channels, knows_classes = unet.config.in_channels, guide.class_embedding is not None
    strong = denoiser_of(unet, labels, num_outputs)
    weak = denoiser_of(guide, labels if knows_classes else None, num_channels)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return _extrapolated(weak(x_t, t), strong(x_t, t), guidance_scale, num_channels)

    return denoise


def check_guide(unet: UNet2DModel, guide: UNet2DModel) -> None:
    """Refuse a guide whose predictions do not fit those of `unet`.

    Raises:
        ValueError: if its channels or its classes are others.
    """
    num_channels = unet.config.in_channels
    if guide.config.in_channels != num_channels or guide.config.out_channels < num_channels:
        raise ValueError(
            f"guide must be a model of {num_channels} channels as this one is, got in_channels="
            f"{guide.config.in_channels}, out_channels={guide.config.out_channels}"
        )
    num_classes = guide.config.num_class_embeds
    if guide.class_embedding is not None and num_classes != unet.config.num_class_embeds:
        raise ValueError("guide must know the same classes as this model, or none")


def _extrapolated(weak: Tensor, strong: Tensor, scale: float, num_channels: int) -> Tensor:
    """weak + scale (strong - weak) of the mean; a learned variance is the strong one's."""
    mean = torch.lerp(weak[:, :num_channels], strong[:, :num_channels], scale)
    return torch.cat([mean, strong[:, num_channels:]], dim=1)


def is_guided_at(
    timesteps: Tensor, alphas_cumprod: Tensor, interval: tuple[float, float] | None
) -> list[bool]:
    """Whether each step is guided: those with a log-SNR inside of the interval.

    Args:
        timesteps: those of the trajectory, (K,).
        alphas_cumprod: of the training schedule, (T,).
        interval: lowest and highest natural log of alpha_bar / (1 - alpha_bar), infinite ones
            included; None for all steps.

    Raises:
        ValueError: if the interval is none.

    Source: 2404.07724, section 3; in log-SNR, so that it means the same in any number of steps.
    """
    if interval is None:
        return [True] * len(timesteps)
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not low <= high:
        raise ValueError(
            "guidance_interval must be the lowest and the highest log-SNR to guide at, such as"
            f" (-3, 4), got {interval!r}"
        )
    alpha_bar = alphas_cumprod.cpu().double()[timesteps.cpu().long()]
    log_snr = torch.special.logit(alpha_bar)
    return ((low <= log_snr) & (log_snr <= high)).tolist()  # type: ignore[no-any-return]
