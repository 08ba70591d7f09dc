# SPDX-License-Identifier: Apache-2.0
"""Methods of the pipeline that draw variants of images: inpaint and image to image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from . import (
    callbacks,
    checks,
    denoising_pipeline,
    image_processor,
    image_to_image,
    inpainting,
    scheduler_interface,
    tensor_ops,
    timestep_spacings,
)

Conditioning = denoising_pipeline.Conditioning
EditingOutput = denoising_pipeline.EditingOutput
Generators = tensor_ops.Generators
gaussian_copy = scheduler_interface.gaussian_copy


class EditingMethods(denoising_pipeline.DenoisingPipeline):
    """Draws of the masked part of images, and of images like given ones.

    Images are PIL images, arrays or tensors of the model's size, as `encode_images` takes them.
    """

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
        eta: float | None = None,
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
            method: "repaint" puts the noised known values in place at every step and repeats parts
                of the trajectory; "covariance" draws x_0 given the known values at every step,
                which needs gradients of the network and is more accurate for an accurate one.
            jump_length: steps that "repaint" goes back at a time; 1 for a calibrated model.
            jump_n_sample: passes of "repaint" over each of these parts; 1 for no repetition.
            eta: noise scale of a step, in [0, 1]: 1 is DDPM, 0 is DDIM. By default 0 for
                `DDIMScheduler`, 1 for others.
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
        Source: RePaint (2201.09865), algorithm 1; covariance: 2402.02149.
        """
        denoising_pipeline.check_conditioning("inpaint", conditioning)
        draws = self._draws(image, num_images, generator, return_std, conditioning)
        x_0, generator = draws.x_0, draws.generator
        scheduler = gaussian_copy(self.scheduler, num_inference_steps, timesteps)
        mask = image_processor.encode_masks(
            mask_image, self.unet, len(x_0) // draws.num_images, draws.num_images
        )
        is_known = ~inpainting.checked_mask(mask, x_0, "mask_image")
        denoisers, networks = self._denoisers(len(x_0), scheduler, **draws.conditioning)
        denoisers, conditioned = inpainting.conditioned(
            denoisers, scheduler, x_0, is_known, method=method, jump_length=jump_length,
            jump_n_sample=jump_n_sample, generator=generator,
        )  # fmt: skip
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        noise = tensor_ops.draw_noise(x_0, generator)
        if eta is None:
            eta = float(type(self.scheduler).__name__ not in timestep_spacings.DDIM)
        steps = self._steps(denoisers, networks, conditioned, noise, generator=generator, eta=eta)
        images = torch.where(is_known, x_0, self._last_sample(steps, on_step_end))
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
        Source: SDEdit (2108.01073), algorithm 1.
        """
        denoising_pipeline.check_conditioning("image_to_image", conditioning)
        draws = self._draws(image, num_images, generator, return_std, conditioning)
        x_0, scheduler = draws.x_0, self.scheduler
        scheduler_interface.check_scheduler(scheduler)
        scheduler_interface.set_timesteps(scheduler, num_inference_steps, timesteps)
        options = scheduler_interface.step_options(scheduler, draws.generator, eta)
        start = image_to_image.start_index(scheduler, strength, log_snr)
        denoisers, networks = self._denoisers(len(x_0), scheduler, **draws.conditioning)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        noise = tensor_ops.draw_noise(x_0, draws.generator)
        x_t = image_to_image.noised(scheduler, x_0, noise, start)
        steps = self._steps(denoisers, networks, scheduler, x_t, begin_index=start, **options)
        images = self._last_sample(steps, on_step_end)
        output = self._edited(images, output_type, num_images if return_std else None)
        output.expected_gain = image_to_image.expected_gain(scheduler, start, eta)
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
        scheduler_interface.check_scheduler(self.scheduler)
        scheduler_interface.set_timesteps(self.scheduler, num_inference_steps, timesteps)
        start = image_to_image.start_index(self.scheduler, strength, log_snr)
        return image_to_image.expected_gain(self.scheduler, start, eta)

    def _draws(
        self,
        image: Any,
        num_images: int,
        generator: Generators,
        return_std: bool,
        conditioning: Conditioning,
    ) -> "_Draws":
        num_images = checks.to_int("num_images", num_images, 1, checks.MAX_IMAGES)
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
