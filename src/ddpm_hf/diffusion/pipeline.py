# SPDX-License-Identifier: Apache-2.0
"""GaussianDDPMPipeline: sampling of images from noise with a `UNet2DModel`.

This file and the modules that it imports travel with the weights. They import each other by
`from . import (
    image_format,
    name`: given `from .name import ...`,
    the loader of diffusers would look for name.py,
)
at the root of the repository.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal, TypeAlias, overload

import torch
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import (
    callbacks,
    checks,
    conditioning,
    eval_mode,
    image_format,
    image_processor,
    likelihood_guidance,
    pipeline_editing,
    sampling_loop,
    scheduler_interface,
    scheduling,
    tensor_ops,
)

Callback = callbacks.Callback
ClassLabels = conditioning.ClassLabels
Denoiser = tensor_ops.Denoiser
Generators = tensor_ops.Generators
Guidance = likelihood_guidance.Guidance
Guide: TypeAlias = conditioning.Guide
SamplingStep = sampling_loop.SamplingStep
image_facts = image_format.image_facts

FINITE_RANGE = -checks.FINITE, checks.FINITE
MAX_BATCH_SIZE = 2**20  # a larger number is a typing error


def _check_unet(unet: Any) -> None:
    if isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):  # _orig_mod: torch.compile
        return
    kind, inner = type(unet).__name__, getattr(unet, "module", None)
    hint = ""
    if isinstance(getattr(inner, "_orig_mod", inner), UNet2DModel):
        hint = f"; take it out of the {kind} (accelerator.unwrap_model)"
    raise TypeError(f"`unet` must be a diffusers UNet2DModel, got {kind}{hint}")


class GaussianDDPMPipeline(pipeline_editing.EditingMethods):
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
    _callback_tensor_inputs: ClassVar = list(
        callbacks.TENSOR_INPUTS
    )  # read by callbacks of diffusers

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        _check_unet(unet)
        scheduler_interface.check_scheduler(scheduler)
        if type(scheduler) is DDPMScheduler:
            scheduler = scheduling.as_gaussian_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False
        self._guidance_scale = 1.0

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
        _check_unet(self.unet)
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
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: Guide = None,
        guidance: Guidance | None = None,
        guidance_weight: float = 1.0,
    ) -> Generator[SamplingStep]:
        """Steps of sampling, each computed when it is asked for; `__call__` runs on the same steps.

            for step in pipe.sample_steps(batch_size=4, num_inference_steps=50, eta=0.0):
                preview = pipe.decode_images(step.pred_original_sample)
            images = pipe.decode_images(step.prev_sample)

        Arguments are checked and noise is drawn at once. Until the iterator ends or is closed, the
        network stays in eval mode and the scheduler holds its state: run one loop at a time.

        Args:
            batch_size, generator, num_inference_steps, class_labels, guidance_scale, latents,
            timesteps, eta, guidance_interval, guide, guidance, guidance_weight: as for `__call__`.
        Returns:
            iterator of `SamplingStep` with `timestep`, `sample` (x_t), `prev_sample` (x_prev) and
            `pred_original_sample` (estimate of x_0). Assign to `prev_sample` to edit the image, or
            True to `is_last` to end early.
        Raises:
            ValueError, TypeError: as for `__call__`.
        """
        _check_unet(self.unet)
        scheduler_interface.check_scheduler(self.scheduler)
        batch_size = checks.to_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        checks.check_generators(generator, batch_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        options = scheduler_interface.step_options(self.scheduler, generator, eta)
        scheduler_interface.set_timesteps(self.scheduler, num_inference_steps, timesteps)
        denoisers, networks = self._denoisers(
            batch_size,
            self.scheduler,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guide=guide,
            guidance=guidance,
            guidance_weight=guidance_weight,
        )
        size, _ = image_format.size_and_window(self.unet, image_facts(self.unet))
        shape = (batch_size, self.unet.config.in_channels, *size)
        x_T = self._initial_noise(shape, generator, latents)
        self._num_timesteps = len(self.scheduler.timesteps)
        steps = sampling_loop.sampling_steps(denoisers, self.scheduler, x_T, **options)
        return self._in_eval_mode(steps, networks)

    def _in_eval_mode(
        self, steps: Iterable[SamplingStep], networks: Iterable[UNet2DModel]
    ) -> Generator[SamplingStep]:
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(eval_mode.evaluating(network))
            yield from steps
        self.maybe_free_model_hooks()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by number, for `class_labels`; None if the model has none."""
        facts = image_facts(self.unet)
        return tuple(facts.class_names) if facts and facts.class_names else None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current sampling loop; a callback may change it between steps."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        """Set the guidance scale of the next steps."""
        self._guidance_scale = scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current sampling loop, which callbacks of diffusers read."""
        return self._num_timesteps

    def encode_images(self, images: Any) -> Tensor:
        """Images as x_0 of this model, the inverse of `decode_images`.

        Args:
            images: a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or
                (B, C, H, W), or a list of these. Arrays and tensors are uint8, uint16 or floating
                point in [0, 1].
        Returns:
            x_0 in [-1, 1], float32, (B, C, H, W), padded as in training, on the pipeline's device.
        Raises:
            TypeError: for another kind of image.
            ValueError: if size, mode, bit depth or range do not fit the model.
        """
        return image_processor.encode_images(images, self.unet).to(self._execution_device)

    def decode_images(self, x_0: Tensor, output_type: str = "pil") -> Any:
        """Images of x_0 in [-1, 1], (B, C, H, W), without the padding from training.

        Args:
            x_0: last x_t of sampling, or an estimate of x_0.
            output_type: as for `__call__`; "latent" returns a copy.
        """
        facts = image_facts(self.unet)
        form = image_processor.mode_and_bit_depth(output_type, self.unet.config.in_channels, facts)
        if output_type == "latent":
            return x_0.clone()  # callbacks may hold the tensor itself
        _, window = image_format.size_and_window(self.unet, facts)
        return image_processor.to_images(x_0[..., *window], output_type, *form)

    def _denoisers(
        self,
        batch_size: int,
        scheduler: Any,
        *,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Guide = None,
        guidance: Guidance | None = None,
        guidance_weight: float = 1.0,
    ) -> tuple[list[Denoiser], list[UNet2DModel]]:
        """A denoiser `(x_t, t)` for each timestep of `scheduler`, and the networks they call."""
        labels: Tensor | None
        facts = image_facts(self.unet)
        class_names = facts.class_names if facts else None
        is_conditional = self.unet.class_embedding is not None
        if is_conditional and class_labels is None and guidance_scale == 0 and guide is None:
            labels = conditioning.null_labels(self.unet, batch_size, class_names)
        else:
            labels = conditioning.label_tensor(self.unet, class_labels, batch_size, class_names)
        labels = None if labels is None else labels.to(self._execution_device)
        weak = self._guide_network(guide, guidance_scale)
        num_outputs = scheduler_interface.num_outputs(self.unet.config, scheduler)

        def with_scale(scale: float) -> Denoiser:
            checks.check_float("guidance_scale", scale, "that is finite", *FINITE_RANGE)
            if scale == 1:
                return plain
            if weak is not None:
                return conditioning.autoguided(self.unet, weak, labels, scale, num_outputs)
            return conditioning.classifier_free(self.unet, labels, scale, class_names, num_outputs)

        self._guidance_scale = guidance_scale
        plain = conditioning.denoiser_of(self.unet, labels, num_outputs)
        guided = conditioning.with_current_scale(with_scale, lambda: self._guidance_scale)
        if guidance is not None:
            plain, guided = (
                likelihood_guidance.guided_denoiser(d, scheduler, guidance, guidance_weight)
                for d in (plain, guided)
            )
        is_guided = conditioning.is_guided_at(
            scheduler.timesteps, scheduler.alphas_cumprod, guidance_interval
        )
        return [guided if here else plain for here in is_guided], [self.unet, weak or self.unet]

    def _guide_network(self, guide: Guide, guidance_scale: float) -> UNet2DModel | None:
        if guide is None:
            return None
        if guidance_scale == 1:
            raise ValueError(
                "`guide` has no effect at `guidance_scale` 1; pass a larger scale, such as 2"
            )
        return conditioning.guide_network(guide, self.unet, self.scheduler, self._execution_device)

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
