# SPDX-License-Identifier: Apache-2.0
"""Class labels, classifier-free guidance, autoguidance, and guidance intervals."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from . import class_choice, tensor_ops

class_numbers = class_choice.class_numbers
ClassLabels = int | str | Sequence[int] | Sequence[str] | Tensor | None
Denoiser = tensor_ops.Denoiser
Guide: TypeAlias = UNet2DModel | DiffusionPipeline | None


def label_tensor(
    unet: UNet2DModel, class_labels: Any, batch_size: int, class_names: Sequence[str] | None
) -> Tensor | None:
    """Labels as the network takes them, one per image; None for an unconditional network.

    Args:
        unet: network whose class embedding determines the kind of labels.
        class_labels: one class or one per image, as numbers or names.
        batch_size: number of images, B.
        class_names: names of the classes in the order of their numbers.
    Raises:
        ValueError: for an unknown class or the wrong number of labels.
    """
    if unet.class_embedding is None:
        if class_labels is None:
            return None
        raise ValueError(
            f"`class_labels` must be None for this unconditional model, got {class_labels!r}"
        )
    if class_labels is None:
        raise ValueError(
            "`class_labels` is required: this model is class-conditional; name a class, or set "
            "`guidance_scale` to 0 for images of no class"
        )
    if unet.config.class_embed_type is None:
        numbers = class_numbers(class_labels, unet.config.num_class_embeds, class_names)
        class_labels = numbers * batch_size if len(numbers) == 1 else numbers
    labels = torch.as_tensor(class_labels)
    if labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"`class_labels` must be one class or one per image, got shape {tuple(labels.shape)} "
            f"for `batch_size` {batch_size}"
        )
    return labels


def null_labels(unet: UNet2DModel, batch_size: int, class_names: Sequence[str] | None) -> Tensor:
    """The null class (the last embedding) for each image, (B,).

    Raises:
        ValueError: if the network has no null class.
    """
    class_choice.check_null_class(unet.config, class_names)
    return torch.full((batch_size,), unet.config.num_class_embeds - 1)


def with_null_class(
    labels: Tensor | None, config: Any, class_names: Sequence[str] | None
) -> Tensor:
    """Labels followed by the same number of null classes (the last embedding), (2B,).

    Raises:
        ValueError: if the network has no null class, or did not train it.
    """
    if labels is None:
        raise ValueError(class_choice.NO_CLASSES)
    class_choice.check_null_class(config, class_names)
    return torch.cat([labels, torch.full_like(labels, config.num_class_embeds - 1)])


def denoiser_of(unet: UNet2DModel, labels: Tensor | None, num_outputs: int) -> Denoiser:
    """Denoiser `(x_t, t)` without guidance, t (B,).

    Args:
        unet: network, run in its own dtype.
        labels: result of `label_tensor`, on the device of the network.
        num_outputs: number of output channels that the scheduler reads.
    Returns:
        function that returns the first `num_outputs` channels in the dtype of x_t.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output: Tensor = unet(x_t.to(unet.dtype), t, class_labels=labels).sample
        return output[:, :num_outputs].to(x_t.dtype)

    return denoise


def classifier_free(
    unet: UNet2DModel,
    labels: Tensor | None,
    guidance_scale: float,
    class_names: Sequence[str] | None,
    num_outputs: int,
) -> Denoiser:
    """Denoiser `(x_t, t)` with classifier-free guidance, in one network call of 2B images.

    Args:
        unet, labels, num_outputs: as for `denoiser_of`.
        guidance_scale: s in null + s (class - null).
        class_names: names of the classes.
    Raises:
        ValueError: if the network has no null class.
    Source: 2207.12598, eq. 6 with s = 1 + w.
    """
    both = denoiser_of(unet, with_null_class(labels, unet.config, class_names), num_outputs)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        return _extrapolated(unconditional, conditional, guidance_scale, unet.config.in_channels)

    return denoise


def autoguided(
    unet: UNet2DModel,
    guide: UNet2DModel,
    labels: Tensor | None,
    guidance_scale: float,
    num_outputs: int,
) -> Denoiser:
    """Denoiser `(x_t, t)` guided away from the prediction of a weaker model.

    Args:
        unet, labels, num_outputs: as for `denoiser_of`.
        guide: network of `guide_network`; gets the labels if it is class-conditional.
        guidance_scale: s in guide + s (network - guide).
    Source: 2406.02507, eq. 3.
    """
    num_channels, is_conditional = unet.config.in_channels, guide.class_embedding is not None
    strong = denoiser_of(unet, labels, num_outputs)
    weak = denoiser_of(guide, labels if is_conditional else None, num_channels)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return _extrapolated(weak(x_t, t), strong(x_t, t), guidance_scale, num_channels)

    return denoise


def with_current_scale(
    with_scale: Callable[[float], Denoiser], current_scale: Callable[[], float]
) -> Denoiser:
    """Denoiser `(x_t, t)` that follows changes of the guidance scale between steps.

    Args:
        with_scale: function that returns the denoiser of a guidance scale; called at once, and
            again after each change.
        current_scale: function that returns the guidance scale of the next step.
    """
    scale = current_scale()
    denoiser = with_scale(scale)

    def denoise(x_t: Tensor, t: Tensor) -> Any:
        nonlocal scale, denoiser
        if current_scale() != scale:
            scale = current_scale()
            denoiser = with_scale(scale)
        return denoiser(x_t, t)

    return denoise


def guide_network(
    guide: Any, unet: UNet2DModel, scheduler: Any, device: torch.device
) -> UNet2DModel:
    """Network of a weaker model, on the device.

    Args:
        guide: a network, or a pipeline of the same diffusion.
        unet, scheduler: parts of the pipeline to guide.
        device: device of the guided network.
    Raises:
        TypeError: if `guide` is neither a pipeline nor a network.
        ValueError: if diffusion, channels or classes differ.
    """
    if isinstance(guide, DiffusionPipeline):
        for key in ("prediction_type", "num_train_timesteps"):
            got = guide.scheduler.config.get(key, "epsilon")
            expected = scheduler.config.get(key, "epsilon")
            if got != expected:
                raise ValueError(
                    f"`guide` must have the {key} of this model, {expected!r}, got {got!r}"
                )
        guide = guide.unet
    if not isinstance(guide, UNet2DModel):
        raise TypeError(f"`guide` must be a pipeline or a UNet2DModel, got {type(guide).__name__}")
    _check_guide(unet, guide)
    return guide.to(device)


def _check_guide(unet: UNet2DModel, guide: UNet2DModel) -> None:
    num_channels = unet.config.in_channels
    if guide.config.in_channels != num_channels or guide.config.out_channels < num_channels:
        raise ValueError(
            f"`guide` must have {num_channels} channels like this model, got in_channels="
            f"{guide.config.in_channels}, out_channels={guide.config.out_channels}"
        )
    expected, got = unet.config.num_class_embeds, guide.config.num_class_embeds
    if guide.class_embedding is not None and got != expected:
        raise ValueError(
            "`guide` must be unconditional or have the classes of this model, got "
            f"num_class_embeds={got} instead of {expected}"
        )


def _extrapolated(weak: Tensor, strong: Tensor, scale: float, num_channels: int) -> Tensor:
    """weak + scale (strong - weak) for the mean, with the learned variance of `strong`."""
    mean = torch.lerp(weak[:, :num_channels], strong[:, :num_channels], scale)
    return torch.cat([mean, strong[:, num_channels:]], dim=1)


def is_guided_at(
    timesteps: Tensor, alphas_cumprod: Tensor, interval: tuple[float, float] | None
) -> list[bool]:
    """Whether each step is guided: its log-SNR is inside the interval.

    Args:
        timesteps: timesteps of the trajectory, (K,).
        alphas_cumprod: alpha_bar of the training schedule, (T,).
        interval: lowest and highest log(alpha_bar / (1 - alpha_bar)), may be infinite; None guides
            every step.
    Raises:
        ValueError: for an invalid interval.
    Source: 2404.07724, section 3; in log-SNR, so that it does not depend on the number of steps.
    """
    if interval is None:
        return [True] * len(timesteps)
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not low <= high:
        raise ValueError(
            "`guidance_interval` must be the lowest and the highest log-SNR with guidance, such as"
            f" (-3, 4), got {interval!r}"
        )
    alpha_bar = alphas_cumprod.cpu().double()[timesteps.cpu().long()]
    log_snr = torch.special.logit(alpha_bar)
    return ((low <= log_snr) & (log_snr <= high)).tolist()  # type: ignore[no-any-return]
