# SPDX-License-Identifier: Apache-2.0
"""GaussianDDPMPipeline: sampling of images from noise with a `UNet2DModel`.

This file and the modules that it imports travel with the weights. They import each other as modules
of this folder: for a name imported from one of them, the loader of diffusers would look for a file
of that name at the root of the repository.
"""

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, Literal, Unpack, overload

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import (
    callbacks,
    checks,
    denoising_pipeline,
    image_format,
    image_processor,
    pipeline_editing,
    pipeline_inversion,
    sampling_loop,
    scheduler_interface,
    tensor_ops,
)

Callback = callbacks.Callback
ClassLabels = denoising_pipeline.ClassLabels
Generators = tensor_ops.Generators
Guidance = denoising_pipeline.Guidance
Guide = denoising_pipeline.Guide
SamplingStep = sampling_loop.SamplingStep
image_facts = image_format.image_facts

MAX_BATCH_SIZE = 2**20  # a larger number is a typing error


class GaussianDDPMPipeline(pipeline_editing.EditingMethods, pipeline_inversion.InversionMethods):
    """Unconditional or class-conditional image generation with a `UNet2DModel`.

    Drop-in for diffusers' `DDPMPipeline`. `save_pretrained` and `push_to_hub` write a checkpoint
    that opens in three ways: in plain diffusers as `DDPMPipeline`, with the code that travels with
    it (`custom_pipeline=`, `trust_remote_code=True`), and with this package.

    Args:
        unet: a `UNet2DModel`.
        scheduler: any diffusers scheduler over a beta schedule. A stock `DDPMScheduler` becomes a
            `GaussianDDPMScheduler` of the same configuration.
    Raises:
        TypeError: if `unet` is not a `UNet2DModel`, or for an unsuitable scheduler.
    """

    model_cpu_offload_seq = "unet"
    # Callbacks of diffusers read it.
    _callback_tensor_inputs: ClassVar = list(callbacks.TENSOR_INPUTS)

    @overload
    def __call__(
        self,
        batch_size: int = ...,
        generator: Generators = ...,
        num_inference_steps: int | None = ...,
        output_type: str = ...,
        return_dict: Literal[True] = ...,
        class_labels: ClassLabels = ...,
        guidance_scale: float = ...,
        latents: Tensor | None = ...,
        timesteps: Sequence[int] | None = ...,
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        eta: float | None = ...,
        guidance_interval: tuple[float, float] | None = ...,
        guide: Guide = ...,
        guidance: Guidance | None = ...,
        guidance_weight: float = ...,
    ) -> ImagePipelineOutput: ...

    @overload
    def __call__(
        self,
        batch_size: int = ...,
        generator: Generators = ...,
        num_inference_steps: int | None = ...,
        output_type: str = ...,
        *,
        return_dict: Literal[False],
        class_labels: ClassLabels = ...,
        guidance_scale: float = ...,
        latents: Tensor | None = ...,
        timesteps: Sequence[int] | None = ...,
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        eta: float | None = ...,
        guidance_interval: tuple[float, float] | None = ...,
        guide: Guide = ...,
        guidance: Guidance | None = ...,
        guidance_weight: float = ...,
    ) -> tuple[Any]: ...

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: Guide = None,
        guidance: Guidance | None = None,
        guidance_weight: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images sampled from noise by the reverse process.

        The network runs in its own dtype, without gradients and in eval mode (its previous mode is
        restored afterwards); x_t is at least float32. Padding from training is cropped.

        Args:
            batch_size: number of images, B.
            generator: one generator, or a list of B, with which image i has the same noise in any
                batch.
            num_inference_steps: number of steps, K; by default `num_train_timesteps` for DDPM, 25
                for solvers of higher order, and 50 for other schedulers.
            output_type: "pil" (16-bit colour gets 8 bits), "np" or "pt" for (B, H, W, C) or
                (B, C, H, W) float32 in [0, 1], or "latent" for the last x_t, uncropped.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            class_labels: for class-conditional networks: one class or one per image, by name or
                number; not needed at `guidance_scale` 0. With another `class_embed_type` the
                network gets the tensor unchanged.
            guidance_scale: s of classifier-free guidance, null + s (class - null), where the last
                embedding is the null class; 1 turns it off, 0 gives images of no class. With a
                `guide`: guide + s (network - guide).
            latents: standard normal noise to start from, (B, C, H, W), in the padded size.
            timesteps: timesteps to visit, descending, instead of `num_inference_steps`.
            callback_on_step_end: function `(pipeline, step, timestep, tensors)` to call after each
                step, or a `PipelineCallback` of diffusers; see `diffusion.callbacks`.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback, among
                "latents" (x_t, the default) and "pred_original_sample" (estimate of x_0).
            eta: noise scale in [0, 1]: 1 is DDPM, 0 is DDIM. By default the scheduler's own: 1 for
                `GaussianDDPMScheduler`, 0 for `DDIMScheduler`.
            guidance_interval: lowest and highest log-SNR with guidance (2404.07724); by default
                all. Steps without guidance take one network evaluation per image.
            guide: weaker model of the same data and diffusion, such as an early checkpoint, to be
                guided away from (2406.02507) instead of the null class.
            guidance: log-likelihood to guide by, a differentiable callable (x_t, x_0_hat, t) ->
                log p(y | x_t), (B,), such as `MeasurementGuidance`.
            guidance_weight: factor of its gradient; 1 is Bayes' rule.
        Returns:
            `ImagePipelineOutput` with `.images`, or `(images,)`.
        Raises:
            ValueError: for an invalid argument, or a non-finite value of x_t or the network.
            TypeError: for a generator, network or scheduler of the wrong type.
        Source: DDPM (2006.11239), algorithm 2; guidance 2207.12598, eq. 6 with s = 1 + w.
        """
        denoising_pipeline.check_unet(self.unet)
        num_channels = self.unet.config.in_channels
        image_processor.mode_and_bit_depth(output_type, num_channels, image_facts(self.unet))
        on_step_end = callbacks.step_end_function(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        steps = self.sample_steps(
            batch_size, generator, num_inference_steps, class_labels=class_labels,
            guidance_scale=guidance_scale, latents=latents, timesteps=timesteps, eta=eta,
            guidance_interval=guidance_interval, guide=guide, guidance=guidance,
            guidance_weight=guidance_weight,
        )  # fmt: skip
        x_0 = self._last_sample(steps, on_step_end)
        images = self.decode_images(x_0, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def sample_steps(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        *,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        **conditioning: Unpack[denoising_pipeline.Conditioning],
    ) -> Generator[SamplingStep]:
        """Steps of sampling, each computed when it is asked for; `__call__` runs on the same steps.

            for step in pipe.sample_steps(batch_size=4, num_inference_steps=50, eta=0.0):
                preview = pipe.decode_images(step.pred_original_sample)
            images = pipe.decode_images(step.prev_sample)

        Arguments are checked and noise is drawn at once. Until the iterator ends or is closed, the
        network stays in eval mode and the scheduler holds its state: run one loop at a time.

        Args:
            batch_size, generator, num_inference_steps, latents, timesteps, eta: as for `__call__`.
            **conditioning: class_labels, guidance_scale, guidance_interval, guide, guidance,
                guidance_weight, as for `__call__`.
        Returns:
            iterator of `SamplingStep` with `timestep`, `sample` (x_t), `prev_sample` (x_prev) and
            `pred_original_sample` (estimate of x_0). Assign to `prev_sample` to edit the image, or
            True to `is_last` to end early.
        Raises:
            ValueError, TypeError: as for `__call__`.
        """
        denoising_pipeline.check_conditioning("sample_steps", conditioning)
        denoising_pipeline.check_unet(self.unet)
        scheduler_interface.check_scheduler(self.scheduler)
        batch_size = checks.to_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        checks.check_generators(generator, batch_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        options = scheduler_interface.step_options(self.scheduler, generator, eta)
        scheduler_interface.set_timesteps(self.scheduler, num_inference_steps, timesteps)
        denoisers, networks = self._denoisers(batch_size, self.scheduler, **conditioning)
        x_T = self._initial_noise(self._shape_of_x_t(batch_size), generator, latents)
        return self._steps(denoisers, networks, self.scheduler, x_T, **options)

    @torch.no_grad()
    def _initial_noise(
        self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """x_T, (B, C, H, W), in at least float32."""
        device = self._execution_device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must be a tensor of shape {shape}, got {got}")
        noise: Tensor = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        return noise
