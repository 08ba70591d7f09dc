# SPDX-License-Identifier: Apache-2.0
"""Methods of the pipeline that work on the noise of images: invert, interpolate and combine."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from . import (
    callbacks,
    checks,
    denoising_pipeline,
    inversion,
    sampling_loop,
    scheduler_interface,
    scheduling,
    tensor_ops,
)

Conditioning = denoising_pipeline.Conditioning
EditingOutput = denoising_pipeline.EditingOutput
GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler
Generators = tensor_ops.Generators
gaussian_copy = scheduler_interface.gaussian_copy
SamplingStep = sampling_loop.SamplingStep


class InversionMethods(denoising_pipeline.DenoisingPipeline):
    """DDIM inversion of images, and images between and of combinations of their noise.

    Images are PIL images, arrays or tensors of the model's size, as `encode_images` takes them.
    """

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
        denoising_pipeline.check_conditioning("invert", conditioning)
        scheduler = gaussian_copy(self.scheduler, num_inference_steps, timesteps)
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
        denoising_pipeline.check_conditioning("interpolate", conditioning)
        num_images = checks.to_int("num_images", num_images, 2, checks.MAX_IMAGES)
        scheduler = gaussian_copy(self.scheduler, num_inference_steps, timesteps)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        ends = {"a": a, "b": b}
        first, last = (self._noise_of(name, ends[name], scheduler, conditioning) for name in ends)
        weights = torch.linspace(0, 1, num_images, device=first.device)
        shape = (num_images, *first.shape[1:])
        latents = inversion.slerp(first.expand(shape), last.expand(shape), weights)
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
        denoising_pipeline.check_conditioning("combine", conditioning)
        scheduler = gaussian_copy(self.scheduler, num_inference_steps, timesteps)
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        noise = [self._noise_of("images", image, scheduler, conditioning) for image in images]
        weights = torch.as_tensor(weights, dtype=torch.float32)
        weights = weights[None] if weights.ndim == 1 else weights
        latents = inversion.combine(torch.cat(noise), weights)
        x_0 = self._decoded(latents, scheduler, conditioning, generator, eta, on_step_end)
        return self._edited(x_0, output_type)

    def _noise_of(
        self,
        name: str,
        image: Any,
        scheduler: GaussianDDPMScheduler,
        conditioning: Conditioning,
    ) -> Tensor:
        """The noise of one image, or the noise that was given, (1, C, H, W)."""
        if isinstance(image, Tensor) and image.is_floating_point() and (image < 0).any():
            shape = self._shape_of_x_t(1)
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
        scheduler: GaussianDDPMScheduler,
        conditioning: Conditioning,
    ) -> Tensor:
        denoisers, networks = self._denoisers(len(x_0), scheduler, **conditioning)
        steps = self._steps(denoisers[:0:-1], networks, inversion.Inversion.of(scheduler), x_0)
        return self._last_sample(steps)

    def _decoded(
        self,
        latents: Tensor,
        scheduler: GaussianDDPMScheduler,
        conditioning: Conditioning,
        generator: Generators,
        eta: float | None,
        on_step_end: Callable[[SamplingStep], None],
    ) -> Tensor:
        checks.check_generators(generator, len(latents))
        step_options = scheduler_interface.step_options(scheduler, generator, eta or 0.0)
        denoisers, networks = self._denoisers(len(latents), scheduler, **conditioning)
        steps = self._steps(denoisers, networks, scheduler, latents, **step_options)
        return self._last_sample(steps, on_step_end)
