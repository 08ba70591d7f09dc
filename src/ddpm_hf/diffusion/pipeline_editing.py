# SPDX-License-Identifier: Apache-2.0
"""Editing methods of the pipeline: images in, images out, on the functions of `editing`."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from diffusers.models import UNet2DModel
from diffusers.utils import BaseOutput
from torch import Tensor

from . import (
    callbacks,
    checks,
    conditioning,
    editing,
    image_format,
    inpainting,
    likelihood_guidance,
    mask_images,
    portable_pipeline,
    sampling_loop,
    scheduler_interface,
    scheduling,
    tensor_ops,
)

Array = np.ndarray[Any, Any]
Generators = tensor_ops.Generators
SamplingStep = sampling_loop.SamplingStep

MAX_IMAGES = 2**16


class Conditioning(TypedDict, total=False):
    """Arguments of `GaussianDDPMPipeline.__call__` that the editing methods share with it."""

    class_labels: conditioning.ClassLabels
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    guide: conditioning.Guide
    guidance: likelihood_guidance.Guidance | None
    guidance_weight: float


@dataclass
class EditingOutput(BaseOutput):  # type: ignore[misc]
    """Result of an editing method.

    Attributes:
        images: list of PIL images, or an array or tensor; the draws of one image are neighbours.
        std: standard deviation over the draws of each image, float32 in units of [0, 1],
            (B, H, W, C); None unless `return_std`.
        expected_gain: share of the contrast of the image that is kept, for Gaussian data with a
            standard deviation of 0.5; None but for `image_to_image`.
    """

    images: Any
    std: Array | None = None
    expected_gain: float | None = None


class EditingMethods(portable_pipeline.PortablePipeline):
    """Inpainting, image to image, inversion and interpolation of images.

    Base of `GaussianDDPMPipeline`, which has the denoisers, `encode_images` and `decode_images`.
    Images are PIL images, arrays or tensors of the model's size, as `encode_images` takes them.
    """

    _num_timesteps = 0

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask_image: Any,
        *,
        num_images: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        method: str = "repaint",
        jump_length: int = 10,
        jump_n_sample: int = 10,
        eta: float = 1.0,
        output_type: str = "pil",
        return_std: bool = False,
        callback_on_step_end: callbacks.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> EditingOutput:
        """Draw the white part of a mask anew; the rest comes back bit by bit.

        Args:
            image: one image or a batch.
            mask_image: of the same size, one or a batch: white (above half) where the image is
                drawn. A PIL image, a boolean or uint8 array or tensor, or floats in [0, 1].
            num_images: draws of each image: samples of the posterior, whose spread is the
                uncertainty.
            generator: one generator, or a list with one for each draw.
            num_inference_steps: K; None for all training timesteps.
            timesteps: timesteps to visit, descending, instead of `num_inference_steps`.
            method, jump_length, jump_n_sample, eta: see `editing.inpaint`.
            output_type: "pil", "np" or "pt", as for `__call__`.
            return_std: also return the standard deviation over the draws of each image.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as for `__call__`.
            **conditioning: class_labels, guidance_scale, guidance_interval, guide, guidance,
                guidance_weight, as for `__call__`.
        Returns:
            `EditingOutput` with B * num_images images.
        Raises:
            ValueError, TypeError: for an image or mask of another size or mode, an empty or full
                mask, and as `__call__`.
        """
        draws = self._draws(image, num_images, generator, return_std, conditioning)
        x_0, scheduler = draws.x_0, self._own_scheduler(num_inference_steps, timesteps)
        mask = mask_images.encode_masks(
            mask_image, self.unet, len(x_0) // draws.num_images, draws.num_images
        )
        is_known = ~inpainting.checked_mask(mask, x_0, "mask_image")
        denoisers, networks = self._denoisers(len(x_0), scheduler, **draws.conditioning)
        denoisers, conditioned = inpainting.conditioned(
            denoisers, scheduler, x_0, is_known, method=method, jump_length=jump_length,
            jump_n_sample=jump_n_sample, generator=draws.generator,
        )  # fmt: skip
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        noise = tensor_ops.draw_noise(x_0, draws.generator)
        drawn = self._sampled(
            denoisers, networks, conditioned, noise, on_step_end, generator=draws.generator, eta=eta
        )
        images = torch.where(is_known, x_0, drawn)
        return self._edited(images, output_type, num_images if return_std else None)

    @torch.no_grad()
    def image_to_image(
        self,
        image: Any,
        *,
        strength: float | None = None,
        log_snr: float | None = None,
        num_images: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_std: bool = False,
        callback_on_step_end: callbacks.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> EditingOutput:
        """Images like the given one: noised to a timestep, then denoised by the scheduler.

        Args:
            image: one image or a batch.
            strength: share of the K steps that are taken, in (0, 1], as in diffusers (default 0.5).
            log_snr: log of the signal-to-noise ratio to start at, in place of `strength`.
            num_images: draws of each image.
            generator: one generator, or a list with one for each draw.
            num_inference_steps, timesteps: as for `__call__`.
            eta: as for `__call__`.
            output_type, return_std, callback_on_step_end, callback_on_step_end_tensor_inputs,
            **conditioning: as for `inpaint`.
        Returns:
            `EditingOutput` with B * num_images images and `expected_gain`, the share of the image's
            contrast that is kept.
        Raises:
            ValueError, TypeError: for an argument out of range, and as `__call__`.
        """
        draws = self._draws(image, num_images, generator, return_std, conditioning)
        x_0, scheduler = draws.x_0, self.scheduler
        scheduler_interface.set_timesteps(scheduler, num_inference_steps, timesteps)
        options = scheduler_interface.step_options(scheduler, draws.generator, eta)
        start = editing.start_index(scheduler, strength, log_snr)
        denoisers, networks = self._denoisers(len(x_0), scheduler, **draws.conditioning)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        x_t = _noised(scheduler, x_0, tensor_ops.draw_noise(x_0, draws.generator), start)
        images = self._sampled(
            denoisers, networks, scheduler, x_t, on_step_end, begin_index=start, **options
        )
        output = self._edited(images, output_type, num_images if return_std else None)
        output.expected_gain = _gain(scheduler, start, eta)
        return output

    def image_to_image_gain(
        self,
        *,
        strength: float | None = None,
        log_snr: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
    ) -> float:
        """`expected_gain` of `image_to_image` with these arguments, without sampling."""
        scheduler_interface.set_timesteps(self.scheduler, num_inference_steps, timesteps)
        return _gain(self.scheduler, editing.start_index(self.scheduler, strength, log_snr), eta)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> Tensor:
        """The noise that the pipeline turns into the image with `eta=0` and the same steps.

        To change the class of an image, invert it with its class and draw with another one:

            latents = pipe.invert(image, class_labels="cat", num_inference_steps=100)
            pipe(latents=latents, class_labels="dog", num_inference_steps=100, eta=0.0)

        Args:
            image: one image or a batch.
            num_inference_steps: K; None for all training timesteps. The error falls with K.
            timesteps: timesteps to visit, descending, instead of `num_inference_steps`.
            eta: without effect, as inversion adds no noise; accepted for `use_recommended`.
            **conditioning: as for `inpaint`.
        Returns:
            latents for `__call__`, (B, C, H, W) float32, in the padded size.
        Source: 2010.02502, section 4.3.
        """
        scheduler = self._own_scheduler(num_inference_steps, timesteps)
        return self._inverted(self.encode_images(image), scheduler, conditioning)

    @torch.no_grad()
    def interpolate(
        self,
        a: Any,
        b: Any,
        num_images: int = 7,
        *,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: callbacks.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> EditingOutput:
        """Images from `a` to `b` along the sphere between their noise, by DDIM.

        Args:
            a, b: one image each, or noise (1, C, H, W) as `invert` returns it or drawn from a
                standard normal: tensors with negative values are noise.
            num_images: N, with both ends.
            generator: one generator, or a list of N; without effect at `eta` 0.
            num_inference_steps, timesteps: of inversion and of sampling, as for `invert`.
            eta: noise of the steps of sampling, in [0, 1]; None for 0, which reproduces the ends.
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs: as for `inpaint`,
                for the steps of sampling.
            **conditioning: as for `inpaint`.
        Returns:
            `EditingOutput` with N images.
        Raises:
            ValueError, TypeError: for a batch of images, noise of another shape, and as `__call__`.
        Source: 2010.02502, section 5.3.
        """
        num_images = checks.to_int("num_images", num_images, 2, MAX_IMAGES)
        scheduler = self._own_scheduler(num_inference_steps, timesteps)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        ends = {"a": a, "b": b}
        first, last = (self._noise_of(name, ends[name], scheduler, conditioning) for name in ends)
        weights = torch.linspace(0, 1, num_images, device=first.device)
        shape = (num_images, *first.shape[1:])
        latents = editing.slerp(first.expand(shape), last.expand(shape), weights)
        x_0 = self._decoded(latents, scheduler, conditioning, generator, eta, on_step_end)
        return self._edited(x_0, output_type)

    @torch.no_grad()
    def combine(
        self,
        images: Sequence[Any],
        weights: Any,
        *,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: callbacks.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> EditingOutput:
        """Images of weighted combinations of the noise of several images.

        Args:
            images: N images or noises, as for `interpolate`.
            weights: (N,) or (M, N), any real numbers: the noise keeps its law.
            generator, num_inference_steps, timesteps, eta, output_type, callback_on_step_end,
            callback_on_step_end_tensor_inputs, **conditioning: as for `interpolate`.
        Returns:
            `EditingOutput` with M images.
        Raises:
            ValueError, TypeError: for weights of another shape or all 0, and as `interpolate`.
        Source: 2408.08558.
        """
        scheduler = self._own_scheduler(num_inference_steps, timesteps)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        noise = [self._noise_of("images", image, scheduler, conditioning) for image in images]
        weights = torch.as_tensor(weights, dtype=torch.float32)
        weights = weights[None] if weights.ndim == 1 else weights
        latents = editing.combine(torch.cat(noise), weights)
        x_0 = self._decoded(latents, scheduler, conditioning, generator, eta, on_step_end)
        return self._edited(x_0, output_type)

    def _noise_of(
        self,
        name: str,
        image: Any,
        scheduler: scheduling.GaussianDDPMScheduler,
        conditioning: Conditioning,
    ) -> Tensor:
        """The noise of one image, or the noise that was given, (1, C, H, W)."""
        if isinstance(image, Tensor) and image.is_floating_point() and (image < 0).any():
            size, _ = image_format.size_and_window(self.unet, image_format.image_facts(self.unet))
            shape = (1, self.unet.config.in_channels, *size)
            if tuple(image.shape) != shape:
                raise ValueError(
                    f"`{name}` as noise must have shape {shape}, got {tuple(image.shape)}"
                )
            return tensor_ops.at_least_float32(image.to(self._execution_device))
        x_0 = self.encode_images(image)
        if len(x_0) != 1:
            raise ValueError(f"`{name}` must be one image, got a batch of {len(x_0)}")
        return self._inverted(x_0, scheduler, conditioning)

    def _inverted(
        self,
        x_0: Tensor,
        scheduler: scheduling.GaussianDDPMScheduler,
        conditioning: Conditioning,
    ) -> Tensor:
        denoisers, networks = self._denoisers(len(x_0), scheduler, **conditioning)
        inversion = editing.Inversion.of(scheduler)
        return self._sampled(denoisers[:0:-1], networks, inversion, x_0)

    def _decoded(
        self,
        latents: Tensor,
        scheduler: scheduling.GaussianDDPMScheduler,
        conditioning: Conditioning,
        generator: Generators,
        eta: float | None,
        on_step_end: Callable[[SamplingStep], None],
    ) -> Tensor:
        checks.check_generators(generator, len(latents))
        step_options = scheduler_interface.step_options(scheduler, generator, eta or 0.0)
        denoisers, networks = self._denoisers(len(latents), scheduler, **conditioning)
        return self._sampled(denoisers, networks, scheduler, latents, on_step_end, **step_options)

    def _own_scheduler(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None = None
    ) -> scheduling.GaussianDDPMScheduler:
        return editing.with_timesteps(self.scheduler, num_inference_steps, timesteps)

    def _sampled(
        self,
        denoisers: Sequence[tensor_ops.Denoiser],
        networks: Iterable[UNet2DModel],
        scheduler: Any,
        x_T: Tensor,
        on_step_end: Callable[[SamplingStep], None] = lambda step: None,
        *,
        begin_index: int = 0,
        **step_options: Any,
    ) -> Tensor:
        steps = sampling_loop.sampling_steps(
            denoisers, scheduler, x_T, begin_index=begin_index, **step_options
        )
        self._num_timesteps = len(scheduler.timesteps) - begin_index
        return self._last_sample(self._in_eval_mode(steps, networks), on_step_end)

    def _draws(
        self,
        image: Any,
        num_images: int,
        generator: Generators,
        return_std: bool,
        conditioning: Conditioning,
    ) -> "_Draws":
        num_images = checks.to_int("num_images", num_images, 1, MAX_IMAGES)
        if return_std and num_images == 1:
            raise ValueError("`return_std` needs `num_images` of at least 2, got 1")
        x_0 = self.encode_images(image)
        labels = _repeated_labels(conditioning.get("class_labels"), len(x_0), num_images)
        checks.check_generators(generator, len(x_0) * num_images)
        return _Draws(
            x_0.repeat_interleave(num_images, dim=0),
            num_images,
            list(generator) if isinstance(generator, tuple) else generator,
            {**conditioning, "class_labels": labels},
        )

    def _last_sample(
        self,
        steps: Generator[SamplingStep],
        on_step_end: Callable[[SamplingStep], None],
    ) -> Tensor:
        """Run the loop to its end, or until a callback sets `_interrupt`."""
        self._interrupt = False
        with closing(steps), self.progress_bar(total=self._num_timesteps) as progress:
            for step in steps:
                on_step_end(step)
                step.is_last |= self._interrupt
                progress.update()
        x_0: Tensor = step.prev_sample
        return x_0

    def _edited(self, x_0: Tensor, output_type: str, num_draws: int | None = None) -> EditingOutput:
        std = None
        if num_draws is not None:
            draws = self.decode_images(x_0, "np")
            draws = draws.reshape(-1, num_draws, *draws.shape[1:])
            std = draws.std(axis=1, ddof=1)
        return EditingOutput(images=self.decode_images(x_0, output_type), std=std)


@dataclass(frozen=True)
class _Draws:
    """Images and their conditioning, each repeated for its draws, (B * num_images, ...)."""

    x_0: Tensor
    num_images: int
    generator: Generators
    conditioning: Conditioning


def _repeated_labels(labels: Any, num_inputs: int, num_images: int) -> Any:
    """One label for each draw, from one for each input image; others unchanged."""
    if labels is None or isinstance(labels, (int, str)) or np.ndim(labels) == 0:
        return labels
    if len(labels) != num_inputs:
        return labels
    if isinstance(labels, Tensor):
        return labels.repeat_interleave(num_images, dim=0)
    return [label for label in labels for _ in range(num_images)]


def _noised(scheduler: Any, x_0: Tensor, noise: Tensor, start: int) -> Tensor:
    """x_t at a position of the trajectory, in the scheduler's own scale."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    t = scheduler.timesteps[start : start + 1].expand(len(x_0)).to(x_0.device)
    x_t: Tensor = scheduler.add_noise(x_0, noise, t)
    return x_t


def _gain(scheduler: Any, start: int, eta: float | None) -> float:
    visited = scheduler.timesteps[start:].long().unique().flip(0).tolist()
    is_ancestral = eta is None and "DDPM" in type(scheduler).__name__
    return editing.gain_along(
        editing.with_timesteps(scheduler, None, visited), eta=eta or float(is_ancestral)
    )
